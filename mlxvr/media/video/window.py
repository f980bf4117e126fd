"""Read the timeline of a range of a long file, without reading the rest of the file.

`timeline.scan` reads every packet and so all bytes of the file, which takes minutes for a recording of a day. For a
range it is enough to read the file's first frames (the start of its clock), its last ones (the end), and the stretch
from the keyframe before the range to a few frames behind it. Frames are then placed by their times on the file's clock.
At a constant rate these are the places of a full scan; if the rate varies in the range, times decide in a full scan too
(`selection`).

Measured: 30 s of 8 hours at 30 frames per second (H.264, 128 MB), on two x86 cores, with decoding: Matroska 0.3 s and
1.6 MB read instead of 14.7 s and 127 MB, mp4 1.2 s and 26 MB (its index, twice) instead of 13.7 s and 145 MB.

Nothing read here shows whether the rest of the file has the same clock. So in any doubt there is no timeline, and the
caller scans the whole file: if the clock may jump (transport streams), if two of the stated rates fit, if the clock
does not confirm the header's count of frames, or if the end or the range is off the grid.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mlxvr.errors import Cancelled
from mlxvr.media.video.packet_table import PacketTable
from mlxvr.media.video.timeline import CHECK_EVERY, Clock, Timeline, build_timeline, stated_rates
from mlxvr.media.video.timestamps import MAX_REORDERING, is_far_out, may_jump, start_offset
from mlxvr.runtime.hooks import ShouldStop

__all__ = ["scan_range"]

_HEAD = 4 * MAX_REORDERING  # packets to read at the start of the file
_MOST_TAIL = 20_000  # packets after the last keyframe; with more, reading the end costs as much as a scan
_BESIDE = 2  # frames before the range, and behind it, that `selection` checks
_MARGIN = 2 * _BESIDE  # frame times to read before and behind the range
_ON_GRID = 0.1  # frame times by which rounding stamps to milliseconds may move a frame off its place
_REAL_PAUSE = 3.0  # usual steps: a longer step occurs at no constant rate, however its stamps jitter
_JUMPS_BACK = 8


def scan_range(
    container: Any,
    stream: Any,
    *,
    start: float | None,
    end: float | None,
    should_stop: ShouldStop | None = None,
) -> Timeline | None:
    """Read the timeline of the frames from `start` to `end` (seconds on a player's clock) from their packets.

    Returns None if the range cannot be read alone with certainty. The container must be at its start, and is left
    anywhere. Raises `Cancelled` if `should_stop` returned True.
    """
    rates = stated_rates(stream)
    if not rates or may_jump(container):
        return None
    tick, check = float(stream.time_base), _Checked(should_stop)
    head = PacketTable(container, stream)
    for packet in check(container.demux(stream)):
        if not packet.size or not head.add(packet):
            return None
        if len(head) == _HEAD:
            break
    shown = head.shown_positions()
    if len(shown) <= 2 * MAX_REORDERING:
        return None
    origin = head.pts[shown[0]]
    offset = start_offset(container, stream, origin)
    ending = _read_end(container, stream, check)
    if ending is None:
        return None

    low = origin + int(((start or 0.0) - offset) / tick) - round(_MARGIN / rates[0] / tick)
    high = None if end is None else origin + int((end - offset) / tick) + round(_MARGIN / rates[0] / tick)
    table = _read_range(container, stream, max(low, origin), high, check)
    if table is None:
        return None
    pts = np.array(table.pts, dtype=np.int64)
    positions = table.shown_positions()
    positions = positions[pts[positions] >= pts[0]]  # the others belong to a group of pictures that was not read
    if high is not None and pts[positions[-1]] > high:  # frames that were not read may be shown among the last ones
        positions = positions[: len(positions) - MAX_REORDERING]
    if len(positions) < 2 or not table.is_in_order(positions) or is_far_out(pts[np.sort(positions)], tick):
        return None
    times = (pts[positions] - origin) * tick
    last_times = (ending[0] - origin) * tick
    if start is not None and low > origin and np.searchsorted(times, start - offset) < _BESIDE:
        return None
    rate = _steady_rate(times, rates)
    if not (_has_pause(times) if rate is None else _fits(stream, times, last_times, rate)):
        return None
    duration = float(last_times[-1]) + (ending[1] * tick or 1 / rates[0])
    if rate is not None:
        duration = float(np.rint(last_times[-1] * rate) + 1) / rate
    return build_timeline(stream, table, positions, Clock(times, rates[0], True, duration), offset, is_part=True)


class _Checked:
    """Passes packets on, and calls `should_stop` now and then."""

    def __init__(self, should_stop: ShouldStop | None) -> None:
        self._should_stop = should_stop

    def __call__(self, packets: Iterator[Any]) -> Iterator[Any]:
        for number, packet in enumerate(packets):
            if self._should_stop is not None and number % CHECK_EVERY == 0 and self._should_stop():
                raise Cancelled("stopped while the video's index was read")
            yield packet


def _read_end(container: Any, stream: Any, check: _Checked) -> tuple[np.ndarray, int] | None:
    """Return (stamps of the last shown frames, ascending, and the last one's duration in ticks); None in any doubt."""
    length = stream.duration or (container.duration and container.duration / 1e6 / float(stream.time_base))
    if not length:
        return None
    container.seek(int((stream.start_time or 0) + length), stream=stream)
    table = PacketTable(container, stream)
    for packet in check(container.demux(stream)):
        if packet.size and not table.add(packet):
            return None
        if len(table) > _MOST_TAIL:
            return None
    positions = table.shown_positions()
    if not len(positions):
        return None
    return np.array(table.pts, dtype=np.int64)[positions], table.durations[positions[-1]]


def _read_range(container: Any, stream: Any, low: int, high: int | None, check: _Checked) -> PacketTable | None:
    """Read packets from the last keyframe shown at or before `low`, until no frame up to `high` can follow."""
    back = 0.0
    for _ in range(_JUMPS_BACK):
        container.seek(low - int(back / float(stream.time_base)), stream=stream)
        table, behind = PacketTable(container, stream), 0
        for packet in check(container.demux(stream)):
            if not packet.size:
                break
            if packet.is_keyframe and packet.pts is not None and packet.pts <= low:
                table = PacketTable(container, stream)  # this later start is enough
            elif not len(table):
                break  # the jump landed too late, or not on a keyframe
            if not table.add(packet):
                return None
            behind += bool(high is not None and table.shown[-1] and packet.pts > high)
            if behind == MAX_REORDERING + _BESIDE:
                return table
        if len(table):
            return table
        back = 2 * back + 1.0
    return None


def _steady_rate(times: np.ndarray, rates: tuple[float, ...]) -> float | None:
    """Return the rate at which every place has a frame; None if no rate or several rates fit."""
    steady = {rate for rate in rates if np.all(np.diff(np.rint(times * rate)) == 1)}
    return steady.pop() if len(steady) == 1 else None


def _has_pause(times: np.ndarray) -> bool:
    """Return whether the rate certainly varies: a full scan could find another steady rate, but not across a pause."""
    steps = np.diff(times)
    return bool(steps.max() > _REAL_PAUSE * np.median(steps))


def _fits(stream: Any, times: np.ndarray, last_times: np.ndarray, rate: float) -> bool:
    """Return whether a scan of the whole file would place the range's frames in the same way, at a constant rate."""
    places = np.concatenate([times, last_times]) * rate
    if np.abs(places - np.rint(places)).max() > _ON_GRID:
        return False
    return not stream.frames or int(np.rint(last_times[-1] * rate)) == stream.frames - 1
