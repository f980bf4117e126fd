"""The model under a reasoner and its clips: a network, the thread that runs it, its settings and its memory."""

import dataclasses
import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from mlxvr.checkpoint.bundled import NOT_OF_THE_DEMO, is_bundled, is_demo
from mlxvr.checkpoint.defaults import Defaults, EffectiveSetting
from mlxvr.errors import ConfigError
from mlxvr.model.prefix import Prefix
from mlxvr.reasoner.clip_cache import ClipCache
from mlxvr.runtime import device_memory
from mlxvr.runtime.worker import Worker

if TYPE_CHECKING:
    from mlxvr.model.network import VideoModel

__all__ = ["Engine"]

logger = logging.getLogger(__name__)


class Engine:
    """A loaded model, the thread that runs it, and what its clips share.

    Attributes: see `mlxvr.reasoner.reasoner.Reasoner`, which opens clips on it.
    """

    def __init__(
        self,
        network: "VideoModel",
        worker: Worker,
        *,
        kv_bits: int | None = None,
        prefill_step_size: int = 2048,
        memory_limit: int | None = None,
    ):
        """Take over a network that was loaded on the worker's thread; `load` is the usual way in.

        `memory_limit`: bytes that MLX may use.
        """
        self.name = network.family.name
        self._network: VideoModel | None = network
        self._worker = worker
        limit = device_memory.usable_memory() if memory_limit is None else memory_limit
        self._cache = ClipCache(limit, max(0, limit - device_memory.active_memory()) // 2)
        self.kv_bits = kv_bits
        self.prefill_step_size = prefill_step_size
        assert network.folder is not None, "made by load_model"
        self._warned: set[str] = set()
        self._defaults = Defaults.of(network.folder)
        self.threshold = self._defaults.threshold
        self.task_thresholds = dict(self._defaults.task_thresholds)
        self.spec = self._defaults.spec
        self.system_prompt = self._defaults.system_prompt
        self._warns_of_demo = is_demo(network.folder.settings)

    @property
    def cache_budget(self) -> int:
        """Bytes for keys and values of all open clips."""
        return self._cache.budget

    @cache_budget.setter
    def cache_budget(self, budget: int) -> None:
        self._cache.budget = budget

    @property
    def settings(self) -> tuple[EffectiveSetting, ...]:
        """What holds where a question asks for nothing else, and where each value comes from.

        The names are "threshold", "task_thresholds", "system_prompt" and the limits of frames and tokens; `source` of
        what was set on this reasoner is "caller".
        """
        return self._defaults.settings(
            threshold=self.threshold,
            task_thresholds=self.task_thresholds,
            system_prompt=self.system_prompt,
            spec=self.spec,
        )

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, such as `Answer.token_ids`, special ones included."""
        return self._alive().tokenizer.decode(token_ids)

    def identity(self) -> dict[str, str]:
        """What answers depend on beside options: "family", "weights" (with adapter and dtype) and "system_prompt"."""
        network = self._alive()
        return {
            "family": network.family.name,
            "weights": network.fingerprint,
            "system_prompt": self.system_prompt,
        }

    def cancel(self) -> None:
        """Stop whatever runs or waits; its callers get `mlxvr.Cancelled`. The reasoner stays usable."""
        self._worker.cancel()

    def close(self) -> None:
        """Stop all work, give the memory back and end the thread. Clips of this reasoner can no longer be asked."""
        self._network = None
        self._worker.close(self._cache.clear)

    def __repr__(self) -> str:
        if self._network is None:
            return f"<Reasoner {self.name}, closed>"
        return f"<Reasoner {self.name} ({self._network.family.name}), threshold {self.threshold:g}>"

    def _warn_of_demo(self, source: object) -> None:
        """Say once that the demo model knows no real videos, where it is shown a file that may be one."""
        if self._warns_of_demo and isinstance(source, str | PathLike) and not is_bundled(source):
            self._warns_of_demo = False
            logger.warning(NOT_OF_THE_DEMO)

    def _warn_once(self, line: str) -> None:
        if line and line not in self._warned:
            self._warned.add(line)
            logger.warning("%s", line)

    def _load_prefix(self, file: Path) -> Prefix:
        """Read a saved prefix, on the thread of all reasoners."""
        return Prefix.load(file, self._alive(), self._prefix_settings(), kv_bits=self.kv_bits)

    def _prefix_settings(self) -> dict[str, object]:
        """What a clip's prefix depends on beside the model."""
        return {"system_prompt": self.system_prompt, **dataclasses.asdict(self.spec)}

    def _alive(self) -> "VideoModel":
        if self._network is None:
            raise ConfigError("this reasoner is closed: load it again with mlxvr.load(...)")
        return self._network
