"""The output head in float32: what it costs for each token, and what it does to confidence.

    python -m tests.benchmarks.head [--shape 8b|demo] [--repeats N]

Costs: one row of hidden states through a random head of 151,936 rows (`--shape`: as wide as Qwen3-VL-8B's, or small),
in bfloat16 as MLX does it and in float32 as `mlxvr.model.head` does it, in turn; medians, and the memory that the
product takes beside the head.

Confidence: every question of the bundled clips is answered by the bundled checkpoint, with the whole network in float32
and as it is shipped (bfloat16), the latter with both heads. Each gives its log-probabilities for the same tokens, those
of the float32 network's direct answers.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxvr.answering.confidence import score_first_answer
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.media import load_vision
from mlxvr.model import loading
from mlxvr.model.decode import decode, prefill
from mlxvr.model.head import Head
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import build_prompt

SHAPES = {"8b": (151_936, 4096), "demo": (151_936, 512)}


def stock(module: nn.Module, hidden: mx.array) -> mx.array:
    """The head as MLX computes it: in the dtype of what comes in."""
    out = module.as_linear(hidden) if "Embedding" in type(module).__name__ else module(hidden)
    return out.astype(mx.float32)


def time_head(shape: tuple[int, int], repeats: int) -> None:
    rows, width = shape
    weight = (mx.random.normal((rows, width)) * width**-0.5).astype(mx.bfloat16)
    hidden = mx.random.normal((1, width)).astype(mx.bfloat16)
    mx.eval(weight, hidden)
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = weight
    print(f"{'head of ' + f'{rows:,} x {width:,}':30} {'bfloat16':>9} {'float32':>9}  {'ratio':>5}  beside it")
    for name, module in (
        ("bfloat16", linear),
        ("8 bits in groups of 64", nn.QuantizedLinear.from_linear(linear, group_size=64, bits=8)),
        ("4 bits in groups of 64", nn.QuantizedLinear.from_linear(linear, group_size=64, bits=4)),
    ):
        mx.eval(module.parameters())
        head = Head()
        ways: list[Callable[[], mx.array]] = [lambda m=module: stock(m, hidden), lambda m=module, h=head: h(m, hidden)]
        spent: list[list[float]] = [[], []]
        for way in ways:
            mx.eval(way())
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(ways[1]())
        beside = mx.get_peak_memory() - before
        for _ in range(repeats):
            for seconds, way in zip(spent, ways):
                started = time.perf_counter()
                mx.eval(way())
                seconds.append(time.perf_counter() - started)
        old, new = (statistics.median(one) * 1e3 for one in spent)
        print(f"{name:30} {old:6.2f} ms {new:6.2f} ms  {new / old:5.2f}  {beside / 2**20:.0f} MiB")


def first_answer_logprobs(model: VideoModel, row: dict, follow: list[int] | None) -> tuple[list[int], list[float]]:
    """Tokens of a direct answer and their log-probs; `follow`: of these tokens instead."""
    vision = load_vision(demo_folder() / row["video"], model.spec)
    prompt = build_prompt(
        model.tokenizer, model.family, model.config, [vision], row["question"], options=row["options"], kind=row["kind"]
    )
    cache = model.make_cache()
    features = model.encode(prompt.media)
    logits = prefill(model, prompt.ids, prompt.positions, cache, features=features, media_mask=prompt.media_mask)
    if follow is None:
        tokens = list(decode(model, logits, cache, prompt.next_position, max_tokens=24, stop_ids=model.eos_ids))
        return [token.id for token in tokens], [token.logprob for token in tokens]
    found = []
    for step, token in enumerate(follow):
        found.append(float((logits[token] - mx.logsumexp(logits)).item()))
        place = mx.full((3, 1, 1), prompt.next_position + step, dtype=mx.int32)
        logits = model.logits(model.hidden(mx.array([[token]]), place, cache=cache)[:, -1])[0]
    return follow, found


def drift() -> None:
    folder = demo_folder() / "checkpoint"
    exact, shipped, rounded = (loading.load_model(folder, dtype=dtype) for dtype in ("float32", None, None))
    rounded.head = stock  # type: ignore[assignment]
    lines = (demo_folder() / "clips.jsonl").read_text(encoding="utf-8").splitlines()
    apart: dict[str, list[float]] = {"bfloat16": [], "float32": []}
    between: list[float] = []
    for row in map(json.loads, lines):
        tokens, logprobs = first_answer_logprobs(exact, row, None)
        scored = score_first_answer(tokens, logprobs, exact.tokenizer.decode)
        if scored is None:
            continue
        confidences = []
        for model in (rounded, shipped):
            _, own = first_answer_logprobs(model, row, tokens)
            confidences.append(score_first_answer(tokens, own, model.tokenizer.decode).confidence)
        between.append(abs(confidences[0] - confidences[1]))
        for name, confidence in zip(apart, confidences):
            apart[name].append(abs(confidence - scored.confidence))
    print(f"\n{len(between)} direct answers of the bundled checkpoint in bfloat16, against float32 throughout")
    for name, differences in apart.items():
        mean, most = float(np.mean(differences)), max(differences)
        print(f"head in {name:10} confidence off by {mean:.5f} on average, {most:.5f} at most")
    print(f"between the two heads            {float(np.mean(between)):.5f} on average, {max(between):.5f} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    mx.random.seed(0)
    time_head(SHAPES[args.shape], args.repeats)
    drift()


if __name__ == "__main__":
    main()
