"""Filtering: keep the rows that are worth training on, which the base model sometimes solves.

A group whose completions all earn the same teaches nothing. So k completions of every row are sampled, and a row that
is right 0 times or k times out of k is dropped (arXiv 2601.05175 does so with k = 8). Right means that the reviewed
answer, the second, earns at least a threshold. Texts and formulas earn 0 or 1, so for them every threshold is the same;
for moments it is an IoU; grounded answers earn up to 2 and are compared with twice the threshold. The default is 0.7,
from which the reward itself counts an answer as right. The paper has a language model judge instead of the reward.

A user's own reward function can judge instead: by the `second` of a `Reward`, or by the number itself where it returns
a number. Such a function may also judge rows that have no answer.

Samples are logged row by row beside the output, each on the disk before the next row begins. After a kill at any point
the same call continues there; since a row's seed comes from the run's seed and the row's id, it ends with the same
output. A row that was changed is sampled again, and a changed threshold needs no sampling. The output is written at the
end, in one step: a dataset like any other, with a `pass_rate` for each row.

Media paths. The output gives them relative to its own folder if all media are in it. Otherwise they are relative to the
given media root, or to the deepest folder that contains them all, and the report says which: the output has to be read
with that folder as its media root.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvr.answering.sampling_config import SamplingConfig
from mlxvr.data.rows import Row, to_record
from mlxvr.errors import Cancelled, ConfigError, DataError, MediaError
from mlxvr.grading.reward import RewardFunction, call_reward, highest_reward, score
from mlxvr.grpo.filter_report import FilterReport
from mlxvr.media.spec import VisionSpec
from mlxvr.runtime.hooks import NO_HOOKS, Hooks, ShouldStop
from mlxvr.storage.jsonl_log import JsonlLog, read_records, write_records

if TYPE_CHECKING:
    from mlxvr.model.network import VideoModel

__all__ = ["CompletionSampler", "FilterConfig", "filter_rows", "make_sampler", "progress_file"]

CompletionSampler = Callable[[Row, int], Sequence[str]]  # from a row and a seed: the texts of its completions
Scores = dict[tuple[str, str], list[float]]  # scores of second answers, by the row's id and digest


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """How rows are sampled and judged; raises `ConfigError` for a value that cannot be used.

    Attributes:
        samples: completions per row.
        threshold: score from which the second answer is right, in (0, 1]; any number with a `reward`.
        sampling: of the completions; the temperature is above 0.
        max_prompt_tokens: longer prompts are refused; None: the model's context is the limit.
        prefill_step_size: the most prompt tokens of a forward pass.
        spec: how frames are sampled and sized; None: the model's own.
        media_root: the media root of the rows, if they have one.
        skip_bad: leave out rows that cannot be shown or judged instead of raising.
        reward: judges instead of the paper's reward.
        judged_by: what else decides samples and scores, JSON-ready, such as the names of the adapter and of the reward;
            progress that was made with something else is refused.
    """

    samples: int = 8
    threshold: float = 0.7
    sampling: SamplingConfig = field(default=SamplingConfig(max_tokens=2_048, temperature=1.0, seed=0))
    max_prompt_tokens: int | None = None
    prefill_step_size: int = 2_048
    spec: VisionSpec | None = None
    media_root: Path | None = None
    skip_bad: bool = False
    reward: RewardFunction | None = None
    judged_by: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ConfigError(f"samples is {self.samples}: whether a row is solved sometimes takes at least 2")
        in_range = self.reward is not None or 0 < self.threshold <= 1
        if not (math.isfinite(self.threshold) and in_range):
            raise ConfigError(f"threshold is {self.threshold}: expected a number above 0, up to 1")
        if self.sampling.temperature <= 0:
            raise ConfigError(
                f"temperature is {self.sampling.temperature}: samples differ only above 0, such as at 1.0"
            )
        if self.prefill_step_size < 1:
            raise ConfigError(f"prefill_step_size is {self.prefill_step_size}: expected at least 1")

    def can_judge(self, row: Row) -> bool:
        """Whether a row can be judged: it has an answer, or the user's reward function judges all rows."""
        return row.answer is not None or self.reward is not None


