"""Reading frames: `mlxvr.media.read_video` beside `mlx_vlm.utils.load_video`, in one run.

    python tests/benchmarks/frames.py [--keep DIR] [--repeats N] [--only 720p|360p]

Two H.264 clips are written (with --keep, once): 60 s of 1280x720 with a keyframe every 250 frames, sampled at
2 fps, and 10 min of 640x360 with a keyframe every 48 frames, 64 frames sampled. Both have B-frames, moving
texture, and the index of every frame drawn into it, from which the frames that a reader returns are checked.
Each reader gets the file and returns frames in memory: ours resized for the model, mlx-vlm's at full size as
it does. The two alternate, so that another load on the machine meets both; on a busy machine the ratio of CPU
seconds is the steadier figure.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clips import draw_code, read_code, write_clip

from mlxvr.media import read_video
from mlxvr.media.frame_options import FrameSelection
from mlxvr.media.sampling import frame_indices
from mlxvr.model.families.base import FAMILIES

FPS = 30


@dataclass(frozen=True)
class Case:
    name: str
    seconds: int
    size: tuple[int, int]  # (width, height)
    gop: int
    nframes: int


CASES = (
    Case("720p", 60, (1280, 720), 250, 120),
    Case("360p", 600, (640, 360), 48, 64),
)


class MovingScene:
    """Frames with a drifting texture and noise, and the frame's index drawn over the upper left quarter."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.width, self.height = case.size
        rng = np.random.default_rng(0)
        coarse = rng.integers(40, 216, (self.height // 16 + 1, self.width // 8 + 1, 3), dtype=np.uint8)
        self.texture = coarse.repeat(16, axis=0).repeat(16, axis=1)[: self.height]
        self.noise = [rng.integers(0, 24, (self.height, self.width, 3), dtype=np.uint8) for _ in range(8)]

    def __len__(self) -> int:
        return self.case.seconds * FPS

    def __getitem__(self, index: int) -> np.ndarray:
        if index >= len(self):
            raise IndexError(index)
        left = int((np.sin(index / 60) + 1) / 2 * (self.texture.shape[1] - self.width))
        frame = self.texture[:, left : left + self.width] + self.noise[index % len(self.noise)]
        frame[: self.height // 2, : self.width // 2] = draw_code(index, self.width // 2, self.height // 2)
        return frame


def read_corner(frame: np.ndarray) -> int | None:
    return read_code(frame[: frame.shape[0] // 2, : frame.shape[1] // 2])


def read_ours(path: Path, case: Case) -> np.ndarray:
    spec = FAMILIES["qwen3_vl"].vision_spec({})
    return read_video(path, spec, FrameSelection(frames=case.nframes)).pixels


def read_peer(path: Path, case: Case) -> np.ndarray:
    from mlx_vlm.utils import load_video

    frames, _ = load_video(str(path), nframes=case.nframes)
    return frames


@dataclass(frozen=True)
class Cost:
    wall: float  # seconds
    cpu: float  # seconds of all threads


def timed(read: Callable[[], np.ndarray]) -> tuple[Cost, np.ndarray]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = read()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu), result


def median(costs: list[Cost]) -> Cost:
    return Cost(statistics.median(c.wall for c in costs), statistics.median(c.cpu for c in costs))


def count_right(codes: list[int | None], expected: np.ndarray) -> str:
    right = sum(code == index for code, index in zip(codes, expected.tolist()))
    return f"{right} of {len(expected)} right"


def run_case(case: Case, folder: Path, repeats: int, peer: bool) -> None:
    path = folder / f"{case.name}.mp4"
    if not path.exists():
        print(f"writing {path} ...", file=sys.stderr)
        unfinished = path.with_suffix(".part.mp4")
        write_clip(
            unfinished,
            images=MovingScene(case),
            fps=FPS,
            size=case.size,
            gop=case.gop,
            bframes=3,
            options={"preset": "veryfast", "sc_threshold": "0"},
        )
        unfinished.rename(path)
    expected = frame_indices(case.seconds * FPS, FPS, nframes=case.nframes)
    costs: dict[str, list[Cost]] = {}
    for repeat in range(repeats):
        for reader, read in READERS.items():
            if reader == "mlx-vlm" and not peer:
                continue
            cost, frames = timed(lambda read=read: read(path, case))
            costs.setdefault(reader, []).append(cost)
            if not repeat:
                codes = [read_corner(frame if frame.shape[-1] == 3 else frame.transpose(1, 2, 0)) for frame in frames]
                print(f"{case.name}: {reader} returned {len(frames)} frames, {count_right(codes, expected)}")
    medians = {reader: median(values) for reader, values in costs.items()}
    for reader, cost in medians.items():
        print(f"{case.name}: {reader} {cost.wall:.2f} s, {cost.cpu:.2f} s of CPU (medians of {repeats})")
    if peer:
        ours, theirs = medians["mlxvr"], medians["mlx-vlm"]
        print(f"{case.name}: {theirs.wall / ours.wall:.1f}x faster, {theirs.cpu / ours.cpu:.1f}x less CPU")


READERS = {"mlxvr": read_ours, "mlx-vlm": read_peer}


def main() -> None:
    parser = argparse.ArgumentParser(description="read_video beside mlx_vlm.utils.load_video")
    parser.add_argument("--keep", type=Path, help="folder for the clips; written there once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=[case.name for case in CASES])
    parser.add_argument("--no-peer", action="store_true", help="time mlxvr alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for case in CASES:
            if args.only in (None, case.name):
                run_case(case, folder, args.repeats, not args.no_peer)


if __name__ == "__main__":
    main()
