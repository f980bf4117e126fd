"""The timeline of a range of a long file, without reading the rest of it.

`timeline.scan` reads every packet, all bytes of the file: minutes for a recording of a day. For a range it is enough to
read the file's first frames (where its clock starts), its last ones (where it ends), and from the keyframe before the
range to a few frames behind it. Places of frames are times on the file's clock then, which are those of a full scan
where the rate is constant; where it varies in the range, times decide there, too (`selection`).

Measured: 30 s of 8 hours at 30 frames per second (H.264, 128 MB), on two x86 cores, with decoding: Matroska 0.3 s and
1.6 MB read instead of 14.7 s and 127 MB, mp4 1.2 s and 26 MB (its index, twice) instead of 13.7 s and 145 MB.

Whether the rest of the file keeps to the same clock cannot be seen from here. So anything that leaves room for doubt
gives no timeline, and the caller scans the whole: clocks that may jump (transport streams), headers that state two
rates that both fit, a header's count of frames that the clock does not confirm, ends or ranges off the grid.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mlxvr.errors import Cancelled
from mlxvr.media.video.timeline import CHECK_EVERY, PacketTable, Timeline, stated_rates
from mlxvr.media.video.timestamps import MAX_REORDERING, is_far_out, may_jump, start_offset
from mlxvr.runtime.hooks import ShouldStop

__all__ = ["scan_range"]

_HEAD = 4 * MAX_REORDERING  # packets of the start of the file
_MOST_TAIL = 20_000  # packets after the last keyframe; beyond, looking at the end costs as much as a scan
_BESIDE = 2  # frames before the range, and behind it, that `selection` looks at
_MARGIN = 2 * _BESIDE  # frame times that are read there
_ON_GRID = 0.1  # of a frame time, what rounding of stamps to milliseconds may take a frame off its place
_REAL_PAUSE = 3.0  # usual steps: no constant rate has a longer one, however its stamps jitter
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

    Returns None if the range cannot be told from the whole with certainty. The container must be at its start; where
    it is left is open. Raises `Cancelled` if `should_stop` said so.
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
    if high is not None and pts[positions[-1]] > high:  # of the last ones, some may follow that were not read
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
    return table.timeline(positions, times, rates[0], True, duration, offset, is_part=True)


class _Checked:
    """Passes packets on, and asks `should_stop` now and then."""

    def __init__(self, should_stop: ShouldStop | None) -> None:
        self._should_stop = should_stop

    def __call__(self, packets: Iterator[Any]) -> Iterator[Any]:
        for number, packet in enumerate(packets):
            if self._should_stop is not None and number % CHECK_EVERY == 0 and self._should_stop():
                raise Cancelled("stopped while the video's index was read")
            yield packet


def _read_end(container: Any, stream: Any, check: _Checked) -> tuple[np.ndarray, int] | None:
    """(stamps of the last shown frames, ascending, and the last one's duration in ticks), or None."""
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
    """Packets from the last keyframe shown at `low` or before, to those that no frame up to `high` can follow."""
    back = 0.0
    for _ in range(_JUMPS_BACK):
        container.seek(low - int(back / float(stream.time_base)), stream=stream)
        table, behind = PacketTable(container, stream), 0
        for packet in check(container.demux(stream)):
            if not packet.size:
                break
            if packet.is_keyframe and packet.pts is not None and packet.pts <= low:
                table = PacketTable(container, stream)  # a later start will do
            elif not len(table):
                break  # landed too late, or on no keyframe
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
    """The rate at which every place has a frame; None if there is none, or if there are several."""
    steady = {rate for rate in rates if np.all(np.diff(np.rint(times * rate)) == 1)}
    return steady.pop() if len(steady) == 1 else None


def _has_pause(times: np.ndarray) -> bool:
    """Whether the rate varies for certain: a scan of the whole could find a rate of its own, but not over a pause."""
    steps = np.diff(times)
    return bool(steps.max() > _REAL_PAUSE * np.median(steps))


def _fits(stream: Any, times: np.ndarray, last_times: np.ndarray, rate: float) -> bool:
    """Whether a scan of the whole file would see the range as it is seen here, at a constant rate."""
    places = np.concatenate([times, last_times]) * rate
    if np.abs(places - np.rint(places)).max() > _ON_GRID:
        return False
    return not stream.frames or int(np.rint(last_times[-1] * rate)) == stream.frames - 1
