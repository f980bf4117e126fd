"""The prompts whose rope positions the releases of transformers were asked for."""

# A prompt is a list of runs of text tokens and (kind, (t, h, w) in tokens, seconds between temporal patches). A start
# and an end token enclose each medium.
TEN_MINUTES = 600 / 256 * 2  # 256 frames of ten minutes, two to a temporal patch
PROMPTS = {
    "2 frames a second": [3, ["video", [6, 1, 2], 1.0], 4],
    "1 frame a second": [3, ["video", [6, 2, 2], 2.0], 4],
    "4 frames a second": [3, ["video", [6, 1, 2], 0.5], 4],
    "1.3 frames a second": [3, ["video", [60, 1, 1], 2 / 1.3], 4],
    "0.7 seconds": [2, ["video", [41, 1, 1], 0.7], 2],
    "10 minutes, 256 frames": [3, ["video", [128, 1, 1], TEN_MINUTES], 4],
    "an image": [3, ["image", [1, 2, 3], 0.0], 4],
    "all sorts": [2, ["video", [3, 2, 2], 1.25], 1, ["image", [1, 3, 2], 0.0], 2, ["video", [9, 1, 2], 3.9], 3],
}
