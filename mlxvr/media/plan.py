"""Which stretches of a stream to decode so that the wanted frames come out, at the least cost.

A frame can be decoded from any keyframe shown before it (or at its time) onwards; everything stored between the two
has to be decoded with it, except frames that no other frame refers to. So the cost of a plan is the number of packets
in its stretches, plus the cost of every jump: the decoder's pipeline empties and fills again. Reading the whole file
in order is simply the plan with one stretch. Costs are additive along the file, therefore joining two neighbouring
stretches exactly where the gap between them is cheaper than a jump is optimal.

Starting from the last keyframe *shown* before a frame, not the last one *stored* before it, keeps open groups of
pictures right: there, frames stored after a keyframe but shown before it refer to the group before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxvr.media.timeline import Timeline

__all__ = ["JUMP_COST", "Stretch", "plan_stretches", "whole_stretch"]

JUMP_COST = 8  # packets; measured: joining pays for gaps well below a group of pictures (12 to 250 packets)


@dataclass(frozen=True)
class Stretch:
    """Packets `first` to `last` in the order of decoding, both included; `seek_pts` None starts at the file's start."""

    seek_pts: int | None
    first: int
    last: int

    @property
    def cost(self) -> int:
        """Packets to read, plus the jump."""
        return self.last - self.first + 1 + (0 if self.seek_pts is None else JUMP_COST)


def plan_stretches(timeline: Timeline, indices: Sequence[int] | np.ndarray) -> list[Stretch]:
    """The cheapest stretches that hold the frames `indices` (ascending), in the order of the file."""
    needed: dict[int, int] = {}  # keyframe -> last packet needed from it
    for index in indices:
        key = max(0, int(np.searchsorted(timeline.key_pts, timeline.pts[index], side="right")) - 1)
        needed[key] = max(needed.get(key, 0), int(timeline.positions[index]))
    stretches = [Stretch(None, 0, -1)]  # nothing yet, at the start of the file
    for key, last in sorted(needed.items()):
        first = int(timeline.key_positions[key])
        current = stretches[-1]
        if first - (current.last + 1) <= JUMP_COST:
            stretches[-1] = Stretch(current.seek_pts, current.first, max(current.last, last))
        else:
            stretches.append(Stretch(int(timeline.key_pts[key]), first, last))
    return [stretch for stretch in stretches if stretch.last >= stretch.first]


def whole_stretch(timeline: Timeline, indices: Sequence[int] | np.ndarray) -> list[Stretch]:
    """One stretch from the start of the file to the last wanted frame."""
    return [Stretch(None, 0, int(timeline.positions[np.asarray(indices)].max()))]
