"""Videos that users of other programs stumbled over; `FIELD.md` says where each comes from.

Every frame shows its own number (`clips`), and the truth is a plain decode of the whole file.
"""

from fractions import Fraction

import av
import clips
import numpy as np
import pytest

from mlxvr.errors import MediaError
from mlxvr.media import load_vision, probe, read_video
from mlxvr.media.frame_options import FrameSelection
from mlxvr.model.families.base import FAMILIES

SPEC = FAMILIES["qwen3_vl"].vision_spec({}).with_overrides(frame_min_tokens=1)
FRAMES = 60
AV1 = {"codec": "libsvtav1", "size": (256, 192)}
DNXHD = {"profile": "dnxhr_sq"}


def decoded(path) -> list[int | None]:
    """The numbers that all frames show, in the order in which a decoder gives them."""
    shown = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            try:
                shown += [clips.read_code(frame.to_ndarray(format="rgb24")) for frame in packet.decode()]
            except av.error.InvalidDataError:
                continue
    return shown


def rewrite(source, target, change=lambda number, packet: packet):
    """Copy a clip's packets, each as `change(number, packet)` leaves it; None leaves it out."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            changed = change(number, packet)
            if changed is not None:
                changed.stream = stream
                new.mux(changed)
    return target


def later(seconds, *, pts_only=False):
    def change(packet):
        ticks = round(seconds / packet.time_base)
        packet.pts += ticks
        packet.dts += 0 if pts_only else ticks
        return packet

    return change


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Clips by suffix and number of B-frames; each is written once."""
    folder = tmp_path_factory.mktemp("made")

    def get(suffix: str, bframes: int = 2):
        path = folder / f"clip{bframes}.{suffix}"
        if not path.exists():
            clips.write_clip(path, frames=FRAMES, bframes=bframes)
        return path

    return get


def assert_frames_are(path, expected, *, times=None, **options):
    """Sampled frames are those of a plain decode, at the times of a clip of 30 frames per second (or `times`)."""
    frames = read_video(path, SPEC, FrameSelection(frames=10, **options))
    assert clips.read_codes(frames.pixels) == [expected[index] for index in frames.indices]
    times = np.arange(len(expected)) / 30 if times is None else times
    assert frames.seconds == pytest.approx(np.asarray(times)[frames.indices], abs=0.002)


class TestCodecs:
    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("av1.mp4", {**AV1, "options": {"svtav1-params": "preset=8"}}),
            (
                "av1_forward_keys.mkv",
                {**AV1, "options": {"svtav1-params": "preset=8:enable-fwdkf=1"}},
            ),
            ("prores.mov", {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}),
            ("alpha.webm", {"codec": "libvpx-vp9", "pix_fmt": "yuva420p"}),
            (
                "dnxhd.mov",
                {"codec": "dnxhd", "size": (256, 144), "pix_fmt": "yuv422p", "options": {"profile": "dnxhr_sq"}},
            ),
            ("lossless.mkv", {"codec": "ffv1", "pix_fmt": "yuv444p"}),
            ("odd.webm", {"codec": "libvpx-vp9", "size": (127, 95)}),
            ("odd.mp4", {"size": (127, 95), "pix_fmt": "yuv444p"}),
            ("slow_motion.mov", {"fps": 240}),
            ("time_lapse.mp4", {"fps": Fraction(1, 2)}),
        ],
    )
    def test_every_frame_is_the_right_one(self, tmp_path, name, settings):
        path = clips.write_clip(tmp_path / name, frames=40, **settings)
        expected = decoded(path)
        assert expected == list(range(40))
        assert_frames_are(path, expected, times=np.arange(40) / float(settings.get("fps", 30)))
        assert probe(path).frames == 40


