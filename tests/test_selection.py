"""Sampling by time and by index, on timelines and on real files, against tables worked by hand."""

import clips
import numpy as np
import pytest

from mlxvr.errors import ConfigError, MediaError
from mlxvr.media import load_vision, read_video
from mlxvr.media.frame_options import FrameSelection
from mlxvr.media.sampling import frame_indices
from mlxvr.media.selection import select
from mlxvr.media.video.timeline import Timeline
from mlxvr.model.families.base import FAMILIES
from tests.test_video import TICKS

SPEC = FAMILIES["qwen3_vl"].vision_spec({}).with_overrides(frame_min_tokens=1)
BY_INDEX = SPEC.with_overrides(sample_by="index")

# A screen recording: 40 frames in 2 s, then one that stays until 20 s, then one more, shown for 0.05 s.
RECORDING = [*(k / 20 for k in range(40)), 20.0]


def timeline(seconds, *, duration=None, rates=(20.0,), offset=0.0, is_variable=True):
    seconds = np.array(seconds, dtype=float)
    none = np.empty(0, dtype=np.int64)
    duration = seconds[-1] + 0.05 if duration is None else duration
    fps = len(seconds) / duration
    return Timeline(seconds, fps, is_variable, duration, offset, rates, False, none, none, none, none, none)


class TestByTime:
    def test_a_still_is_seen_as_often_as_it_is_long(self):
        # 20.05 s at 2 frames per second -> 40 frames from 0 to 20 s, steps of 20/39 s; 0.513 s is frame 10 (0.5 s)
        chosen = select(timeline(RECORDING), SPEC)
        assert len(chosen) == 40
        assert chosen.frames.tolist() == [0, 10, 20, 30, *[39] * 35, 40]
        assert chosen.seconds == pytest.approx(np.arange(40) * 20 / 39)
        assert chosen.sampled_fps == pytest.approx(40 / 20.05)

    def test_by_index_all_but_one_come_from_the_first_seconds(self):
        chosen = select(timeline(RECORDING), BY_INDEX)
        assert len(chosen) == 40  # as many
        assert (chosen.seconds < 2).sum() == 39
        assert chosen.sampled_fps == pytest.approx(40 / 41 * 41 / 20.05)  # what second_per_grid follows from

    def test_a_last_frame_that_stays(self):
        # 4 frames in 0.2 s, the last of them shown until 8 s: 8 * 2 = 16, but there are only 4
        chosen = select(timeline([0, 0.05, 0.1, 0.15], duration=8.0), SPEC)
        assert chosen.frames.tolist() == [0, 3, 3, 3]
        assert chosen.seconds == pytest.approx(np.arange(4) * 7.95 / 3)

    def test_never_more_than_there_are_frames(self):
        slides = timeline([0, 10, 20, 30, 40, 50], duration=60.0, rates=(0.1,))
        assert select(slides, SPEC).frames.tolist() == [0, 1, 2, 3, 4, 5]
        assert select(slides, SPEC, nframes=4).frames.tolist() == [0, 1, 3, 5]  # at 0, 16.7, 33.3 and 50 s

    @pytest.mark.parametrize(
        ("start", "end", "frames", "seconds"),
        [
            (5.0, 6.0, [39], [5.0]),  # within the still
            (1.9, 5.0, [38, 39], [1.9, 5.0]),
            (19.0, None, [39, 40], [19.0, 20.0]),
            (None, 0.1, [0, 2], [0, 0.1]),  # a range of constant rate: by the training code's rule
        ],
    )
    def test_ranges(self, start, end, frames, seconds):
        chosen = select(timeline(RECORDING), SPEC, start=start, end=end)
        assert chosen.frames.tolist() == frames
        assert chosen.seconds == pytest.approx(seconds)

    def test_a_range_of_constant_rate_is_sampled_as_such_a_clip(self):
        for spec in (SPEC, BY_INDEX):
            chosen = select(timeline(RECORDING), spec, start=0.5, end=1.5)
            assert chosen.frames.tolist() == frame_indices(40, 20, start=0.5, end=1.5).tolist()
            assert chosen.seconds == pytest.approx(chosen.frames / 20)

    def test_a_start_behind_the_end(self):
        for spec in (SPEC, BY_INDEX):
            with pytest.raises(MediaError, match="give"):
                select(timeline(RECORDING), spec, start=30.0)

    def test_a_frame_that_stays_for_most_of_a_clip_is_told(self, caplog):
        select(timeline([*RECORDING[:-1], 4504.8]), SPEC)
        assert "one frame is shown for 4503 of the video's 4505 seconds" in caplog.text


class TestLateStart:
    def test_times_are_a_players(self):
        steady = timeline(np.arange(40) / 20, offset=3.0, is_variable=False)
        assert select(steady, SPEC).seconds == pytest.approx(3 + frame_indices(40, 20) / 20)
        chosen = select(steady, SPEC, start=3.5, end=4.5)
        assert chosen.frames.tolist() == frame_indices(40, 20, start=0.5, end=1.5).tolist()
        assert chosen.seconds[0] == pytest.approx(3.5)
        assert select(steady, SPEC, start=1.0, end=3.5).frames[0] == 0

    @pytest.mark.parametrize(
        ("options", "says"),
        [({"end": 2.0}, "the picture starts at 3.00 s, and end is 2 s"), ({"start": 6.0}, "the clip ends at 5.00 s")],
    )
    def test_a_range_without_a_picture(self, options, says):
        steady = timeline(np.arange(40) / 20, offset=3.0, is_variable=False, duration=2.0)
        with pytest.raises(MediaError, match=says):
            select(steady, SPEC, **options)


class TestFiles:
    @pytest.fixture(scope="class")
    def recording(self, tmp_path_factory):
        times = [round(seconds * 30_000) for seconds in RECORDING]
        path = tmp_path_factory.mktemp("recording") / "recording.mp4"
        return clips.write_clip(path, frames=len(times), times=times, time_base=TICKS)

    def test_pixels_are_those_shown_at_each_moment(self, recording):
        frames = read_video(recording, SPEC)
        assert clips.read_codes(frames.pixels) == [0, 10, 20, 30, *[39] * 35, 40]
        assert frames.duration == pytest.approx(20.05, abs=0.06)

    def test_what_each_family_is_told(self, recording):
        """By time both are told the truth: Qwen3-VL's seconds, and Qwen2.5-VL's one step for all rows."""
        by_time, by_index = (load_vision(recording, spec) for spec in (SPEC, BY_INDEX))
        assert by_time.second_per_grid == pytest.approx(by_index.second_per_grid, rel=0.01)  # 1.0 s
        assert np.diff(by_time.seconds) == pytest.approx(by_time.second_per_grid, rel=0.03)
        assert np.diff(by_index.seconds)[:-1].max() < 0.2  # and yet rows are 0.1 s apart

    def test_both_agree_at_a_constant_rate(self, tmp_path):
        path = clips.write_clip(tmp_path / "steady.mp4", frames=50, bframes=2)
        for options in ({}, {"frames": 6}, {"start": 0.3, "end": 1.1}):
            by_time, by_index = (read_video(path, spec, FrameSelection(**options)) for spec in (SPEC, BY_INDEX))
            assert np.array_equal(by_time.pixels, by_index.pixels)
            assert by_time.seconds.tolist() == by_index.seconds.tolist()
            assert by_time.sampled_fps == by_index.sampled_fps

    def test_another_word(self):
        with pytest.raises(ConfigError, match="sample_by is 'frames': choose from time, index"):
            SPEC.with_overrides(sample_by="frames")
