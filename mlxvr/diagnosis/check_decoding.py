"""Checks of decoding: frames of a bundled clip against those of the `ffmpeg` program, and the answer about the clip."""

from collections.abc import Iterator

import numpy as np

import mlxvr
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.diagnosis import reference
from mlxvr.diagnosis.findings import Finding, judge
from mlxvr.media import FrameSelection, read_image, read_video
from mlxvr.media.spec import VisionSpec

__all__ = ["check_answer", "check_frames"]

CLIP = "clips/clip01.mp4"
FRAMES = (0, 72, 145)
QUESTION = "Which color does the moving object have?"
OPTIONS = ("orange", "blue", "purple", "green")


def check_frames() -> Iterator[Finding]:
    """Compare a few frames at full size, pixel by pixel."""
    path, truth = demo_folder() / CLIP, reference.load().notes["clip"]
    # Every frame at its own size: nothing is resized.
    spec = VisionSpec(patch_size=16, merge_size=2, mean=(0.5,) * 3, std=(0.5,) * 3, frame_min_tokens=1)
    frames = read_video(path, spec, FrameSelection(frames=truth["frames"]))
    error = 0.0 if frames.indices.tolist() == list(range(truth["frames"])) else float("nan")
    for index in FRAMES:
        expected = read_image(reference.FOLDER / f"frame{index}.png")
        error = max(error, float(np.abs(frames.pixels[index].astype(int) - expected).max()))
    yield judge(
        "decoding of a clip",
        error,
        green=3.0,  # SIMD code rounds differently on other processors
        red=32.0,
        what="difference to the ffmpeg program, of 255 levels,",
        advice="this FFmpeg converts colors differently: reinstall the package av",
    )


def check_answer() -> Iterator[Finding]:
    """Run all of it, from the file to the confidence."""
    truth = reference.load().notes["clip"]
    with mlxvr.load() as reasoner:
        answer = reasoner.ask(demo_folder() / CLIP, QUESTION, options=list(OPTIONS), mode="direct")
    right = answer.first == truth["answer"] and answer.confidence is not None
    error = abs((answer.confidence or 0.0) - truth["confidence"]) if right else float("nan")
    yield judge(
        "answer about a clip",
        error,
        green=0.02,
        red=0.2,
        what="difference in confidence",
        advice="do not trust confidences here; please report it with this output",
    )