class TestStamps:
    @pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
    @pytest.mark.parametrize(("bframes", "number"), [(0, 0), (0, 20), (2, 20), (0, 57), (2, 57), (2, 59)])
    def test_one_stamp_far_out(self, made, tmp_path, suffix, bframes, number, caplog):
        change = later(4495, pts_only=True)
        if (suffix, number) == ("mp4", 0):
            number = 1  # the muxer would cut off what is shown before the first packet: see below
        path = rewrite(
            made(suffix, bframes),
            tmp_path / f"far.{suffix}",
            lambda place, packet: change(packet) if place == number else packet,
        )
        assert_frames_are(path, list(range(FRAMES)))
        assert "stamps" in caplog.text

    def test_an_edit_list_that_cuts_everything_off(self, made, tmp_path):
        change = later(-5)
        path = rewrite(made("mp4"), tmp_path / "negative.mp4", lambda _, packet: change(packet))
        assert decoded(path) == []
        with pytest.raises(MediaError, match="holds no frame that can be read"):
            read_video(path, SPEC)

    def test_the_last_stamp_far_out(self, made, tmp_path, caplog):
        """By its decoding stamp it is no pause; Matroska has none, and the frame's stay is told."""
        change = later(4495, pts_only=True)
        for suffix in ("mp4", "mkv"):
            path = rewrite(
                made(suffix, 0),
                tmp_path / f"far.{suffix}",
                lambda place, packet: change(packet) if place == FRAMES - 1 else packet,
            )
            frames = read_video(path, SPEC, FrameSelection(frames=10))
            if suffix == "mp4":
                assert (
                    clips.read_codes(frames.pixels) == frames.indices.tolist() == [0, 7, 13, 20, 26, 33, 39, 46, 52, 59]
                )
                assert "far out" in caplog.text
        assert "one frame is shown for 4495 of the video's 4497 seconds" in caplog.text
        frames = read_video(path, SPEC.with_overrides(sample_by="index"), FrameSelection(frames=10))
        assert clips.read_codes(frames.pixels) == [0, 7, 13, 20, 26, 33, 39, 46, 52, 59]

    def test_a_clock_that_jumps(self, made, tmp_path):
        """In a transport stream: an hour ahead, back to the start, and where its 33 bits end."""
        change = later(3600)
        jump = rewrite(made("ts"), tmp_path / "jump.ts", lambda place, p: change(p) if place >= 30 else p)
        assert_frames_are(jump, decoded(jump))
        (tmp_path / "twice.ts").write_bytes(made("ts").read_bytes() * 2)
        assert_frames_are(tmp_path / "twice.ts", [*range(FRAMES)] * 2)
        wrap = later(2**33 / 90_000 - 2.4)
        assert_frames_are(rewrite(made("mp4"), tmp_path / "wrap.ts", lambda _, p: wrap(p)), list(range(FRAMES)))

    def test_an_hour_of_a_still_is_no_jump_in_other_files(self, made, tmp_path):
        change = later(3600)
        path = rewrite(made("mp4", 0), tmp_path / "still.mp4", lambda place, p: change(p) if place >= 30 else p)
        frames = read_video(path, SPEC, FrameSelection(frames=10))
        assert clips.read_codes(frames.pixels) == [0, *[29] * 8, 59]
        assert frames.seconds == pytest.approx(np.linspace(0, 3600 + 59 / 30, 10), abs=0.002)

    @pytest.mark.parametrize("suffix", ["mkv", "ts"])
    def test_negative_stamps(self, made, tmp_path, suffix):
        change = later(-5)
        path = rewrite(made("mp4"), tmp_path / f"negative.{suffix}", lambda _, packet: change(packet))
        assert_frames_are(path, list(range(FRAMES)))

    def test_packets_without_a_duration(self, made, tmp_path):
        def change(_, packet):
            packet.duration = 0
            return packet

        assert_frames_are(rewrite(made("mp4"), tmp_path / "zero.mkv", change), list(range(FRAMES)))

    @pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.mov", "late.ts"])
    def test_a_picture_that_starts_after_the_sound(self, tmp_path, name):
        """3 s after it: times, --start and --end are a player's, as FFmpeg's own are."""
        times = [90 + k for k in range(FRAMES)]
        path = clips.write_clip(tmp_path / name, frames=FRAMES, times=times, audio_seconds=5.0, bframes=0)
        with av.open(str(path)) as container:
            first = next(container.decode(video=0))
            player = float(first.pts * first.time_base) - container.start_time / 1e6
        assert player == pytest.approx(3.0, abs=0.05)
        frames = read_video(path, SPEC, FrameSelection(frames=10))
        assert frames.seconds == pytest.approx(player + frames.indices / 30, abs=1e-3)
        part = read_video(path, SPEC, FrameSelection(start=4.0, end=4.5))
        assert clips.read_codes(part.pixels)[0] == pytest.approx((4.0 - player) * 30, abs=1)
        assert part.seconds.min() >= 4.0
        assert part.seconds.max() <= 4.5
        assert load_vision(path, SPEC, FrameSelection(frames=2)).seconds == pytest.approx([player + 59 / 60], abs=1e-3)
        with pytest.raises(MediaError, match="the picture starts at"):
            read_video(path, SPEC, FrameSelection(end=2.0))

    def test_sound_that_starts_a_little_earlier_does_not_count(self, tmp_path):
        times = [2 + k for k in range(FRAMES)]  # 67 ms
        path = clips.write_clip(tmp_path / "usual.mkv", frames=FRAMES, times=times, audio_seconds=2.0, bframes=0)
        assert_frames_are(path, list(range(FRAMES)))


