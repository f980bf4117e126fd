"""Decoded frames are the right frames, upright, on time, and from the file that was given; else one clear line.

Every clip is a real file whose frames show their own index (`clips`). The truth is a plain decode of the
whole file by PyAV, and the drawn index itself.
"""

import dataclasses
import logging
import math
import os
import socketserver
import threading
from fractions import Fraction
from pathlib import Path

import av
import clips
import numpy as np
import pytest

from mlxvr.errors import Cancelled, ConfigError, MediaError
from mlxvr.media import load_vision, probe, read_frames, read_video
from mlxvr.media.frame_options import FrameSelection
from mlxvr.media.sampling import frame_indices
from mlxvr.media.video import video_reader as video_module
from mlxvr.media.video.decode_plan import Stretch, plan_stretches
from mlxvr.media.video.timeline import scan
from mlxvr.model.families.base import FAMILIES
from mlxvr.runtime import thread_pool
from mlxvr.runtime.hooks import Hooks

# One token is 32 x 32 pixels; these bounds keep 128 x 96 frames at their own size.
SPEC = FAMILIES["qwen3_vl"].vision_spec({}).with_overrides(frame_min_tokens=1)
BY_INDEX = SPEC.with_overrides(sample_by="index")
FRAMES = 60

# Bunched and spread over 30 ticks a frame time, with a pause of two seconds in the middle.
UNEVEN = [index * 1000 + (index % 3) * 300 + (60_000 if index >= 30 else 0) for index in range(FRAMES)]
TICKS = Fraction(1, 30_000)

