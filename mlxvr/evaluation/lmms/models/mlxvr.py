"""The model as lmms-eval sees it: its base class, its requests, its token counts.

The one module that imports lmms-eval, and through it torch; only lmms-eval imports it. Written against lmms-eval 0.7.
It implements the "simple" one of the two interfaces, a prompt and its media: a plugin that `LMMS_EVAL_PLUGINS` names
can only offer that, and a clip is one video anyway.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from mlxvr.cli.settings import part_of
from mlxvr.errors import ConfigError
from mlxvr.evaluation.lmms.answering import LmmsRequest, Response, answer_all, open_log
from mlxvr.evaluation.lmms.options import LmmsOptions
from mlxvr.evaluation.samples import SampleWriter
from mlxvr.model.prompt import evaluation_copy
from mlxvr.reasoner.load_options import LoadOptions
from mlxvr.reasoner.reasoner import Reasoner, load_with

__all__ = ["Mlxvr"]

_PROCESSES = "WORLD_SIZE"  # how lmms-eval knows it
_REQUEST = "generate_until"


class Mlxvr(lmms):
    """Think once, answer twice, on MLX; the arguments are the fields of `LmmsOptions`."""

    is_simple = True

    def __init__(
        self,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **arguments: Any,
    ) -> None:
        """Load the model.

        Args:
            batch_size: 1, or "auto"; questions are answered one by one.
            max_batch_size, device: taken because lmms-eval hands them over; MLX has one device.
            arguments: the model arguments; see `LmmsOptions`.

        Raises:
            ConfigError: an argument is unknown or has a value that cannot be used.
            CheckpointError: the model cannot be found or loaded.
        """
        super().__init__()
        self.options = LmmsOptions.from_arguments(arguments)
        if str(batch_size) not in ("1", "None") and not str(batch_size).startswith("auto"):
            raise ConfigError(f"batch_size {batch_size}: questions are answered one by one, leave it at 1")
        if os.environ.get(_PROCESSES, "1") != "1":
            raise ConfigError(
                f"lmms-eval runs in {os.environ[_PROCESSES]} processes, and MLX has one device: start one process"
            )
        self._reasoner: Reasoner | None = None
        self._samples: SampleWriter | None = None
        self._open()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer questions; the text is the answer that counts, the token counts are its cost."""
        asked = (self._read(request) for request in requests)
        responses = answer_all(self._open(), asked, self.options, log=self._samples)
        results = []
        for response, request in zip(tqdm(responses, total=len(requests), desc="Model Responding"), requests):
            self.cache_hook.add_partial(_REQUEST, request.args[:2], response.text)
            results.append(_result(response))
        return results

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Refused: an answer is generated, not chosen by its likelihood."""
        raise _refusal(requests, "compares the likelihood of given answers; take its generating variant")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Refused: there is one question at a time."""
        raise _refusal(requests, "asks in several rounds, and the model was trained to answer in one")

    def clean(self) -> None:
        """Free the memory; a later question loads the model again."""
        if self._reasoner is not None:
            self._reasoner.close()
            self._reasoner = None
        if self._samples is not None:
            self._samples.close()
            self._samples = None
        super().clean()

    def _open(self) -> Reasoner:
        """The reasoner and the log, opened now if they are not."""
        if self._reasoner is None:
            options = self.options
            reasoner = load_with(part_of(options, LoadOptions))
            reasoner.system_prompt = evaluation_copy(reasoner.system_prompt)
            try:  # limits that the first video would refuse are refused before the data is read
                for limits in (options, options.several):
                    limits.applied_to(reasoner.spec)
                if options.log_file is not None:
                    self._samples = open_log(options.log_file, reasoner, options)
            except BaseException:
                reasoner.close()
                raise
            self._reasoner = reasoner
        return self._reasoner

    def _read(self, request: Instance) -> LmmsRequest:
        context, generation, doc_to_visual, doc_id, task, split = request.args
        look = partial(doc_to_visual, self.task_dict[task][split][doc_id]) if doc_to_visual is not None else _nothing
        return LmmsRequest(task=task, split=split, doc_id=doc_id, context=context, visuals=look, generation=generation)


def _nothing() -> None:
    """The media of a question of text alone: none."""


def _result(response: Response) -> GenerationResult:
    if response.answer is None:
        return GenerationResult(response.text)
    usage = response.answer.usage
    counts = TokenCounts(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.generated_tokens,
        reasoning_tokens=usage.reasoning_tokens,
    )
    return GenerationResult(response.text, counts)


def _refusal(requests: Sequence[Instance], reason: str) -> ConfigError:
    task = requests[0].task_name if requests else "the task"
    return ConfigError(f"{task} cannot be run with mlxvr: it {reason}")