def filter_rows(
    model: "VideoModel | None",
    rows: Sequence[Row],
    output: Path,
    config: FilterConfig = FilterConfig(),
    *,
    sampler: CompletionSampler | None = None,
    hooks: Hooks = NO_HOOKS,
) -> FilterReport:
    """Keep the rows that a model sometimes solves; continues where an earlier call stopped.

    Args:
        model: the model to sample from; None only with a `sampler`.
        rows: with unique ids.
        output: the JSONL file to write; its progress is logged beside it (`progress_file`).
        config: how rows are sampled and judged.
        sampler: replaces the model: gives the texts of a row's completions, `config.samples` of them.
        hooks: progress is called with ("filter", rows done, rows); should_stop ends the work between rows and tokens
            with `Cancelled`, and what was sampled is kept.

    Raises:
        ConfigError: a value cannot be used, or the progress was made with other settings.
        DataError: two rows have the same id, the rows come from the output file itself, or no row is left.
        MediaError: what a row shows cannot be read.
    """
    _check_files(rows, output)
    if sampler is None:
        if model is None:
            raise ConfigError("there is no model to sample from: give one, or a sampler")
        sampler = make_sampler(model, config, should_stop=hooks.should_stop)
    judged = [row for row in rows if config.can_judge(row)]
    failed: list[str] = []
    sampled = 0
    with JsonlLog(progress_file(output), _run_identity(model, config)) as log:
        scores = _read_scores(log.path, config.samples)
        for done, row in enumerate(judged):
            _report_progress(hooks, done, len(judged))
            key = row.id, _digest(row)
            if key in scores:
                continue
            if hooks.should_stop is not None and hooks.should_stop():
                raise Cancelled(f"stopped after {done} of {len(judged)} rows; the same call continues there")
            try:
                second = _score_row(row, sampler(row, _seed(config.sampling.seed, row)), config)
            except (DataError, MediaError) as error:
                reason = str(error) if str(error).startswith(row.line) else f"{row.line}: {error}"
                if not config.skip_bad:
                    raise type(error)(reason) from error
                failed.append(reason)
                continue
            log.append({"id": row.id, "asked": key[1], "second": second})
            scores[key] = second
            sampled += 1
        _report_progress(hooks, len(judged), len(judged))
        report, records = _decide(rows, scores, output, config)
        report = replace(report, failed=tuple(failed), sampled=sampled)
        if not records:
            raise DataError(f"no row is left of {report.total}: {report.describe()}")
        write_records(output, records)
    return report


def make_sampler(
    model: "VideoModel", config: FilterConfig, *, should_stop: ShouldStop | None = None
) -> CompletionSampler:
    """A sampler that samples a row's completions from a model, by one rollout."""
    from mlxvr.grpo.step.prompts import encode_row
    from mlxvr.grpo.step.rollout import rollout

    def sample(row: Row, seed: int) -> list[str]:
        prompt = encode_row(
            model,
            row,
            spec=config.spec or model.spec,
            max_prompt_tokens=config.max_prompt_tokens,
            should_stop=should_stop,
        )
        group = rollout(
            model,
            prompt,
            replace(config.sampling, seed=seed),
            group_size=config.samples,
            prefill_step_size=config.prefill_step_size,
            should_stop=should_stop,
        )
        return group.texts

    return sample


def progress_file(output: Path) -> Path:
    """The log of an output: `kept.progress.jsonl` beside `kept.jsonl`."""
    return output.with_name(f"{output.stem}.progress.jsonl")


def _check_files(rows: Sequence[Row], output: Path) -> None:
    if output.is_dir():
        raise ConfigError(f"{output} is a folder: give the JSONL file to write")
    lines: dict[str, str] = {}
    for row in rows:
        if row.id in lines:
            raise DataError(f"{row.line}: the id {row.id!r} is that of {lines[row.id]} already: give every row its own")
        lines[row.id] = row.line
    if output.exists() and any(_is_same(line.rpartition(":")[0], output) for line in lines.values()):
        raise DataError(f"{output} is the file that the rows come from: give another one to write")


def _is_same(path: str, output: Path) -> bool:
    return os.path.abspath(path) == os.path.abspath(output) or Path(path).resolve() == output.resolve()