CLIPS = {
    "h264.mp4": {"bframes": 3},
    "h264_one_group.mp4": {"bframes": 3, "gop": 250},
    "h264_open_groups.mp4": {"bframes": 3, "options": {"x264-params": "open-gop=1:scenecut=0"}},
    "h264_intra_refresh.mp4": {"gop": 20, "options": {"x264-params": "intra-refresh=1"}},
    "h264_all_intra.mov": {"gop": 1, "bframes": 0},
    "h264_interlaced.mp4": {"options": {"x264-params": "tff=1"}},
    "h264_sound.mp4": {"bframes": 2, "audio_seconds": 2.0},
    "h264_index_first.mp4": {"container_options": {"movflags": "faststart"}},
    "h264_fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "h264_ntsc.mp4": {"fps": Fraction(30_000, 1001)},
    "h264_uneven.mp4": {"times": UNEVEN, "time_base": TICKS, "bframes": 3},
    "h264_uneven.mkv": {"times": UNEVEN, "time_base": TICKS},
    "h264.mkv": {"bframes": 3},
    "h264.ts": {"bframes": 3},
    "h264.avi": {"bframes": 3},
    "raw.h264": {"bframes": 3},
    "hevc.mp4": {"codec": "libx265", "bframes": 3, "options": {"x265-params": "log-level=none:open-gop=0"}},
    "hevc_open_groups.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:open-gop=1"}},
    "hevc_layers.mkv": {"codec": "libx265", "options": {"x265-params": "log-level=none:temporal-layers=3"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"lag-in-frames": "16", "auto-alt-ref": "1"}},
    "vp8.webm": {"codec": "libvpx", "options": {"lag-in-frames": "16", "auto-alt-ref": "1"}},
    "mpeg4.mp4": {"codec": "mpeg4", "bframes": 2},
    "mpeg4.avi": {"codec": "mpeg4", "bframes": 2},
    "mpeg2.mpg": {"codec": "mpeg2video", "bframes": 2},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Path of a clip by name; each is written once."""
    folder = tmp_path_factory.mktemp("clips")

    def get(name: str) -> Path:
        path = folder / name
        if not path.exists():
            clips.write_clip(path, frames=FRAMES, **CLIPS[name])
        return path

    return get


def decode_everything(path: Path) -> np.ndarray:
    """All frames in presentation order by PyAV alone: uint8 (n, height, width, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


class TestTheRightFrames:
    @pytest.mark.parametrize("name", CLIPS)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"frames": 2},
            {"frames": 10},
            {"frames": FRAMES},
            {"start": 0.7, "end": 1.5},
            {"start": 1.8, "frames": 2},
        ],
        ids=str,
    )
    def test_identity_and_pixels(self, clip, name, options):
        path = clip(name)
        truth = decode_everything(path)
        assert clips.read_codes(truth) == list(range(FRAMES)), "the clip itself is not what it should be"
        frames = read_video(path, SPEC, FrameSelection(**options))
        assert clips.read_codes(frames.pixels) == frames.indices.tolist()
        assert np.array_equal(frames.pixels, truth[frames.indices])  # to the last bit: nothing was left out wrongly

    @pytest.mark.parametrize("name", [name for name in CLIPS if "uneven" not in name and "ntsc" not in name])
    def test_indices_and_times_at_a_constant_rate(self, clip, name):
        for options in ({}, {"frames": 10}, {"start": 0.7, "end": 1.5}):
            frames = read_video(clip(name), SPEC, FrameSelection(**options))
            by_rule = {"nframes": options["frames"]} if "frames" in options else options
            expected = frame_indices(FRAMES, 30, **by_rule)
            assert frames.indices.tolist() == expected.tolist()
            assert frames.seconds == pytest.approx(expected / 30)
            available = FRAMES if "start" not in options else 25  # frames 21 to 45
            assert frames.sampled_fps == pytest.approx(len(expected) / available * 30)
            assert frames.duration == pytest.approx(2.0)
            assert frames.source_size == (96, 128)

    @pytest.mark.parametrize("name", ["h264_uneven.mp4", "h264_uneven.mkv"])
    def test_real_times_at_a_variable_rate(self, clip, name):
        times = np.array(UNEVEN) / 30_000
        frames = read_video(clip(name), BY_INDEX, FrameSelection(frames=20))
        assert frames.indices.tolist() == frame_indices(FRAMES, 30, nframes=20).tolist()
        assert frames.seconds == pytest.approx(times[frames.indices], abs=0.0011)  # mkv counts milliseconds
        assert probe(clip(name)).variable_rate

    def test_a_range_in_seconds_is_real_time_at_a_variable_rate(self, clip):
        for spec in (SPEC, BY_INDEX):
            frames = read_video(clip("h264_uneven.mp4"), spec, FrameSelection(start=2.0, end=3.5))
            assert frames.seconds.min() >= 2.0  # by index at the average rate, it would begin at 1.0 s
            assert frames.seconds.max() <= 3.5
        with pytest.raises(MediaError, match=r"no frame is shown between 1\.2 s and 2\.8 s"):
            # none begins in the pause
            read_video(clip("h264_uneven.mp4"), BY_INDEX, FrameSelection(start=1.2, end=2.8))
        frames = read_video(clip("h264_uneven.mp4"), SPEC, FrameSelection(start=1.2, end=2.8))
        assert clips.read_codes(frames.pixels) == [29]  # the one that stays

    def test_ntsc_times(self, clip):
        frames = read_video(clip("h264_ntsc.mp4"), SPEC, FrameSelection(frames=4))
        assert frames.indices.tolist() == [0, 20, 39, 59]
        assert frames.seconds == pytest.approx(np.array([0, 20, 39, 59]) * 1001 / 30_000)

    def test_hidden_packets_are_no_frames(self, clip, tmp_path):
        # libvpx hides alternate reference frames; here some packets are hidden by clearing their "show" bit.
        hidden = {7, 20, 33}
        path = tmp_path / "hidden.webm"
        with av.open(str(clip("vp8.webm"))) as old, av.open(str(path), "w") as new:
            copy = new.add_stream_from_template(old.streams.video[0])
            for index, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
                data = bytearray(bytes(packet))
                data[0] &= 0xEF if index in hidden else 0xFF
                changed = av.Packet(bytes(data))
                changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
                changed.is_keyframe, changed.stream = packet.is_keyframe, copy
                new.mux(changed)
        truth = decode_everything(path)
        assert clips.read_codes(truth) == [index for index in range(FRAMES) if index not in hidden]
        frames = read_video(path, SPEC, FrameSelection(frames=20))
        assert probe(path).frames == len(truth)
        assert np.array_equal(frames.pixels, truth[frames.indices])

    @pytest.mark.parametrize(
        ("name", "can_skip"),
        [("h264.mp4", True), ("vp9.webm", True), ("hevc.mp4", True), ("hevc_layers.mkv", False), ("mjpeg.mov", False)],
    )
    def test_where_frames_can_be_skipped(self, clip, name, can_skip):
        with av.open(str(clip(name))) as container:
            assert scan(container, container.streams.video[0]).can_skip is can_skip

    def test_frames_before_an_edit_are_no_frames(self, clip, tmp_path):
        path = shift(clip("h264.mp4"), tmp_path / "trimmed.mp4", frames=-5)
        truth = decode_everything(path)
        assert clips.read_codes(truth) == list(range(5, FRAMES))
        frames = read_video(path, SPEC, FrameSelection(frames=10))
        assert np.array_equal(frames.pixels, truth[frames.indices])
        assert frames.seconds[0] == 0
        assert probe(path).frames == FRAMES - 5

    def test_a_late_start_is_second_zero(self, clip, tmp_path):
        path = shift(clip("h264.mkv"), tmp_path / "late.mkv", frames=90)
        frames = read_video(path, SPEC, FrameSelection(frames=10))
        assert frames.seconds[0] == 0
        assert clips.read_codes(frames.pixels) == frames.indices.tolist()

    def test_one_frame(self, tmp_path):
        path = clips.write_clip(tmp_path / "one.mp4", frames=1)
        frames = read_video(path, SPEC)
        assert clips.read_codes(frames.pixels) == [0]
        assert frames.seconds.tolist() == [0]
        vision = load_vision(path, SPEC)
        assert vision.grid[0] == 1
        assert vision.kind == "video"

    @pytest.mark.parametrize("frames", [2, 3, 5])
    def test_few_frames(self, tmp_path, frames):
        path = clips.write_clip(tmp_path / "few.mp4", frames=frames)
        assert clips.read_codes(read_video(path, SPEC).pixels) == frame_indices(frames, 30).tolist()

    def test_a_size_that_changes_midway(self, tmp_path):
        raw = b"".join(
            clips.write_clip(tmp_path / f"{width}.h264", size=(width, 96), frames=20).read_bytes()
            for width in (128, 192)
        )
        (tmp_path / "both.h264").write_bytes(raw)
        frames = read_video(tmp_path / "both.h264", SPEC, FrameSelection(frames=40))
        assert frames.pixels.shape == (40, 96, 128, 3)
        assert clips.read_codes(frames.pixels) == [*range(20), *range(20)]

    @pytest.mark.skipif("MLXVR_CAMERA_CLIP" not in os.environ, reason="MLXVR_CAMERA_CLIP names no clip")
    def test_a_real_camera_clip(self):
        path = Path(os.environ["MLXVR_CAMERA_CLIP"])
        with av.open(str(path)) as container:
            frames = read_video(path, SPEC, FrameSelection(frames=16))
            target = frames.pixels.shape[1:3]
            wanted = [frame for index, frame in enumerate(container.decode(video=0)) if index in set(frames.indices)]
        from mlxvr.media.resize import resize

        assert len(wanted) == 16
        for frame, pixels in zip(wanted, frames.pixels):
            assert np.array_equal(resize(frame.to_ndarray(format="rgb24"), target), pixels)


