"""A range of a large file, read alone: the same frames at the same times as after a scan of the whole."""

import av
import clips
import numpy as np
import pytest

from mlxvr.errors import Cancelled, MediaError
from mlxvr.media import read_video
from mlxvr.media.frame_options import FrameSelection
from mlxvr.media.video import video_reader as video_module
from mlxvr.media.video.decoding import open_video
from mlxvr.media.video.packet_table import PacketTable
from mlxvr.media.video.window import scan_range
from mlxvr.model.families.base import FAMILIES
from tests.test_video import TICKS

SPEC = FAMILIES["qwen3_vl"].vision_spec({}).with_overrides(frame_min_tokens=1)
FRAMES = 400

# A pause of 2 s in the middle of each second hundred, and a little jitter everywhere.
PAUSES = [k * 1000 + (k % 3) * 200 + 60_000 * ((k + 50) // 200) for k in range(FRAMES)]
DROPPED = [(k + k // 70) * 1000 for k in range(FRAMES)]  # a frame is missing now and then

KINDS = {
    "h264.mp4": {"bframes": 3},
    "h264.mkv": {"bframes": 3},
    "ntsc.mp4": {"fps": clips.Fraction(30_000, 1001), "bframes": 2},
    "ntsc.mkv": {"fps": clips.Fraction(30_000, 1001), "bframes": 2},
    "open_groups.mp4": {"bframes": 3, "options": {"x264-params": "open-gop=1:scenecut=0"}},
    "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "hevc.mp4": {"codec": "libx265", "bframes": 3, "options": {"x265-params": "log-level=none:open-gop=1"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"lag-in-frames": "16", "auto-alt-ref": "1"}},
    "pauses.mp4": {"times": PAUSES, "time_base": TICKS, "bframes": 2},
    "pauses.mkv": {"times": PAUSES, "time_base": TICKS},
    "dropped.mp4": {"times": DROPPED, "time_base": TICKS, "bframes": 2},
    "dropped.mkv": {"times": DROPPED, "time_base": TICKS},
    "sound.mp4": {"bframes": 2, "audio_seconds": 13.0},
    "steady.ts": {"bframes": 2},
    "h264.avi": {"bframes": 2},
    "one_group.mp4": {"gop": 1000, "bframes": 2},
}
VARIABLE = {"pauses.mp4", "pauses.mkv", "dropped.mkv"}
WHOLE = {"dropped.mp4", "steady.ts", "h264.avi"}  # these leave room for doubt


@pytest.fixture(scope="session")
def long_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")

    def get(name):
        path = folder / name
        if not path.exists():
            clips.write_clip(path, frames=FRAMES, **KINDS[name])
        return path

    return get


def random_ranges(name, count):
    rng = np.random.default_rng(sum(name.encode()))
    for _ in range(count):
        start = round(float(rng.uniform(0, 12)), int(rng.integers(0, 4)))
        length = round(float(rng.uniform(0.05, 3)), 2)
        yield {"start": start, "end": start + length}
    yield {"start": 2.0, "end": 4.0}  # on frames
    yield {"start": 11.0}
    yield {"end": 1.5}


@pytest.mark.parametrize("sample_by", ["time", "index"])
@pytest.mark.parametrize("name", KINDS)
def test_the_same_frames_as_after_a_full_scan(long_clip, monkeypatch, name, sample_by):
    path, spec = long_clip(name), SPEC.with_overrides(sample_by=sample_by)
    used = []

    def watched(*arguments, **options):
        timeline = scan_range(*arguments, **options)
        used.append(timeline is not None)
        return timeline

    monkeypatch.setattr(video_module, "scan_range", watched)
    for options in random_ranges(name, 8):
        results = []
        for worthwhile in (0, 1 << 60):
            monkeypatch.setattr(video_module, "_WORTHWHILE", worthwhile)
            try:
                results.append(read_video(path, spec, FrameSelection(**options)))
            except MediaError as error:
                results.append(str(error))
        alone, whole = results
        if isinstance(whole, str):
            assert alone == whole
            continue
        assert clips.read_codes(alone.pixels) == clips.read_codes(whole.pixels), options
        assert np.array_equal(alone.pixels, whole.pixels)
        assert alone.seconds == pytest.approx(whole.seconds, abs=1e-9)
        assert alone.sampled_fps == pytest.approx(whole.sampled_fps)
        assert alone.duration == pytest.approx(whole.duration)
        if name not in VARIABLE:
            assert alone.indices.tolist() == whole.indices.tolist()
    assert not any(used) if name in WHOLE else np.mean(used) >= (0.4 if name in VARIABLE else 1.0), used


def test_only_the_range_is_read(long_clip, monkeypatch):
    """Packets of the file's start, of its end and of the range: here 64, and two times a group of 12 and a few more."""
    seen = []
    add = PacketTable.add
    monkeypatch.setattr(PacketTable, "add", lambda table, packet: seen.append(packet.pts) or add(table, packet))
    with open_video(long_clip("h264.mkv")) as (container, stream):
        timeline = scan_range(container, stream, start=8.0, end=8.5)
    assert timeline.is_part
    assert timeline.seconds[0] == pytest.approx(7.7, abs=0.2)
    assert len(seen) < 64 + 24 + 60 < FRAMES / 2


def test_a_file_that_cannot_be_read_out_of_order(long_clip, monkeypatch):
    def fail(*_, **__):
        raise av.error.PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(video_module, "scan_range", fail)
    monkeypatch.setattr(video_module, "_WORTHWHILE", 0)
    frames = read_video(long_clip("h264.mkv"), SPEC, FrameSelection(start=8.0, end=8.5))
    assert clips.read_codes(frames.pixels) == frames.indices.tolist() == [240, 245, 250, 255]


def test_stopping(long_clip):
    with open_video(long_clip("h264.mkv")) as (container, stream), pytest.raises(Cancelled):
        scan_range(container, stream, start=8.0, end=8.5, should_stop=lambda: True)
