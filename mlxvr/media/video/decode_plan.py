"""Plan which stretches of a stream to decode for the wanted frames, at the least cost.

A frame can be decoded from any keyframe that is shown before it or at its time. All packets stored between the two have
to be decoded as well, except frames that no other frame refers to. So the cost of a plan is the number of packets in
its stretches, plus the cost of each jump. Reading the whole file in order is the plan with one stretch. Costs are
additive along the file, so it is optimal to join two neighbouring stretches exactly if the gap between them is cheaper
than a jump.

Stretches are independent, so several decoders can work on them at once. That keeps more cores busy than several threads
in one decoder, which wait for each other's reference frames and whose pipeline drains at each jump. For that, `parts`
asks for at least so many stretches of similar cost, if there are enough keyframes to cut at.

Decoding starts from the last keyframe *shown* before a frame, not the last one *stored* before it. This is needed for
open groups of pictures, in which frames that are stored after a keyframe but shown before it refer to the group before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxvr.media.video.timeline import Timeline

__all__ = ["JUMP_COST", "Stretch", "plan_stretches", "whole_stretch"]

JUMP_COST = 4  # how many packets can be decoded in the time of a jump


@dataclass(frozen=True)
class Stretch:
    """The packets `first` to `last`, both included, in the order of decoding, and the frames wanted from them."""

    first: int
    last: int
    frames: tuple[int, ...]  # indices in presentation order, ascending

    @property
    def cost(self) -> int:
        """The number of packets to read, plus the cost of the jump to the first."""
        return self.last - self.first + 1 + (JUMP_COST if self.first else 0)


def plan_stretches(timeline: Timeline, indices: Sequence[int] | np.ndarray, *, parts: int = 1) -> list[Stretch]:
    """Return the cheapest stretches that hold the frames `indices`, in the order of the file, about `parts` or more."""
    groups: dict[int, list[int]] = {}  # keyframe -> frames decoded from it
    for index in sorted({int(index) for index in indices}):
        key = int(np.searchsorted(timeline.key_pts, timeline.pts[index], side="right")) - 1
        groups.setdefault(max(0, key), []).append(index)
    pieces = [
        Stretch(int(timeline.key_positions[key]) if key else 0, int(timeline.positions[frames].max()), tuple(frames))
        for key, frames in sorted(groups.items())
    ]
    share = sum(piece.cost for piece in pieces) / parts
    stretches = pieces[:1]
    for piece in pieces[1:]:
        before = stretches[-1]
        if piece.first - (before.last + 1) <= JUMP_COST and before.cost + piece.cost <= share:
            stretches[-1] = Stretch(before.first, max(before.last, piece.last), before.frames + piece.frames)
        else:
            stretches.append(piece)
    return stretches


def whole_stretch(timeline: Timeline, indices: Sequence[int] | np.ndarray) -> Stretch:
    """Return one stretch, from the start of the timeline to the last wanted frame."""
    frames = tuple(sorted({int(index) for index in indices}))
    return Stretch(0, int(timeline.positions[list(frames)].max()), frames)