def shift(source: Path, target: Path, *, frames: int) -> Path:
    """Copy a clip's packets, shown so many frame times of 1/30 s later; negative: the first are cut by an edit list."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        ticks = round(frames / 30 / stream.time_base)
        for packet in old.demux(stream):
            if packet.size:
                packet.pts += ticks
                packet.dts = None if packet.dts is None else packet.dts + ticks
                packet.stream = copy
                new.mux(packet)
    return target


class TestWaysOfReading:
    """Which way was taken is seen in the log, and all ways give the same frames."""

    @pytest.mark.parametrize(
        ("name", "ways"), [("h264.mp4", 0), ("hevc_open_groups.mp4", 0), ("vp9.webm", 0), ("h264.mkv", 0)]
    )
    def test_healthy_files_take_the_first(self, clip, name, ways, caplog):
        with caplog.at_level(logging.INFO, logger="mlxvr"):
            read_video(clip(name), SPEC, FrameSelection(frames=10))
        assert len(caplog.records) == ways

    def test_a_jump_that_lands_elsewhere_is_noticed(self, clip, caplog, monkeypatch):
        # The plan is made to jump to packets that are no keyframes: the container goes to the keyframe before.
        real = video_module.plan_stretches

        def shifted(timeline, indices, *, parts):
            return [
                Stretch(stretch.first + 1, max(stretch.last, stretch.first + 1), stretch.frames)
                if stretch.first
                else stretch
                for stretch in real(timeline, indices, parts=parts)
            ]

        monkeypatch.setattr(video_module, "plan_stretches", shifted)
        with caplog.at_level(logging.INFO, logger="mlxvr"):
            frames = read_video(clip("h264.mp4"), SPEC, FrameSelection(frames=10))
        assert "decoding it from the start" in caplog.text
        assert clips.read_codes(frames.pixels) == frames.indices.tolist()

    def test_a_timeline_that_lies_is_noticed(self, clip, caplog, monkeypatch):
        # As if the demuxer stamped packets differently on every pass: neither of the first two ways can work.
        real = video_module.scan

        def lying(container, stream, **options):
            timeline = real(container, stream, **options)
            timeline.packet_pts[2] += 1
            return timeline

        monkeypatch.setattr(video_module, "scan", lying)
        with caplog.at_level(logging.INFO, logger="mlxvr"):
            frames = read_video(clip("h264.mp4"), SPEC, FrameSelection(frames=10))
        assert "counting its frames" in caplog.text
        assert clips.read_codes(frames.pixels) == frames.indices.tolist()

    def test_frames_that_never_come_are_an_error(self, clip, monkeypatch):
        # As if the second pass over a file without a timeline gave fewer frames than the first.
        real = video_module.count_frames

        def generous(container, stream, **options):
            timeline = real(container, stream, **options)
            longer = np.arange(FRAMES + 10) / 30
            return dataclasses.replace(timeline, seconds=longer, duration=longer[-1])

        monkeypatch.setattr(video_module, "count_frames", generous)
        with pytest.raises(MediaError, match=r"is damaged: 1 of 4 wanted frames did not come"):
            read_video(clip("h264.avi"), SPEC, FrameSelection(frames=4))

    @pytest.mark.parametrize("cores", [1, 2, 3, 8])
    def test_any_number_of_cores(self, clip, monkeypatch, cores):
        monkeypatch.setattr(video_module, "core_count", lambda: cores)
        for name in ("h264.mp4", "h264_one_group.mp4", "h264_all_intra.mov"):
            frames = read_video(clip(name), SPEC, FrameSelection(frames=20))
            assert clips.read_codes(frames.pixels) == frames.indices.tolist()

    def test_memory_bounds_the_number_of_decoders(self):
        stretches = [Stretch(100 * index, 100 * index + 99, (index,)) for index in range(16)]
        assert video_module._decoder_count(stretches, 8, 640 * 360) == 8
        assert video_module._decoder_count(stretches, 8, 3840 * 2160) == 5
        assert video_module._decoder_count(stretches, 8, 7680 * 4320) == 1
        uneven = [Stretch(0, 999, (0,)), Stretch(1000, 1010, (1,))]
        assert video_module._decoder_count(uneven, 8, 640 * 360) == 1  # one long group: threads within the decoder


class TestPlan:
    @pytest.fixture(scope="class")
    def timeline(self, tmp_path_factory):
        path = clips.write_clip(tmp_path_factory.mktemp("plan") / "plan.mp4", frames=120, gop=20, bframes=0)
        with av.open(str(path)) as container:
            timeline = scan(container, container.streams.video[0])
        assert timeline.key_positions.tolist() == [0, 20, 40, 60, 80, 100]
        return timeline

    def test_a_lone_frame_is_reached_from_its_keyframe(self, timeline):
        assert plan_stretches(timeline, [57]) == [Stretch(40, 57, (57,))]
        assert plan_stretches(timeline, [60]) == [Stretch(60, 60, (60,))]
        assert plan_stretches(timeline, [3]) == [Stretch(0, 3, (3,))]

    def test_groups_without_wanted_frames_are_left_out(self, timeline):
        assert plan_stretches(timeline, [5, 65, 70]) == [Stretch(0, 5, (5,)), Stretch(60, 70, (65, 70))]

    def test_a_gap_cheaper_than_a_jump_is_read_through(self, timeline):
        assert plan_stretches(timeline, [18, 25]) == [Stretch(0, 25, (18, 25))]  # 1 packet between
        assert plan_stretches(timeline, [10, 25]) == [Stretch(0, 10, (10,)), Stretch(20, 25, (25,))]  # 9 between

    def test_every_frame_is_one_stretch(self, timeline):
        assert plan_stretches(timeline, range(120)) == [Stretch(0, 119, tuple(range(120)))]

    def test_parts_cut_at_keyframes(self, timeline):
        stretches = plan_stretches(timeline, range(120), parts=3)
        assert len(stretches) >= 3
        assert {stretch.first for stretch in stretches} <= {0, 20, 40, 60, 80, 100}
        assert [frame for stretch in stretches for frame in stretch.frames] == list(range(120))


def turned(pixels: np.ndarray, rotation: int) -> np.ndarray:
    """Pixels as a camera stores them, that a player turns counter-clockwise by `rotation` to show them upright."""
    return np.rot90(pixels, -rotation // 90)


class TestUpright:
    @pytest.mark.parametrize("rotation", [0, 90, 180, 270])
    def test_rotated_clips(self, tmp_path, rotation):
        images = [np.ascontiguousarray(turned(clips.draw_code(index, 128, 96), rotation)) for index in range(20)]
        size = (images[0].shape[1], images[0].shape[0])
        path = clips.write_clip(tmp_path / "turned.mp4", images=images, size=size, rotation=rotation)
        frames = read_video(path, SPEC, FrameSelection(frames=6))
        assert clips.read_codes(frames.pixels) == frames.indices.tolist()
        assert frames.source_size == (96, 128)
        assert frames.pixels.shape[1:3] == (96, 128)
        info = probe(path)
        assert (info.width, info.height, info.rotation) == (128, 96, rotation)

    @pytest.mark.parametrize("rotation", [0, 90, 180, 270])
    def test_mirrored_clips(self, tmp_path, rotation):
        path = tmp_path / "mirrored.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stored = [np.ascontiguousarray(turned(clips.draw_code(k, 128, 96)[:, ::-1], rotation)) for k in range(4)]
            stream.height, stream.width = stored[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            stream.set_display_rotation(rotation, hflip=True)
            for index, pixels in enumerate(stored):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 30)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        assert clips.read_codes(read_video(path, SPEC, FrameSelection(frames=4)).pixels) == [0, 1, 2, 3]


class TestColours:
    """Flat pictures of known Y'CbCr, against the matrices of BT.601 and BT.709."""

    KR_KB = {"bt470bg": (0.299, 0.114), "bt709": (0.2126, 0.0722), "unknown": (0.299, 0.114)}  # noqa: RUF012

    @pytest.mark.parametrize("matrix", KR_KB)
    @pytest.mark.parametrize("full", [False, True])
    def test_matrix_and_range(self, tmp_path, matrix, full):
        y, cb, cr = 120, 90, 180
        options = {"color_range": "pc" if full else "tv", "qp": "1"}
        if matrix != "unknown":
            options["colorspace"] = matrix
        path = tmp_path / "flat.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=5, options=options)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for index in range(4):
                planes = np.concatenate([np.full(64 * 64, y), np.full(32 * 32, cb), np.full(32 * 32, cr)])
                frame = av.VideoFrame.from_ndarray(planes.astype(np.uint8).reshape(96, 64), format="yuv420p")
                frame.pts, frame.time_base = index, Fraction(1, 5)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        kr, kb = self.KR_KB[matrix]
        luma = y if full else (y - 16) * 255 / 219
        blue, red = ((c - 128) * (1 if full else 255 / 224) for c in (cb, cr))
        r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
        g = (luma - kr * r - kb * b) / (1 - kr - kb)
        pixels = read_video(path, SPEC, FrameSelection(frames=2)).pixels
        assert np.abs(pixels.astype(float) - np.clip([r, g, b], 0, 255)).max() <= 2


