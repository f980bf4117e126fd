"""Stamps that lie, one kind at a time: numbers worked by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from mlxvr.media.video.timestamps import is_far_out, mend_times, start_offset, steady_rate

SECOND = 90_000  # ticks
STEADY = np.arange(30) * 0.5  # 2 frames per second


def changed(times, **values):
    times = np.array(times, dtype=float)
    for place, value in values.items():
        times[int(place[1:])] = value
    return times


@pytest.mark.parametrize(
    ("times", "may_jump", "expected"),
    [
        (STEADY, False, STEADY),
        (STEADY + 7, False, STEADY),  # from the first frame
        (changed(STEADY, _12=4504.8), False, STEADY),  # one stamp far out
        (changed(STEADY, _12=-4504.8), False, STEADY),
        (changed(STEADY, _12=8.1), False, STEADY),  # not so far
        (changed(STEADY, _28=4504.8), False, STEADY),  # the last but one
        (np.concatenate([STEADY[:10], STEADY[10:] + 60]), False, np.concatenate([STEADY[:10], STEADY[10:] + 60])),
        (np.concatenate([STEADY[:10], STEADY[10:] + 60]), True, STEADY),  # a transport stream's clock that jumps
        (np.concatenate([STEADY[:10], STEADY[10:] + 5]), True, np.concatenate([STEADY[:10], STEADY[10:] + 5])),
        (np.concatenate([STEADY[:10], STEADY[10:] - 95_443.7]), True, STEADY),  # a counter of 33 bits starts again
        (np.concatenate([STEADY[:10], STEADY[:20]]), True, STEADY),  # two recordings, one behind the other
        (STEADY[:1] + 3, False, STEADY[:1]),
        (np.zeros(30), False, None),
        (np.repeat(STEADY[:15], 2), False, None),  # fields with a stamp for two
        (STEADY[::-1], False, None),
    ],
)
def test_mended_times(times, may_jump, expected):
    mended = mend_times(np.asarray(times), may_jump=may_jump)
    assert mended is None if expected is None else mended == pytest.approx(expected)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (range(60), False),
        ([0, 4, 2, 1, 3, 8, 6, 5, 7, *range(9, 60)], False),  # B-frames
        ([16, *range(16), *range(17, 60)], False),  # as many ahead as a decoder may hold back
        ([17, *range(17), *range(18, 60)], True),
        ([*range(20), 5000, *range(20, 59)], True),
        ([*range(20), -5000, *range(20, 59)], True),
        ([*range(57), 5000, 57, 58], True),  # near the end, where few frames follow
        ([*range(59), 5000], False),  # the last one: a pause
        ([*range(50), *range(5000, 5010)], False),
        ([5000, *range(59)], True),
    ],
    ids=str,
)
def test_stamps_at_odds_with_the_order_of_decoding(places, expected):
    assert is_far_out(np.array(places) * SECOND // 10, 1 / SECOND) is expected


def test_a_steady_rate_lets_no_frame_be_half_a_frame_off():
    times = np.arange(40) / 30
    assert steady_rate(times, (25.0, 30.0)) == 30.0
    assert steady_rate(times + np.resize([0, 0.49 / 30], 40), (30.0,)) == 30.0
    assert steady_rate(times + np.resize([0, 0.51 / 30], 40), (30.0,)) is None
    assert steady_rate(times, ()) is None


@pytest.mark.parametrize(
    ("audio", "start_time", "first_pts", "expected"),
    [
        (["sound"], 0, 3 * SECOND, 3.0),  # the picture starts 3 s after the sound
        (["sound"], 1_400_000, int(1.48 * SECOND), 0.0),  # what ffmpeg writes into transport streams
        (["sound"], 3_000_000, 3 * SECOND, 0.0),  # both start late: a player's clock does as well
        ([], 0, 3 * SECOND, 0.0),
        (["sound"], None, 3 * SECOND, 0.0),
    ],
)
def test_where_a_players_clock_starts(audio, start_time, first_pts, expected):
    container = SimpleNamespace(streams=SimpleNamespace(audio=audio), start_time=start_time)
    assert start_offset(container, SimpleNamespace(time_base=1 / SECOND), first_pts) == pytest.approx(expected)