class TestBeginnings:
    @pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
    def test_the_first_frame_is_no_keyframe(self, made, tmp_path, suffix):
        """A recording that was joined midway: what cannot be decoded is not shown, by no player."""
        path = rewrite(made(suffix), tmp_path / f"joined.{suffix}", lambda place, p: None if place < 5 else p)
        expected = decoded(path)
        assert expected[-1] == FRAMES - 1
        assert 40 < len(expected) < FRAMES
        assert_frames_are(path, expected)

    def test_the_first_pictures_refer_to_what_was_cut_off(self, tmp_path):
        """HEVC's open groups (RASL pictures), as phones' editors cut them."""
        options = {"x265-params": "log-level=none:open-gop=1:keyint=12"}
        whole = clips.write_clip(tmp_path / "whole.mkv", frames=FRAMES, codec="libx265", options=options, bframes=3)
        keys = []
        rewrite(
            whole, tmp_path / "cut.mkv", lambda place, p: (keys.append(p.is_keyframe), p if sum(keys) > 1 else None)[1]
        )
        expected = decoded(tmp_path / "cut.mkv")
        assert 40 < len(expected) < FRAMES
        assert_frames_are(tmp_path / "cut.mkv", expected)

    def test_a_transport_stream_cut_anywhere(self, made, tmp_path):
        data = made("ts").read_bytes()
        for begin in (188 * 20, 1000):
            (tmp_path / "cut.ts").write_bytes(data[begin:])
            assert_frames_are(tmp_path / "cut.ts", decoded(tmp_path / "cut.ts"))


class TestEndings:
    @pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
    def test_zeros_at_the_end(self, made, tmp_path, suffix):
        """A download into a file of its full size."""
        path = tmp_path / f"padded.{suffix}"
        path.write_bytes(made(suffix).read_bytes() + bytes(10_000))
        assert_frames_are(path, list(range(FRAMES)))

    def test_a_recording_that_still_runs(self, made, tmp_path):
        """mp4: its index comes last. Matroska, live: what is there is read."""
        data = made("mp4").read_bytes()
        (tmp_path / "running.mp4").write_bytes(data[: data.rfind(b"moov") - 4])
        with pytest.raises(MediaError, match="its index \\(moov\\) is missing"):
            read_video(tmp_path / "running.mp4", SPEC)
        live = clips.write_clip(tmp_path / "live.mkv", frames=FRAMES, container_options={"live": "1"})
        (tmp_path / "running.mkv").write_bytes(live.read_bytes()[: int(live.stat().st_size * 0.6)])
        expected = decoded(tmp_path / "running.mkv")
        assert 10 < len(expected) < FRAMES
        frames = read_video(tmp_path / "running.mkv", SPEC, FrameSelection(end=0.5))
        assert clips.read_codes(frames.pixels) == [expected[index] for index in frames.indices]

    @pytest.mark.parametrize("what", ["gone", "zeros"])
    def test_an_avi_without_its_index(self, tmp_path, what):
        path = clips.write_clip(tmp_path / "clip.avi", frames=FRAMES, codec="mpeg4", bframes=0)
        data = bytearray(path.read_bytes())
        begin = data.rfind(b"idx1")
        if what == "gone":
            del data[begin:]
        else:
            data[begin + 8 :] = bytes(len(data) - begin - 8)
        path.write_bytes(data)
        if what == "gone":  # the file is shorter than it says: told, and read up to there
            assert clips.read_codes(read_video(path, SPEC, FrameSelection(end=0.5)).pixels) == [0, 5, 10, 15]
        else:
            assert_frames_are(path, list(range(FRAMES)))