class TestProbe:
    def test_what_a_file_holds(self, clip):
        info = probe(clip("h264_sound.mp4"))
        assert (info.width, info.height, info.rotation) == (128, 96, 0)
        assert (info.fps, info.frames, info.codec, info.variable_rate) == (30.0, FRAMES, "h264", False)
        assert info.duration == pytest.approx(2.0)

    @pytest.mark.parametrize(("name", "codec"), [("hevc.mp4", "hevc"), ("vp9.webm", "vp9"), ("mpeg4.avi", "mpeg4")])
    def test_codecs(self, clip, name, codec):
        assert probe(clip(name)).codec == codec
        assert probe(clip(name)).frames == FRAMES

    def test_a_variable_rate(self, clip):
        info = probe(clip("h264_uneven.mp4"))
        assert info.fps == pytest.approx(FRAMES / info.duration)
        assert info.duration == pytest.approx(4.0, abs=0.1)


class TestListening:
    def test_progress_reaches_the_end_on_the_callers_thread(self, clip):
        seen = []
        hooks = Hooks(lambda stage, done, total: seen.append((stage, done, total, threading.get_ident())))
        read_video(clip("h264.mp4"), SPEC, FrameSelection(frames=20), hooks)
        assert seen[-1] == ("decoding", 20, 20, threading.get_ident())
        assert {entry[3] for entry in seen} == {threading.get_ident()}
        assert [entry[1] for entry in seen] == sorted(entry[1] for entry in seen)

    @pytest.mark.parametrize("name", ["h264.mp4", "h264.avi"])
    def test_stopping(self, clip, name):
        before = threading.active_count()
        with pytest.raises(Cancelled):
            read_video(clip(name), SPEC, hooks=Hooks(should_stop=lambda: True))
        assert threading.active_count() == before

    def test_stopping_midway(self, tmp_path, monkeypatch):
        monkeypatch.setattr(thread_pool, "_POLL_SECONDS", 0.001)
        path = clips.write_clip(tmp_path / "long.mp4", frames=150, size=(320, 240))
        asked = []

        def should_stop() -> bool:
            asked.append(True)
            return len(asked) > 3

        with pytest.raises(Cancelled):
            read_video(path, SPEC, FrameSelection(frames=150), Hooks(should_stop=should_stop))


