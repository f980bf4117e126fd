"""Which clips of a reasoner keep their keys and values, and whether a question fits into memory.

Keys and values take 147 kB a token in an 8B model: 2.4 GB for a clip of 16,384 tokens, for as long as it is open. A
`ClipCache` keeps those that were asked last, within a budget. A clip that lost its own is read again when it is asked
again, to the same answer. Before a prompt is read, what it needs is compared with what may be used: clips give way,
then the prompt goes through the model in smaller steps, and what still does not fit is refused, since the system would
end the process (see `mlxvr.model.memory_plan`).

Everything here runs on the thread of all reasoners.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol
from weakref import ref

import mlx.core as mx

from mlxvr.errors import OutOfMemoryError
from mlxvr.model import cache as kv
from mlxvr.model.memory_plan import PromptMemory, PromptSize, plan_prompt
from mlxvr.model.network import VideoModel
from mlxvr.model.prefix import Prefix
from mlxvr.model.prompt import Prompt
from mlxvr.runtime import device_memory

__all__ = ["ClipCache", "Holder"]

_LEAST_STEP = 64


class Holder(Protocol):
    """A clip: what may hold a prefix."""

    _prefix: Prefix | None


class ClipCache:
    """The clips that hold keys and values, the one asked longest ago first; holds no clip that nobody else holds.

    Attributes:
        limit: bytes that MLX may use in this process.
        budget: bytes that keys and values of all clips may take together; one clip alone may take more.
    """

    def __init__(self, limit: int, budget: int):
        self.limit, self.budget = limit, budget
        self._clips: list[ref[Any]] = []

    def touch(self, clip: Holder) -> None:
        """Note that a clip was asked just now, and let others go while all together are above the budget."""
        self._clips = [known for known in self._clips if known() not in (None, clip)] + [ref(clip)]
        self._shrink(clip, self.budget - _held(clip))

    def clear(self) -> None:
        """Let all keys and values go."""
        for clip in self._holding():
            clip._prefix = None
        self._clips.clear()

    def make_room(
        self,
        clip: Holder,
        network: VideoModel,
        prompt: Prompt,
        *,
        answer_tokens: int,
        step_size: int,
        kv_bits: int | None,
    ) -> int:
        """Make room for a question; the step size with which its prompt is read.

        Raises `OutOfMemoryError` when it does not fit, with the numbers and the smallest change that would help.
        """
        need = _Need.of(clip, network, prompt, answer_tokens, step_size, kv_bits)
        own = _held(clip)
        self._shrink(clip, self.budget - need.plan.keys_values)
        if mx.get_active_memory() - own + need.plan.peak > self.limit:
            device_memory.free_unused()
        for evicted in self._others(clip):
            if mx.get_active_memory() - own + need.plan.peak <= self.limit:
                break
            evicted._prefix = None
            device_memory.clear_cache()
        free = self.limit - mx.get_active_memory() + own
        while need.plan.peak > free and need.size.step_size > _LEAST_STEP:
            need = need.changed(step_size=max(_LEAST_STEP, need.size.step_size // 2))
        if need.plan.peak > free:
            raise OutOfMemoryError(need.refusal(free, self.limit))
        return need.size.step_size

    def _shrink(self, clip: Holder, room: int) -> None:
        """Let clips other than `clip` go, the one asked longest ago first, until the rest takes at most `room`."""
        others = list(self._others(clip))
        total = sum(map(_held, others))
        is_above = total > room
        for evicted in others:
            if total <= room:
                break
            total -= _held(evicted)
            evicted._prefix = None
        if is_above:
            device_memory.clear_cache()

    def _others(self, clip: Holder) -> Iterator[Holder]:
        return (known for known in list(self._holding()) if known is not clip)

    def _holding(self) -> Iterator[Holder]:
        for known in self._clips:
            clip = known()
            if clip is not None and clip._prefix is not None:
                yield clip


@dataclasses.dataclass(frozen=True)
class _Need:
    """What a question needs: the arguments of `plan_prompt`, and its result."""

    config: Mapping[str, Any]
    size: PromptSize
    plan: PromptMemory

    @classmethod
    def of(
        cls,
        clip: Holder,
        network: VideoModel,
        prompt: Prompt,
        answer_tokens: int,
        step_size: int,
        kv_bits: int | None,
    ) -> "_Need":
        prefix = clip._prefix
        size = PromptSize(
            prompt_tokens=len(prompt.ids),
            answer_tokens=answer_tokens,
            grids=[medium.grid for medium in prompt.media] if prefix is None else [],
            held_tokens=0 if prefix is None else prefix.length,
            step_size=step_size,
            itemsize=network.dtype.size,
            kv_bits=kv_bits,
            is_fused=device_memory.backend() != "cpu",
        )
        return cls(network.config, size, plan_prompt(network.config, size))

    def changed(self, **changes: Any) -> "_Need":
        size = dataclasses.replace(self.size, **changes)
        return _Need(self.config, size, plan_prompt(self.config, size))

    def refusal(self, free: int, limit: int) -> str:
        """What is needed, what there is, and what would help."""
        plan = self.plan
        parts = f"{_gb(plan.keys_values)} of keys and values"
        if plan.vision > plan.keys_values + plan.prefill:
            parts = f"{_gb(plan.vision)} to look at the frames"
        return (
            f"this question needs about {_gb(plan.peak)} beside what is loaded ({parts}), and {_gb(max(0, free))} of "
            f"{_gb(limit)} are free: {self._help(free)}"
        )

    def _help(self, free: int) -> str:
        """The smallest change that would make it fit."""
        answer, tokens = self.size.answer_tokens, self.size.prompt_tokens
        media = sum(math.prod(grid) for grid in self.size.grids)
        media //= self.config["vision_config"]["spatial_merge_size"] ** 2
        changes: list[tuple[str, dict[str, Any]]] = []
        changes += [(f"use max_tokens={count}", {"answer_tokens": count}) for count in (1024, 256) if count < answer]
        if self.size.kv_bits is None:
            changes += [(f"load the model with kv_bits={bits}", {"kv_bits": bits}) for bits in (8, 4)]
        short = {"answer_tokens": min(answer, 1024)}
        for share in (0.75, 0.5, 0.25, 0.1):
            fewer = {
                **short,
                "prompt_tokens": tokens - media + int(share * media),
                "grids": [_fewer_rows(grid, share) for grid in self.size.grids],
            }
            changes.append((f"open the clip with video_tokens={int(share * media) // 16 * 16}", fewer))
        for text, options in changes:
            if media == 0 and "grids" in options:
                continue
            try:
                if self.changed(**options).plan.peak <= free:
                    return text
            except Exception:  # kv_bits that this model cannot do
                continue
        return "use a model of fewer bits per weight, or close other programs and models"


def _fewer_rows(grid: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    return (max(1, int(grid[0] * share)), *grid[1:]) if grid[0] > 1 else (1, max(2, int(grid[1] * share)), grid[2])


def _held(clip: Holder) -> int:
    return 0 if clip._prefix is None else kv.nbytes(clip._prefix.cache)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