def _run_identity(model: "VideoModel | None", config: FilterConfig) -> dict[str, Any]:
    """What samples and scores depend on beside their rows."""
    spec = model.spec if config.spec is None and model is not None else config.spec
    return {
        "work": "filter",
        "weights": None if model is None else model.fingerprint,
        "system_prompt": "" if model is None else hashlib.sha256(model.system_prompt.encode()).hexdigest()[:16],
        "samples": config.samples,
        **asdict(config.sampling),
        "max_prompt_tokens": config.max_prompt_tokens,
        "prefill_step_size": config.prefill_step_size,
        "frames": None if spec is None else hashlib.sha256(repr(spec).encode()).hexdigest()[:16],
        **config.judged_by,
    }


def _read_scores(path: Path, samples: int) -> Scores:
    """The scores that earlier runs logged."""
    scores = {}
    for number, record in read_records(path):
        second = record.get("second")
        named = isinstance(record.get("id"), str) and isinstance(record.get("asked"), str)
        if not named or not isinstance(second, list) or len(second) != samples:
            raise DataError(f"{path}:{number}: no progress of a row; remove the line, and its row is sampled again")
        scores[record["id"], record["asked"]] = [float(value) for value in second]
    return scores


def _digest(row: Row) -> str:
    """Differs between rows that are asked or judged differently."""
    record = to_record(row, media=row.media)
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _seed(seed: int | None, row: Row) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{row.id}".encode("utf-8", "surrogatepass")).digest()[:4])


def _score_row(row: Row, texts: Sequence[str], config: FilterConfig) -> list[float]:
    """The unweighted scores of the second answers; a user's function that returns plain numbers scores the whole."""
    if len(texts) != config.samples:
        raise ConfigError(f"{row.line}: the sampler made {len(texts)} completions: expected {config.samples}")
    if config.reward is None:
        return [float(score(text, row.answer, row.kind).second) for text in texts]
    rewards = [call_reward(config.reward, text, row) for text in texts]
    return [reward.total if math.isnan(reward.second) else reward.second for reward in rewards]


def _decide(
    rows: Sequence[Row], scores: Scores, output: Path, config: FilterConfig
) -> tuple[FilterReport, list[dict[str, Any]]]:
    """Which rows are kept, as a report and as the lines of the output."""
    root = _common_root(rows, output.parent, config.media_root)
    records = []
    sometimes = never = always = unlabelled = 0
    for row in rows:
        second = scores.get((row.id, _digest(row)))
        record = to_record(row, media=_relative(row, root or output.parent))
        if not config.can_judge(row):
            unlabelled += 1
            records.append(record)
        elif second is not None:
            # The scores of a user's function are compared with the threshold as they are.
            highest = 1.0 if config.reward is not None else highest_reward(row.kind)
            right = sum(value >= config.threshold * highest for value in second)
            never += right == 0
            always += right == config.samples
            if 0 < right < config.samples:
                sometimes += 1
                records.append({**record, "pass_rate": right / config.samples})
    report = FilterReport(
        output=output,
        progress=progress_file(output),
        media_root=root,
        samples=config.samples,
        threshold=config.threshold,
        total=len(rows),
        sometimes=sometimes,
        never=never,
        always=always,
        unlabelled=unlabelled,
        failed=(),
        sampled=0,
    )
    return report, records


def _common_root(rows: Sequence[Row], folder: Path, media_root: Path | None) -> Path | None:
    """The folder that media paths of the output are relative to; None: the output's own, which contains all media."""
    paths = [path for row in rows if (path := row.video or row.image) is not None]
    if all(path.resolve().is_relative_to(folder.resolve()) for path in paths):
        return None
    absolute = [Path(os.path.abspath(path)) for path in paths]
    if media_root is not None:
        root = Path(os.path.abspath(media_root))
        if all(path.is_relative_to(root) for path in absolute):
            return root
    return Path(os.path.commonpath([path.parent for path in absolute]))


def _relative(row: Row, base: Path) -> str:
    path = row.video or row.image
    if path is None:
        return ""
    absolute, root = Path(os.path.abspath(path)), Path(os.path.abspath(base))
    if absolute.is_relative_to(root):
        return absolute.relative_to(root).as_posix()
    return path.resolve().relative_to(base.resolve()).as_posix()


def _report_progress(hooks: Hooks, done: int, total: int) -> None:
    if hooks.progress is not None and total:
        hooks.progress("filter", done, total)