def cut(path: Path, target: Path, fraction: float) -> Path:
    data = path.read_bytes()
    target.write_bytes(data[: int(len(data) * fraction)])
    return target


class TestBadFiles:
    def check(self, path: Path, *says: str, **options: object) -> str:
        with pytest.raises(MediaError) as caught:
            load_vision(path, SPEC, FrameSelection(**options))
        message = str(caught.value)
        assert "\n" not in message
        assert str(path) in message
        for part in says:
            assert part in message
        return message

    def test_missing(self, tmp_path):
        self.check(tmp_path / "none.mp4", "does not exist")

    def test_folder(self, tmp_path):
        self.check(tmp_path, "is a folder")

    def test_empty(self, tmp_path):
        path = tmp_path / "empty.mp4"
        path.touch()
        self.check(path, "is empty")

    @pytest.mark.parametrize("name", ["notes.mp4", "notes.txt", "notes.mkv"])
    def test_text(self, tmp_path, name):
        path = tmp_path / name
        path.write_text("This is not a video.\n" * 50)
        self.check(path, "is not a video", "text")

    def test_noise(self, tmp_path):
        path = tmp_path / "noise.mp4"
        path.write_bytes(np.random.default_rng(0).bytes(5000))
        self.check(path, "is not a video")

    def test_sound_only(self, tmp_path):
        self.check(clips.write_sound(tmp_path / "sound.mp4"), "sound but no moving picture")

    def test_sound_with_a_cover(self, tmp_path):
        path = clips.write_sound(tmp_path / "sound.m4a")
        with av.open(str(path)) as old, av.open(str(tmp_path / "cover.m4a"), "w", format="mp4") as new:
            sound = new.add_stream_from_template(old.streams.audio[0])
            cover = new.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(clips.draw_code(1, 64, 64), format="rgb24")
            new.mux(cover.encode(frame.reformat(format="yuvj420p")))
            new.mux(cover.encode())
            for packet in old.demux(audio=0):
                if packet.size:
                    packet.stream = sound
                    new.mux(packet)
        self.check(tmp_path / "cover.m4a", "sound but no moving picture")

    @pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
    def test_cut_mp4_without_its_index(self, clip, tmp_path, fraction):
        self.check(cut(clip("h264_sound.mp4"), tmp_path / "cut.mp4", fraction), "is cut short", "moov")

    @pytest.mark.parametrize("name", ["h264_index_first.mp4", "h264.mkv", "vp9.webm", "mpeg4.avi"])
    def test_cut_with_an_index(self, clip, tmp_path, name):
        path = cut(clip(name), tmp_path / f"cut{Path(name).suffix}", 0.7)
        message = self.check(path, "is cut short", "of the 10 wanted frames can be read", frames=10)
        readable = int(message.split(": ")[1].split(" of the")[0])
        assert 1 <= readable <= 8

    @pytest.mark.parametrize("name", ["h264_index_first.mp4", "h264.mkv", "vp9.webm", "mpeg4.avi"])
    def test_what_is_left_of_a_cut_file_can_be_read(self, clip, tmp_path, name):
        path = cut(clip(name), tmp_path / f"cut{Path(name).suffix}", 0.8)
        frames = read_video(path, SPEC, FrameSelection(end=0.3))
        assert frames.indices.tolist() == frame_indices(FRAMES, 30, end=0.3).tolist()
        assert clips.read_codes(frames.pixels) == frames.indices.tolist()

    def test_cut_fragments(self, clip, tmp_path):
        path = cut(clip("h264_fragments.mp4"), tmp_path / "cut.mp4", 0.6)
        with pytest.raises(MediaError, match="is cut short"):
            read_video(path, SPEC)

    def test_no_frames(self, tmp_path):
        path = tmp_path / "none.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            container.start_encoding()
        with pytest.raises(MediaError) as caught:
            read_video(path, SPEC)
        assert "\n" not in str(caught.value)

    def test_damaged_packets(self, clip, tmp_path):
        frames = read_video(damage(clip("h264.mp4"), tmp_path), SPEC, FrameSelection(end=0.2))  # before the damage
        assert clips.read_codes(frames.pixels) == frames.indices.tolist()

    @pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "hevc.mp4", "vp9.webm"])
    def test_into_the_damage_and_after_it(self, clip, tmp_path, name, caplog):
        """What a decoder that leaves bad packets out still gives, at the times at which it would have been shown."""
        path = damage(clip(name), tmp_path)
        pixels, stamps = [], []
        with av.open(str(path)) as container:
            for packet in container.demux(video=0):
                try:
                    for frame in packet.decode():
                        pixels.append(frame.to_ndarray(format="rgb24"))
                        stamps.append(float(frame.pts * frame.time_base))
                except av.error.InvalidDataError:
                    continue
        assert 40 < len(pixels) < FRAMES
        frames = read_video(path, BY_INDEX, FrameSelection(frames=len(pixels)))
        assert frames.seconds == pytest.approx(np.array(stamps)[frames.indices] - stamps[0], abs=1e-6)
        codes = clips.read_codes(np.stack(pixels)[frames.indices])
        # What is shown of a damaged group of pictures depends on the threads; before and after it, pictures are whole.
        whole = [place for place, code in enumerate(codes) if code in {*range(12), *range(40, 60)}]
        assert len(whole) > 25
        for place in whole:
            assert np.array_equal(frames.pixels[place], pixels[frames.indices[place]])
            assert frames.seconds[place] == pytest.approx(codes[place] / 30, abs=0.002)
        assert "damaged" in caplog.text
        assert len(caplog.records) < 5  # not one for every packet

    def test_a_packet_that_a_cut_went_through_is_no_frame(self, tmp_path):
        path = clips.write_clip(
            tmp_path / "whole.mp4", bframes=0, gop=1000, container_options={"movflags": "faststart"}
        )
        with av.open(str(path)) as container:
            ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
        cut_at = ends[30] + (ends[31] - ends[30]) // 2
        (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:cut_at])
        with av.open(str(tmp_path / "cut.mp4")) as container:
            assert len(scan(container, container.streams.video[0], is_cut=True)) == 31
        frames = read_video(tmp_path / "cut.mp4", SPEC, FrameSelection(end=1.0))
        assert clips.read_codes(frames.pixels) == [0, 10, 20, 30]

    def test_a_hopeless_ratio(self, tmp_path):
        path = clips.write_clip(tmp_path / "thin.mp4", frames=4, size=(2410, 12), codec="mpeg4")
        self.check(path, "2410x12 pixels", "200 times")

    def test_the_same_through_probe(self, tmp_path):
        for path in (tmp_path / "none.mp4", tmp_path):
            with pytest.raises(MediaError):
                probe(path)

    @pytest.mark.parametrize("name", ["list.m3u8", "list.mp4"])
    def test_a_playlist_fetches_nothing(self, tmp_path, name):
        visitors = []

        class Visited(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                visitors.append(self.client_address)

        with socketserver.TCPServer(("127.0.0.1", 0), Visited) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                path = tmp_path / name
                url = f"http://127.0.0.1:{server.server_address[1]}/a.ts"
                path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{url}\n#EXT-X-ENDLIST\n")
                with pytest.raises(MediaError):
                    read_video(path, SPEC)
            finally:
                server.shutdown()
                thread.join()
        assert not visitors


def damage(source: Path, folder: Path) -> Path:
    """A copy of a clip in which four packets in a row, the 14th to the 17th, are zeros."""
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [(packet.pos, packet.size, bytes(packet)) for packet in container.demux(video=0) if packet.size]
    for position, size, content in packets[13:17]:
        begin = data.index(content, max(0, position))  # Matroska's positions are those of blocks
        data[begin : begin + size] = bytes(size)
    path = folder / f"damaged{source.suffix}"
    path.write_bytes(data)
    return path


class TestBadOptions:
    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"start": 1.0, "end": 1.0}, ConfigError),
            ({"start": 1.5, "end": 0.5}, ConfigError),
            ({"start": -1.0}, ConfigError),
            ({"start": 50.0}, MediaError),
            ({"frames": 0}, ConfigError),
            ({"frames": -2}, ConfigError),
        ],
    )
    @pytest.mark.parametrize("name", ["h264.mp4", "h264_uneven.mp4", "h264.avi"])
    def test_one_clear_line(self, clip, name, options, error):
        with pytest.raises(error) as caught:
            read_video(clip(name), SPEC, FrameSelection(**options))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["h264.mp4", "h264_uneven.mp4", "h264.avi"])
    def test_more_frames_than_there_are_give_all_and_a_warning(self, clip, name, caplog):
        frames = read_video(clip(name), BY_INDEX, FrameSelection(frames=1000))
        assert clips.read_codes(frames.pixels) == list(range(FRAMES))
        assert "1000 frames were asked for, and there are 60" in caplog.text

    def test_frames_that_do_not_fit_in_memory_are_refused_before_decoding(self, clip, monkeypatch):
        def decode(*_: object) -> None:
            raise AssertionError("decoded")

        monkeypatch.setattr(video_module, "_run", decode)
        monkeypatch.setattr(video_module.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 512}.__getitem__)
        spec = SPEC.with_overrides(fps=1e6, max_frames=10**6)
        # 60 frames of 128 x 96 pixels, as pixels and as patches: 60 * 128 * 96 * 3 * 2 = 4.4 MB of 2.1
        with pytest.raises(ConfigError, match=r"60 frames of 128x96 pixels need 0\.0 GB, and this machine has 0\.0 GB"):
            read_video(clip("h264.mp4"), spec)

    def test_more_tokens_than_any_model_reads_are_refused_before_decoding(self, clip, monkeypatch):
        def decode(*_: object) -> None:
            raise AssertionError("decoded")

        monkeypatch.setattr(video_module, "_run", decode)
        monkeypatch.setattr(video_module, "_MOST_TOKENS", 300)
        spec = SPEC.with_overrides(fps=1e6, max_frames=10**6)
        # 30 pairs of 4 x 3 tokens
        with pytest.raises(
            ConfigError, match=r"60 frames of 128x96 pixels make 360 tokens, and no model reads more"
        ) as e:
            read_video(clip("h264.mp4"), spec)
        assert "lower fps or max_frames (--fps, --max-frames)" in str(e.value)

    @pytest.mark.parametrize("fps", [0, -1, 0.0, math.nan, math.inf, -math.inf])
    def test_rates_that_are_none(self, fps):
        with pytest.raises(ConfigError, match="give a positive number of frames per second"):
            SPEC.with_overrides(fps=fps)


