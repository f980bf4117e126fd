"""Measure a checkpoint on fresh clips: `python -m shellgame.evaluate --clips heldout --out figures.json`.

The held-out set is written if the folder has none (seeded: the same files every time). `mlxvr eval` asks every question
once and keeps what came of it beside the clips, so that a stopped run goes on; the table is over groups of questions
and mixes of them. Right is what equals the true answer exactly, for times too.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from mlxvr.cli.progress import ProgressBar
from mlxvr.eval import EvalConfig, evaluate
from mlxvr.evaluation.samples import Sample, decide, read_samples

from .clips import held_out_set, write_set
from .questions import GROUPS

COLUMNS = (
    ("direct", "first_right"),
    ("think", "second_right"),
    ("auto", "auto_right"),
    ("confidence", "confidence"),
    ("think ratio", "thinks"),
    ("tokens direct", "direct_tokens"),
    ("tokens think", "think_tokens"),
    ("tokens auto", "auto_tokens"),
)
MIXES = {"even mix": {"perception": 1, "tracking": 1}, "3:1 mix": {"perception": 3, "tracking": 1}}


def measure(config: EvalConfig, rows: Sequence[dict]) -> list[dict]:
    """Ask every question of `config.data`; what came of each, in the order of `rows`."""
    with ProgressBar() as bar:
        report = evaluate(config, progress=bar)
    if report.summary.errors:
        raise RuntimeError(f"questions that failed: {report.summary.errors}")
    samples = {sample.id: sample for sample in read_samples(report.samples)}
    return [judge(row, samples[row["id"]], report.summary.threshold) for row in rows if row["id"] in samples]


def judge(row: dict, sample: Sample, threshold: float) -> dict:
    """What a question's answers are worth, and what they cost."""
    decision = decide(sample, threshold)
    kept = ("id", "group", "about", "swaps", "size", "crf", "answer")
    return {key: row[key] for key in kept} | {
        "first": sample.first,
        "second": sample.second,
        "first_right": sample.first == row["answer"],
        "second_right": sample.second == row["answer"],
        "auto_right": decision.text == row["answer"],
        "confidence": sample.confidence or 0.0,
        "thinks": decision.reasoned,
        "direct_tokens": sample.first_tokens,
        "think_tokens": sample.total_tokens,
        "auto_tokens": decision.tokens,
        "trace_right": (sample.reasoning or "").strip() == row["trace"],
        "prompt_tokens": sample.prompt_tokens,
    }


def summarise(results: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Means of every column, for each group, each kind of question, and the mixes of perception and tracking."""
    table = {group: _means([r for r in results if r["group"] == group]) for group in GROUPS}
    table = {group: means for group, means in table.items() if means["n"]}
    for name, weights in MIXES.items():
        if all(group in table for group in weights):
            table[name] = _mix(table, weights)
    kinds = sorted({_kind(r) for r in results})
    return table | {kind: _means([r for r in results if _kind(r) == kind]) for kind in kinds}


def _kind(result: dict) -> str:
    counted = result["about"] in ("final_cup", "count")
    return f"{result['about']} ({result['swaps']} swaps)" if counted else result["about"]


def _means(results: Sequence[dict]) -> dict[str, float]:
    columns = [key for _, key in COLUMNS] + ["trace_right"]
    count = max(1, len(results))
    return {"n": len(results)} | {key: sum(float(r[key]) for r in results) / count for key in columns}


def _mix(table: dict[str, dict[str, float]], weights: dict[str, int]) -> dict[str, float]:
    total = sum(weights.values())
    keys = next(iter(table.values())).keys()
    mixed = {key: sum(w * table[group][key] for group, w in weights.items()) / total for key in keys}
    return mixed | {"n": sum(table[group]["n"] for group in weights)}


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The summary as a Markdown table."""
    lines = ["| | n | " + " | ".join(name for name, _ in COLUMNS) + " |", "|---|" + "---|" * (len(COLUMNS) + 1)]
    for name, means in table.items():
        cells = [f"{means[key]:.1f}" if "tokens" in key else f"{means[key]:.3f}" for _, key in COLUMNS]
        lines.append(f"| {name} | {means['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def load_rows(folder: Path, *, seed: int, count: int) -> list[dict]:
    """The questions of a folder's clips, which are written first if it has none."""
    if not (folder / "clips.jsonl").exists():
        write_set(folder, held_out_set(seed, count))
    return [json.loads(line) for line in (folder / "clips.jsonl").read_text(encoding="utf-8").splitlines()]


def main(argv: Iterable[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=None, help="a checkpoint (default: the bundled one)")
    add("--clips", type=Path, required=True, help="folder of the held-out set; written if it has none")
    add("--count", type=int, default=480, help="clips to write")
    add("--seed", type=int, default=0, help="of the clips")
    add("--limit", type=int, default=None, help="ask only so many questions")
    add("--dtype", default=None, help="what to compute in; float32 is fastest on a CPU with a good BLAS")
    add("--workers", type=int, default=2, help="processes")
    add("--threshold", type=float, default=0.97)
    add("--report", type=Path, default=None, help="folder of the samples and report.html (default: beside the clips)")
    add("--out", type=Path, default=None, help="where to write the figures as JSON")
    options = parser.parse_args(argv)
    rows = load_rows(options.clips, seed=options.seed, count=options.count)
    config = EvalConfig(
        model=options.model,
        data=options.clips / "clips.jsonl",
        output=options.report or options.clips / "report",
        dtype=options.dtype,
        workers=options.workers,
        threshold=options.threshold,
        limit=options.limit,
    )
    results = measure(config, rows)
    table = summarise(results)
    print(markdown(table))
    if options.out is not None:
        options.out.write_text(json.dumps({"table": table, "results": results}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
