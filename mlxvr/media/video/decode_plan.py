"""Which stretches of a stream to decode so that the wanted frames come out, at the least cost.

A frame can be decoded from any keyframe shown before it (or at its time) onwards; everything stored between
the two has to be decoded with it, except frames that no other frame refers to. So the cost of a plan is the
number of packets in its stretches, plus the cost of every jump. Reading the whole file in order is simply the
plan with one stretch. Costs are additive along the file, therefore joining two neighbouring stretches exactly
where the gap between them is cheaper than a jump is optimal.

Stretches are independent, so several decoders can work on them at once, which keeps more cores busy than
several threads in one decoder: those must wait for each other's reference frames, and their pipeline drains
at every jump. For that, `parts` asks for at least so many stretches of similar cost, where there are
keyframes enough to cut at.

Starting from the last keyframe *shown* before a frame, not the last one *stored* before it, keeps open groups
of pictures right: there, frames stored after a keyframe but shown before it refer to the group before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxvr.media.video.timeline import Timeline

__all__ = ["JUMP_COST", "Stretch", "plan_stretches", "whole_stretch"]

JUMP_COST = 4  # packets that could be decoded in the time of a jump


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


def plan_stretches(timeline: Timeline, indices: Sequence[int] | np.ndarray, *, parts: int = 1) -> list[Stretch]:
    """The cheapest stretches that hold the frames `indices`, in the order of the file, about `parts` or more."""
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
    """One stretch from the start of the timeline to the last wanted frame."""
    frames = tuple(sorted({int(index) for index in indices}))
    return Stretch(0, int(timeline.positions[list(frames)].max()), frames)
