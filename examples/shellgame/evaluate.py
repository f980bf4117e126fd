"""Measure a checkpoint on fresh clips: `python -m shellgame.evaluate --clips heldout --out figures.json`.

The held-out set is written if the folder has none (seeded: the same files every time). Every question is asked once in
mode `think`, and what `direct` and `auto` would have answered follows from that: greedy decoding makes the answer of
`auto` a prefix of that of `think`. `--live` asks in mode `auto` too and insists that this is so.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import mlxvr

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
_reasoner: mlxvr.Reasoner | None = None  # of a worker process
MIXES = {"even mix": {"perception": 1, "tracking": 1}, "3:1 mix": {"perception": 3, "tracking": 1}}


def ask_all(
    reasoner: mlxvr.Reasoner, folder: Path, rows: Sequence[dict], *, threshold: float, live: bool
) -> Iterator[dict]:
    """Ask every question; yields what came of each."""
    clip, opened = None, ""
    for row in rows:
        if row["video"] != opened:
            clip, opened = reasoner.open(folder / row["video"]), row["video"]
        ask = {"options": row["options"], "kind": row["kind"], "threshold": threshold}
        answer = clip.ask(row["question"], mode="think", **ask)
        confidence = answer.confidence or 0.0
        thinks = confidence < threshold
        text = answer.second if thinks else answer.first
        if live:
            now = clip.ask(row["question"], mode="auto", **ask)
            if (now.text, now.reasoned) != (text, thinks):
                raise RuntimeError(f"{row['id']}: auto says {now.text!r}, think implies {text!r}")
        direct, everything = answer.usage.first_answer_tokens, answer.usage.generated_tokens
        yield {
            "id": row["id"],
            "group": row["group"],
            "about": row["about"],
            "swaps": row["swaps"],
            "size": row["size"],
            "crf": row["crf"],
            "answer": row["answer"],
            "first": answer.first,
            "second": answer.second,
            "first_right": answer.first == row["answer"],
            "second_right": answer.second == row["answer"],
            "auto_right": text == row["answer"],
            "confidence": confidence,
            "thinks": thinks,
            "direct_tokens": direct,
            "think_tokens": everything,
            "auto_tokens": everything if thinks else direct,
            "trace_right": (answer.reasoning or "").strip() == row["trace"],
            "prompt_tokens": answer.usage.prompt_tokens,
        }


def ask_in_parallel(
    model: str | None,
    folder: Path,
    rows: Sequence[dict],
    *,
    threshold: float,
    live: bool,
    dtype: str | None,
    workers: int,
) -> Iterator[dict]:
    """`ask_all` in several processes, each with a model of its own; results come in the order of the rows."""
    clips = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["video"])]
    context = multiprocessing.get_context("spawn")  # MLX does not survive a fork
    with ProcessPoolExecutor(workers, context, initializer=_load, initargs=(model, dtype)) as pool:
        ask = functools.partial(_ask_clip, folder=folder, threshold=threshold, live=live)
        for results in pool.map(ask, clips):
            yield from results


def _load(model: str | None, dtype: str | None) -> None:
    global _reasoner
    _reasoner = mlxvr.load(model, dtype=dtype)


def _ask_clip(rows: Sequence[dict], *, folder: Path, threshold: float, live: bool) -> list[dict]:
    assert _reasoner is not None
    return list(ask_all(_reasoner, folder, rows, threshold=threshold, live=live))


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
    add("--live", action="store_true", help="also ask in mode auto and compare")
    add("--out", type=Path, default=None, help="where to write the figures as JSON")
    options = parser.parse_args(argv)
    rows = load_rows(options.clips, seed=options.seed, count=options.count)[: options.limit]
    results = []
    asked = ask_in_parallel(
        options.model,
        options.clips,
        rows,
        threshold=options.threshold,
        live=options.live,
        dtype=options.dtype,
        workers=options.workers,
    )
    for number, result in enumerate(asked, 1):
        results.append(result)
        if number % 50 == 0:
            print(f"{number} of {len(rows)} questions", flush=True)
    table = summarise(results)
    print(markdown(table))
    if options.out is not None:
        options.out.write_text(json.dumps({"table": table, "results": results}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