class TestTracks:
    def test_a_cover_before_the_video(self, made, tmp_path):
        """As music shops and podcasts write them: the cover is a track of one picture."""
        path = tmp_path / "cover.mp4"
        with av.open(str(made("mp4"))) as old, av.open(str(path), "w") as new:
            cover = new.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 640, 480, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            stream = new.add_stream_from_template(old.streams.video[0])
            frame = av.VideoFrame.from_ndarray(clips.draw_code(999, 640, 480), format="rgb24")
            new.mux(cover.encode(frame.reformat(format="yuvj420p")))
            new.mux(cover.encode())
            for packet in old.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    new.mux(packet)
        frames = read_video(path, SPEC, FrameSelection(frames=10))
        assert clips.read_codes(frames.pixels) == frames.indices.tolist()

    @pytest.mark.parametrize("suffix", ["mp4", "mkv"])
    def test_the_track_that_is_shown_by_default(self, made, tmp_path, suffix):
        """Two cameras in a file: the one marked default, as players take it, though the other is no smaller."""
        path = tmp_path / f"two.{suffix}"
        with av.open(str(path), "w") as new:
            streams = []
            for default in (False, True):
                stream = new.add_stream("libx264", rate=30)
                stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
                stream.disposition = av.stream.Disposition.default if default else av.stream.Disposition(0)
                streams.append(stream)
            for index in range(20):
                for number, stream in enumerate(streams):
                    pixels = clips.draw_code(index + 1000 * (1 - number), 128, 96)
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    frame.pts, frame.time_base = index, Fraction(1, 30)
                    new.mux(stream.encode(frame))
            for stream in streams:
                new.mux(stream.encode())
        frames = read_video(path, SPEC, FrameSelection(frames=10))
        assert clips.read_codes(frames.pixels) == frames.indices.tolist()

    def test_data_beside_the_video(self, made, tmp_path):
        """Telemetry and timed metadata, as cameras and streaming services write it."""
        path = tmp_path / "telemetry.ts"
        with av.open(str(made("ts"))) as old, av.open(str(path), "w") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            data = new.add_data_stream("klv")
            for number, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
                note = av.Packet(b"position %d" % number)
                note.pts = note.dts = packet.dts
                note.time_base, note.stream = packet.time_base, data
                packet.stream = stream
                new.mux(packet)
                new.mux(note)
        with av.open(str(path)) as container:
            assert len(container.streams) == 2
        assert_frames_are(path, list(range(FRAMES)))

    def test_a_size_that_changes_midway_in_a_stream(self, tmp_path):
        """Streaming services switch quality: all frames get the first one's size."""
        parts = [
            clips.write_clip(tmp_path / f"{width}.ts", size=(width, 96), frames=20, bframes=0) for width in (128, 192)
        ]
        (tmp_path / "switch.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
        frames = read_video(tmp_path / "switch.ts", SPEC, FrameSelection(frames=40))
        assert frames.pixels.shape == (40, 96, 128, 3)
        assert clips.read_codes(frames.pixels) == [*range(20), *range(20)]