class TestFramesAsVideo:
    def codes(self, count: int) -> list[np.ndarray]:
        return [clips.draw_code(index, 128, 96) for index in range(count)]

    def test_a_stack_and_a_list_are_the_same(self):
        stacked = load_vision(np.stack(self.codes(6)), SPEC)
        listed = load_vision(self.codes(6), SPEC)
        assert stacked.kind == listed.kind == "video"
        assert np.array_equal(stacked.patches, listed.patches)
        assert listed.grid == (3, 6, 8)
        assert listed.seconds == (0.25, 1.25, 2.25)  # at 2 frames per second
        assert listed.second_per_grid == 1.0

    def test_every_frame_is_used_and_an_odd_last_one_repeated(self):
        frames = read_frames(self.codes(5), SPEC)
        assert frames.indices.tolist() == [0, 1, 2, 3, 4]
        vision = load_vision(self.codes(5), SPEC)
        assert vision.grid[0] == 3
        assert vision.seconds == (0.25, 1.25, 2.0)

    def test_the_rate_is_the_specs(self):
        vision = load_vision(self.codes(4), SPEC.with_overrides(fps=4.0))
        assert vision.seconds == (0.125, 0.625)
        assert vision.second_per_grid == 0.5

    def test_more_than_max_frames_are_sampled(self):
        frames = read_frames(self.codes(20), SPEC.with_overrides(max_frames=4))
        assert frames.indices.tolist() == [0, 6, 13, 19]
        assert clips.read_codes(frames.pixels) == [0, 6, 13, 19]
        assert frames.sampled_fps == pytest.approx(4 / 20 * 2)

    def test_options_apply(self):
        assert read_frames(self.codes(20), SPEC, FrameSelection(frames=4)).indices.tolist() == [0, 6, 13, 19]
        assert read_frames(self.codes(20), SPEC, FrameSelection(start=2.0, end=3.0)).indices.tolist() == [4, 5, 6]

    def test_an_odd_one_out_is_named(self):
        pictures = self.codes(6)
        pictures[3] = clips.draw_code(3, 96, 96)
        with pytest.raises(MediaError, match=r"frame 3 has 96x96 pixels, but frame 0 has 128x96"):
            load_vision(pictures, SPEC)

    def test_paths(self, tmp_path):
        from PIL import Image

        paths = []
        for index, pixels in enumerate(self.codes(4)):
            paths.append(tmp_path / f"{index}.png")
            Image.fromarray(pixels).save(paths[-1])
        assert np.array_equal(load_vision(paths, SPEC).patches, load_vision(self.codes(4), SPEC).patches)
        paths[2] = tmp_path / "none.png"
        with pytest.raises(MediaError, match="does not exist"):
            load_vision(paths, SPEC)

    def test_nothing(self):
        for nothing in ([], np.zeros((0, 96, 128, 3), np.uint8)):
            with pytest.raises(MediaError, match="no frames"):
                load_vision(nothing, SPEC)

    def test_a_video_file(self, clip):
        vision = load_vision(clip("h264.mp4"), SPEC, FrameSelection(frames=4))
        assert vision.kind == "video"
        assert vision.grid == (2, 6, 8)
        assert vision.seconds == pytest.approx(((0 + 20) / 60, (39 + 59) / 60))
        assert vision.second_per_grid == pytest.approx(2 / (4 / 60 * 30))
        assert vision.token_count(2) == 2 * 3 * 4


def test_a_title_in_another_encoding_does_not_matter(tmp_path: Path) -> None:
    path = clips.write_clip(tmp_path / "clip.mkv", frames=8)
    content = path.read_bytes()
    assert b"Lavf" in content  # the name of the writing program
    path.write_bytes(content.replace(b"Lavf", b"\xff\xe9\x80Q"))  # no UTF-8
    assert clips.read_codes(read_video(path, SPEC, FrameSelection(frames=4)).pixels) == [0, 2, 5, 7]
