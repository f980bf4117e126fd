"""Own frames: lists, arrays and folders of pictures, at a rate or with times of their own."""

import logging

import numpy as np
import pytest
from PIL import Image

from mlxvr.errors import ConfigError, MediaError
from mlxvr.media import load_vision, read_frames
from mlxvr.media.frame_options import FrameSelection
from mlxvr.model.families.base import FAMILIES

SPEC = FAMILIES["qwen3_vl"].vision_spec({})


def gray(level: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, (level,) * 3)


@pytest.fixture
def folder(tmp_path):
    """Frames 1 to 12, whose level is ten times their number, and what systems and people put beside them."""
    for number in range(1, 13):
        gray(10 * number).save(tmp_path / f"{number}.png")
    for name in ("._1.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "notes.txt").write_text("taken on Monday")
    (tmp_path / "more").mkdir()
    return tmp_path


def levels(frames) -> list[int]:
    return frames.pixels[:, 0, 0, 0].tolist()


class TestFolder:
    def test_its_frames_in_natural_order_are_a_clip(self, folder):
        vision = load_vision(folder, SPEC.with_overrides(fps=4.0))
        assert vision.kind == "video"
        assert vision.grid[0] == 6
        assert vision.seconds == pytest.approx([0.125 + 0.5 * pair for pair in range(6)])
        assert vision.second_per_grid == 0.5
        first = vision.patches.reshape(6, -1, 3, 2, 256)[:, 0, 0, :, 0].reshape(-1)
        assert first.tolist() == [10 * number for number in range(1, 13)]
        assert load_vision(str(folder), SPEC.with_overrides(fps=4.0)).seconds == vision.seconds

    def test_a_range_of_it(self, folder):
        assert load_vision(folder, SPEC, FrameSelection(start=1.0, end=2.5)).seconds == (1.25, 2.25)

    @pytest.mark.parametrize(
        ("names", "says"),
        [((), "and is empty"), (("a.mp4",), "but 'a.mp4'"), (("a.mp4", "b.mp4", "._c.png"), "but 'a.mp4' and 1 more")],
    )
    def test_without_images(self, tmp_path, names, says):
        for name in names:
            (tmp_path / name).touch()
        with pytest.raises(MediaError) as caught:
            load_vision(tmp_path, SPEC)
        assert "is a folder without jpg, png or other images" in str(caught.value)
        assert says in str(caught.value)

    def test_other_sizes_are_refused_by_name(self, folder):
        gray(0, (64, 64)).save(folder / "10.png")
        with pytest.raises(MediaError) as caught:
            load_vision(folder, SPEC)
        assert f"{folder / '10.png'} has 64x64 pixels, but {folder / '1.png'} has 64x48" in str(caught.value)

    def test_a_damaged_frame_is_named(self, folder):
        (folder / "10.png").write_bytes(b"no picture")
        with pytest.raises(MediaError, match=r"10\.png is not an image"):
            load_vision(folder, SPEC)


class TestTimestamps:
    TIMES = (0.0, 0.5, 2.0, 2.25, 7.0, 10.0)

    def frames(self, **options):
        return read_frames(
            [gray(10 * index) for index in range(6)], SPEC, FrameSelection(timestamps=self.TIMES, **options)
        )

    def test_they_are_the_frames_times(self):
        frames = self.frames()
        assert frames.seconds.tolist() == list(self.TIMES)
        assert frames.sampled_fps == pytest.approx(5 / 10)  # the mean distance is 2 s
        assert frames.duration == pytest.approx(12)
        vision = load_vision([gray(0)] * 6, SPEC, FrameSelection(timestamps=self.TIMES))
        assert vision.seconds == pytest.approx((0.25, 2.125, 8.5))  # what Qwen3-VL reads before each pair
        assert vision.second_per_grid == pytest.approx(4.0)  # what Qwen2.5-VL is told

    def test_a_range_on_them(self):
        frames = self.frames(start=2.0, end=7.0)
        assert frames.seconds.tolist() == [2.0, 2.25, 7.0]
        assert levels(frames) == [20, 30, 40]
        with pytest.raises(MediaError, match="no frame is shown between 3 s and 6 s"):
            self.frames(start=3.0, end=6.0)

    def test_too_many_frames(self):
        spec = SPEC.with_overrides(max_frames=4)
        frames = read_frames([gray(10 * index) for index in range(6)], spec, FrameSelection(timestamps=self.TIMES))
        assert frames.seconds.tolist() == [0.0, 2.0, 2.25, 10.0]
        assert self.frames(frames=2).seconds.tolist() == [0.0, 10.0]

    def test_arrays_and_folders_take_them(self, folder):
        times = np.arange(12) ** 2 / 4
        assert load_vision(folder, SPEC, FrameSelection(timestamps=times)).seconds == pytest.approx(
            times.reshape(6, 2).mean(axis=1)
        )
        pixels = np.zeros((4, 48, 64, 3), np.uint8)
        assert load_vision(pixels, SPEC, FrameSelection(timestamps=[3, 4, 5, 9])).seconds == (3.5, 7.0)

    def test_a_single_frame(self):
        assert load_vision([gray(0)], SPEC, FrameSelection(timestamps=[5.0])).seconds == (5.0,)

    @pytest.mark.parametrize(
        ("times", "says"),
        [
            ([0, 1], "there are 2 timestamps for 3 frames"),
            ([0, 1, 1], "timestamp 2 is 1 s, after 1 s"),
            ([0, 2, 1.5], "timestamp 2 is 1.5 s, after 2 s"),
            ([-1, 0, 1], "timestamp 0 is -1"),
            ([0, 1, float("nan")], "timestamp 2 is nan"),
            ([0, 1, float("inf")], "timestamp 2 is inf"),
            ([0, 1, "2"], "timestamp 2 is '2'"),
            ([0, True, 2], "timestamp 1 is True"),
        ],
    )
    def test_what_is_refused(self, times, says):
        with pytest.raises(ConfigError) as caught:
            read_frames([gray(0)] * 3, SPEC, FrameSelection(timestamps=times))
        assert says in str(caught.value)

    def test_files_have_their_own(self, tmp_path):
        gray(0).save(tmp_path / "a.png")
        with pytest.raises(ConfigError, match="timestamps are for frames"):
            load_vision(tmp_path / "a.png", SPEC, FrameSelection(timestamps=[0.0]))


def test_no_frames():
    with pytest.raises(MediaError, match="there are no frames"):
        load_vision([], SPEC)
    with pytest.raises(MediaError, match="there are no frames"):
        load_vision([], SPEC, FrameSelection(timestamps=[]))


def test_a_clip_over_its_tokens_is_told(caplog):
    """8 frames of at least 16 tokens: 4 pairs take 64 tokens, whatever was asked for."""
    with caplog.at_level(logging.WARNING):
        vision = load_vision([gray(0, (640, 480))] * 8, SPEC.with_overrides(video_tokens=20))
    tokens = vision.token_count(SPEC.merge_size)
    assert tokens > 20
    assert f"the clip takes {tokens} tokens, more than the 20 of --video-tokens (video_tokens)" in caplog.text
    caplog.clear()
    load_vision([gray(0, (640, 480))] * 8, SPEC.with_overrides(video_tokens=200))
    assert caplog.text == ""
