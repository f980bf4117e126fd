"""Read videos and images as patches: decode, sample, resize and cut them, with numpy and without mlx.

    spec = VisionSpec.from_files(rules, config, image_processor, video_processor)  # rules: of the model's family
    vision = load_vision("clip.mp4", spec)  # patches (n, values), grid (t, h, w), the seconds of each temporal patch

Its parts are `sampling` (which frames, and their size), `video` and `image` (files to pixels), `resize` and `patches`.
"""

from mlxvr.media.frame_options import FrameSelection
from mlxvr.media.image import read_image
from mlxvr.media.patches import Frames, VisionInput, normalise, patchify
from mlxvr.media.sequence import read_frames
from mlxvr.media.spec import VisionSpec
from mlxvr.media.video.video_reader import VideoInfo, probe, read_video
from mlxvr.media.vision import load_vision

__all__ = [
    "FrameSelection",
    "Frames",
    "VideoInfo",
    "VisionInput",
    "VisionSpec",
    "load_vision",
    "normalise",
    "patchify",
    "probe",
    "read_frames",
    "read_image",
    "read_video",
]
