"""Which stretches of a stream to decode so that the wanted frames come out, at the least cost.

A frame can be decoded from any keyframe shown before it (or at its time) onwards; everything stored between
the two has to be decoded with it, except frames that no other frame refers to. So the cost of a plan is the
number of packets in its stretches, plus the cost of every jump: the decoder's pipeline empties and fills
again. Reading the whole file in order is simply the plan with one stretch. Costs are additive along the file,
therefore joining two neighbouring stretches exactly where the gap between them is cheaper than a jump is
optimal.

Starting from the last keyframe *shown* before a frame, not the last one *stored* before it, keeps open groups
of pictures right: there, frames stored after a keyframe but shown before it refer to the group before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxvr.media.timeline import Timeline

__all__ = ["JUMP_COST", "Stretch", "plan_stretches", "whole_stretch"]

JUMP_COST = 8  # packets; measured: joining pays for gaps well below a group of pictures


@dataclass(frozen=True)
class Stretch:
    """Packets `first` to `last` in the order of decoding, both included, and the frames that they are read for."""

    first: int
    last: int
    frames: tuple[int, ...]  # indices in presentation order, ascending

    @property
    def cost(self) -> int:
        """Packets to read, and the jump to the first."""
        return self.last - self.first + 1 + (JUMP_COST if self.first else 0)


def plan_stretches(timeline: Timeline, indices: Sequence[int] | np.ndarray) -> list[Stretch]:
    """The cheapest stretches that hold the frames `indices`, in the order of the file."""
    groups: dict[int, list[int]] = {}  # keyframe -> frames decoded from it
    for index in sorted(int(index) for index in indices):
        key = int(np.searchsorted(timeline.key_pts, timeline.pts[index], side="right")) - 1
        groups.setdefault(max(0, key), []).append(index)
    stretches: list[Stretch] = []
    for key, frames in sorted(groups.items()):
        first = int(timeline.key_positions[key])
        last = int(timeline.positions[frames].max())
        read = stretches[-1].last + 1 if stretches else 0  # packets up to here are read anyway
        if first - read > JUMP_COST:
            stretches.append(Stretch(first, last, tuple(frames)))
        elif stretches:
            before = stretches[-1]
            stretches[-1] = Stretch(before.first, max(before.last, last), before.frames + tuple(frames))
        else:
            stretches.append(Stretch(0, last, tuple(frames)))
    return stretches


def whole_stretch(timeline: Timeline, indices: Sequence[int] | np.ndarray) -> Stretch:
    """One stretch from the start of the file to the last wanted frame."""
    frames = tuple(sorted(int(index) for index in indices))
    return Stretch(0, int(timeline.positions[list(frames)].max()), frames)
