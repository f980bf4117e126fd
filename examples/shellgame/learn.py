"""Does GRPO teach anything? `python -m shellgame.learn --output OUT [--variants paper ..] [--seeds 0 1 2]`.

Starts from `early`, a snapshot from a third of the way through a training. It can say where a shape moves and what
shape it is, when asked in the words it knows; in other words (`questions.REWORDED`) it takes the question for another
and is often wrong. Each run is 75 steps of 4 such questions, of 200 on 100 clips, with one of three rewards:

    paper         0.9 for the first answer, 1.1 for the second, 1 for the format, 0.3 for a fallback that ends well
    equal         1 for either answer and no fallback bonus, the paper's ablation
    unlabelled    the rows without their answers, judged by agreement and coherence

Before and after, the model answers 450 questions on 300 held-out clips, greedily. What is finished is not done again,
so runs may be split over processes by `--seeds` and `--variants`; the last call draws up `learning.json`,
`learning.png` and the tables, of what there is.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mlxvr.answering.sampling_config import SamplingConfig
from mlxvr.cli.plotting import BLUE, GREEN, ORANGE, write_plot
from mlxvr.data.rows import load_rows
from mlxvr.evaluation.analysis.bootstrap import Bootstrap, Estimate
from mlxvr.evaluation.analysis.reliability import auroc
from mlxvr.grading.reward import Weights
from mlxvr.grpo.step.lora import attach_saved
from mlxvr.grpo.step.prompts import encode_row
from mlxvr.grpo.step.rollout import rollout
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.grpo.trainer import train
from mlxvr.grpo.validation import validate_answer
from mlxvr.model.loading import load_model
from mlxvr.storage.paths import list_visible

from .clips import reworded_held_out_set, reworded_set, write_set

EARLY = Path(__file__).parent / "early"
THRESHOLD = 0.97
MOST_TOKENS = 128
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "equal": {"first_weight": 1.0, "second_weight": 1.0, "fallback_weight": 0.0},
    "unlabelled": {"reward": ("agreement", "coherence")},
}
COLORS = {"paper": BLUE, "equal": ORANGE, "unlabelled": GREEN}
FIGURES = ("second", "reward", "first", "format", "auto", "reasoned", "tokens")
PARTS = {  # of the held-out questions
    "reworded": ("reworded", "kept back"),
    "the words trained on": ("reworded",),
    "words kept back": ("kept back",),
    "familiar: start": ("perception",),
    "familiar: tracking": ("tracking",),
}


def write_data(folder: Path, train_clips: int = 100, held_out_clips: int = 300) -> None:
    """Write what is trained on, with and without answers, and what is held out; leaves alone what is there."""
    if not (folder / "train" / "unlabelled.jsonl").exists():
        records = write_set(folder / "train", reworded_set(1, train_clips))
        bare = [{name: value for name, value in record.items() if name != "answer"} for record in records]
        lines = "".join(json.dumps(record) + "\n" for record in bare)
        (folder / "train" / "unlabelled.jsonl").write_text(lines, encoding="utf-8")
    if not (folder / "heldout" / "clips.jsonl").exists():
        write_set(folder / "heldout", reworded_held_out_set(2, held_out_clips))


def settings(data: Path, output: Path, variant: str, seed: int) -> TrainConfig:
    """One run's."""
    return TrainConfig(
        model=EARLY,
        dtype="float32",
        data=data / "train" / ("unlabelled.jsonl" if variant == "unlabelled" else "clips.jsonl"),
        output=output,
        resume=(output / "state").exists(),
        steps=75,
        learning_rate=8e-4,
        schedule="cosine",
        warmup_steps=6,
        max_completion_tokens=MOST_TOKENS,
        seed=seed,
        **VARIANTS[variant],
    )


def answer(adapter: Path | None, data: Path, output: Path) -> None:
    """Answer the held-out questions greedily and write how each went; leaves a finished file alone."""
    if output.exists():
        return
    model = load_model(EARLY, dtype="float32")
    if adapter is not None:
        attach_saved(model, adapter)
    spec = model.spec.with_overrides(**model.settings.get("frame_limits", {}))
    records = (data / "heldout" / "clips.jsonl").read_text(encoding="utf-8").splitlines()
    lines = []
    for row, record in zip(load_rows(data / "heldout" / "clips.jsonl"), map(json.loads, records), strict=True):
        prompt = encode_row(model, row, spec=spec)
        group = rollout(model, prompt, SamplingConfig(max_tokens=MOST_TOKENS, temperature=0.0, seed=0), group_size=1)
        validated = validate_answer(model, group, threshold=THRESHOLD, weights=Weights())
        lines.append(json.dumps({"id": row.id, "clip": record["video"], "group": record["group"], **asdict(validated)}))
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Outcomes:
    """How the held-out questions went, before and after each run; row by row in the same order."""

    def __init__(self, folder: Path, runs: Mapping[str, Sequence[Path]]) -> None:
        self.before = _read(folder / "before.jsonl")
        self.after = {variant: [_read(file) for file in files] for variant, files in runs.items() if files}
        self._clips = np.unique([row["clip"] for row in self.before], return_inverse=True)[1]
        self._groups = np.array([row["group"] for row in self.before])
        self._bootstrap = Bootstrap(self._clips, count=2000, seed=0)

    def figure(self, name: str, part: str, variant: str | None = None, seed: int | None = None) -> Estimate:
        """A mean over a part's questions with its 95% interval by clip: before, or after, of all seeds or of one."""
        return self._mean(self._values(name, variant, seed), part)

    def change(self, name: str, part: str, variant: str) -> Estimate:
        """After minus before, question by question, over all seeds."""
        return self._mean(self._values(name, variant) - self._values(name), part)

    def separation(self, variant: str | None = None, seed: int | None = None) -> float:
        """How probably the first answer of an easy question (what shows at the start) is surer than of a hard one."""
        found = []
        for rows in self._runs(variant, seed):
            chosen = [row for row in rows if row["group"] in ("perception", "tracking")]
            sure = np.array([row["confidence"] or 0.0 for row in chosen])
            found.append(float(auroc(sure, np.array([row["group"] == "perception" for row in chosen]))[0]))
        return float(np.mean(found))

    def _runs(self, variant: str | None, seed: int | None = None) -> list[list[dict]]:
        if variant is None:
            return [self.before]
        return self.after[variant] if seed is None else [self.after[variant][seed]]

    def _values(self, name: str, variant: str | None = None, seed: int | None = None) -> np.ndarray:
        return np.mean([[float(row[name]) for row in rows] for rows in self._runs(variant, seed)], axis=0)

    def _mean(self, values: np.ndarray, part: str) -> Estimate:
        estimate = self._bootstrap.mean(values, np.isin(self._groups, PARTS[part]))
        assert estimate is not None, "every part has questions"
        return estimate


