"""What the gradient of a group costs: one packed pass, against mlx-vlm's own loss one completion at a time.

    python -m tests.benchmarks.grpo [--shape mid|8b] [--prompts 512 1024 2048] [--groups 4 8 16] [--tokens 48]
        [--repeats 3] [--no-peer] [--json]

Random weights, LoRA of rank 8 on every attention projection (8b: rank 16 on all projections), a random clip, random
completions. Seconds are medians and include the vision tower, once for us and once a completion for the peer, which is
how each works. Memory is the most that was held beyond the weights. "again" is with layers that are computed again in
the backward pass. The peer runs the same layers on the same weights; one of its completions is timed and counted G
times, for that is what it does. First its whole gradient is computed for the smallest group, and ours must equal it.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlxvr.grpo.gradient import group_gradient
from mlxvr.grpo.lora import LoraConfig, attach
from mlxvr.grpo.loss import LossConfig
from mlxvr.media import normalise
from mlxvr.model.adapter import find_layers
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import Prompt, build_prompt
from tests.benchmarks.answers import SHAPES, make_model, timed
from tests.checkpoints import random_media

LORA = {"mid": LoraConfig(rank=8, keys=("q_proj", "k_proj", "v_proj", "o_proj")), "8b": LoraConfig(rank=16)}
POLICY = LossConfig(beta=0.0)


def make_prompt(model: VideoModel, shape: str, length: int) -> Prompt:
    """A question about a clip, together as near to `length` tokens as whole rows of the clip allow."""
    height, width = SHAPES[shape][2]

    def ask(rows: int) -> Prompt:
        media = [random_media("qwen3_vl", "video", (rows, height, width))]
        return build_prompt(model.tokenizer, model.family, model.config, media, "What happens?", system="Be brief.")

    one, two = len(ask(1).ids), len(ask(2).ids)
    return ask(max(1, 1 + (length - one) // (two - one)))


class Ways:
    """Both ways to a group's gradient, on one model and one group."""

    def __init__(self, model: VideoModel, prompt: Prompt, size: int, tokens: int):
        rng = np.random.default_rng(size)
        self.model, self.prompt, self.size = model, prompt, size
        self.completions = rng.integers(0, 400, (size, tokens)).astype(np.int32)
        self.advantages = rng.normal(size=size).astype(np.float32)

    def packed(self, *, checkpoint: bool = False) -> dict[str, object]:
        """Ours: vision once, everything in one pass."""
        prompt = self.prompt
        encoded = SimpleNamespace(
            ids=prompt.ids,
            positions=prompt.positions,
            media_mask=prompt.media_mask,
            features=self.model.encode(prompt.media),
            next_position=prompt.next_position,
        )
        completions = [SimpleNamespace(ids=ids, truncated=False) for ids in self.completions]
        rollout = SimpleNamespace(prompt=encoded, completions=completions)
        return group_gradient(self.model, rollout, self.advantages, config=POLICY, checkpoint=checkpoint)[0]

    def stock(self, count: int) -> dict[str, object]:
        """mlx-vlm's trainer: everything anew for each of `count` completions."""
        from mlx_vlm.trainer.vlm.grpo.loss import completion_logps, grpo_objective

        network, clip = self.model.network, self.prompt.media[0]
        pixels = mx.array(normalise(clip.patches, self.model.spec))
        total: dict[str, object] | None = None
        for ids, advantage in zip(self.completions[:count], self.advantages.tolist()):
            whole = mx.array(np.concatenate([self.prompt.ids, ids]))[None]
            batch = {
                "input_ids": whole,
                "attention_mask": mx.ones_like(whole),
                "pixel_values_videos": pixels,
                "video_grid_thw": mx.array([clip.grid]),
            }

            def loss(_: object, batch: dict[str, mx.array] = batch, advantage: float = advantage) -> mx.array:
                logps = completion_logps(network, batch, len(self.prompt.ids) - 1)
                mask = mx.ones(logps.shape, dtype=mx.bool_)
                return grpo_objective(logps, mx.stop_gradient(logps), mask, mx.array([advantage]))[0] / self.size

            gradient = nn.value_and_grad(network, loss)(None)[1]
            total = gradient if total is None else tree_map(lambda one, other: one + other, total, gradient)
            mx.eval(total)
        assert total is not None
        return total


def difference(found: object, expected: object) -> float:
    """Relative, over all arrays of two gradients."""
    pairs = [(one, other) for (_, one), (_, other) in zip(tree_flatten(found), tree_flatten(expected), strict=True)]
    apart = sum(float(mx.sum((one - other) ** 2)) for one, other in pairs)
    return (apart / sum(float(mx.sum(other**2)) for _, other in pairs)) ** 0.5


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and GiB held beyond what was held before."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    seconds = timed(work)
    return seconds, (mx.get_peak_memory() - before) / 2**30


def run(ways: Ways, repeats: int, *, peer: bool) -> dict[str, float]:
    """Median seconds and GiB of each way, in turn in each repeat."""
    works: dict[str, Callable[[], object]] = {
        "packed": ways.packed,
        "again": lambda: ways.packed(checkpoint=True),
    }
    if peer:
        works["peer"] = lambda: ways.stock(1)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(measured(work))
    result: dict[str, float] = {}
    for name, pairs in found.items():
        result[f"{name}_seconds"] = statistics.median(pair[0] for pair in pairs)
        result[f"{name}_gib"] = max(pair[1] for pair in pairs)
    if peer:
        result["peer_seconds"] *= ways.size
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.grpo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="mid")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--tokens", type=int, default=48, help="of each completion")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="measure only our own way")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    args = parser.parse_args(argv)
    if mx.default_device() == mx.Device(mx.cpu):
        mx.disable_compile()
    model = make_model(args.shape)
    attach(model, LORA[args.shape], seed=0)
    for index, layer in enumerate(find_layers(model.network).values()):
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(index)) * 0.02
    mx.eval(model.network.parameters())
    mx.clear_cache()
    print(f"weights {mx.get_active_memory() / 2**30:.2f} GiB")
    if not args.no_peer:
        ways = Ways(model, make_prompt(model, args.shape, min(args.prompts)), min(args.groups), args.tokens)
        apart = difference(ways.packed(), ways.stock(ways.size))
        print(f"the two gradients differ by {apart:.1e}")
        if apart > (1e-3 if args.shape == "mid" else 0.1):  # float32 and bfloat16
            raise SystemExit("they must not: the times mean nothing")
    for length in args.prompts:
        prompt = make_prompt(model, args.shape, length)
        for size in args.groups:
            row = run(Ways(model, prompt, size, args.tokens), args.repeats, peer=not args.no_peer)
            if args.json:
                print(json.dumps({"prompt": len(prompt.ids), "group": size, "tokens": args.tokens, **row}), flush=True)
                continue
            line = f"P={len(prompt.ids)} G={size}"
            for name in ("packed", "again", "peer"):
                if f"{name}_seconds" in row:
                    line += f" | {name} {row[f'{name}_seconds']:.2f} s {row[f'{name}_gib']:.2f} GiB"
            if not args.no_peer:
                line += f" | {row['peer_seconds'] / row['packed_seconds']:.1f}x faster"
            print(line, flush=True)


if __name__ == "__main__":
    main()