def _read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def table(outcomes: Outcomes, part: str) -> str:
    """Markdown: before, then each variant with its change and its seeds one by one."""
    lines = [
        f"| {part} | second answer | change | each seed | mean reward | first answer | format | auto | think ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in (None, *outcomes.after):
        figures = {name: outcomes.figure(name, part, variant) for name in FIGURES}
        change, seeds = "", ""
        if variant is not None:
            change = _show(outcomes.change("second", part, variant), sign=True)
            count = len(outcomes.after[variant])
            seeds = ", ".join(f"{outcomes.figure('second', part, variant, seed).value:.3f}" for seed in range(count))
        cells = (
            variant or "before", _show(figures["second"]), change, seeds, _show(figures["reward"]),
            *(f"{figures[name].value:.3f}" for name in ("first", "format", "auto", "reasoned")),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _show(estimate: Estimate, *, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def results(outcomes: Outcomes) -> dict[str, Any]:
    """Every figure, JSON-ready."""
    told: dict[str, Any] = {"questions": len(outcomes.before), "parts": {}}
    for variant in (None, *outcomes.after):
        told["parts"][variant or "before"] = {
            part: {name: asdict(outcomes.figure(name, part, variant)) for name in FIGURES} for part in PARTS
        }
    told["change"] = {
        variant: {part: {name: asdict(outcomes.change(name, part, variant)) for name in FIGURES} for part in PARTS}
        for variant in outcomes.after
    }
    told["seeds"] = {
        variant: [
            {part: {name: outcomes.figure(name, part, variant, seed).value for name in FIGURES} for part in PARTS}
            for seed in range(len(runs))
        ]
        for variant, runs in outcomes.after.items()
    }
    told["separation"] = {variant or "before": outcomes.separation(variant) for variant in (None, *outcomes.after)}
    return told


def draw(journals: Mapping[str, Sequence[Path]], file: Path) -> None:
    """The share of right second answers and the format while training: each seed faintly, their mean on top."""

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, 2, sharex=True)
        for axes, name, label in zip(
            panels, ("second_accuracy", "rewards/format/mean"), ("second answer right", "format kept")
        ):
            for variant, files in journals.items():
                runs = [[entry[name] for entry in _read(one) if entry.get(name) is not None] for one in files]
                runs = [_smooth(run) for run in runs if run]  # rows without answers are not known to be right
                for run in runs:
                    axes.plot(range(1, len(run) + 1), run, color=COLORS[variant], alpha=0.25, linewidth=1)
                if runs:
                    mean = np.mean([run[: min(map(len, runs))] for run in runs], axis=0)
                    axes.plot(range(1, len(mean) + 1), mean, color=COLORS[variant], linewidth=2, label=variant)
            axes.set_title(f"{label}, of sampled completions")
            axes.set_xlabel("step (mean of 9)")
            axes.set_ylim(0, 1.02)
            axes.legend(loc="lower right")

    write_plot(paint, file, size=(10.0, 4.0))


def _smooth(values: Sequence[float], window: int = 9) -> list[float]:
    half = window // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def main(argv: list[str] | None = None) -> int:
    """Write the clips, train, answer, draw up what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="gets clips, runs and answers")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    options = parser.parse_args(argv)
    folder = options.output
    write_data(folder)
    answer(None, folder, folder / "before.jsonl")
    for seed in options.seeds:
        for variant in options.variants:
            run = folder / f"{variant}-{seed}"
            if not (run / "answers.jsonl").exists():
                report = train(settings(folder, run, variant, seed))
                print(f"{run.name}: {report.steps} steps in {report.seconds:.0f} s", flush=True)
                answer(run, folder, run / "answers.jsonl")
    finished = {variant: list_visible(folder, f"{variant}-*/answers.jsonl") for variant in VARIANTS}
    outcomes = Outcomes(folder, finished)
    (folder / "learning.json").write_text(json.dumps(results(outcomes), indent=1) + "\n", encoding="utf-8")
    draw({variant: [file.with_name("metrics.jsonl") for file in files] for variant, files in finished.items()},
         folder / "learning.png")  # fmt: skip
    for part in PARTS:
        print(table(outcomes, part), end="\n\n")
    for variant in (None, *outcomes.after):
        print(f"{variant or 'before'}: easy is surer than hard with probability {outcomes.separation(variant):.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
