"""What a step of GRPO costs, rollout and gradient, against mlx-vlm's own trainer on the same weights and prompt.

    python -m tests.benchmarks.grpo [--shape mid|8b] [--prompts 512 1024 2048 4096] [--groups 4 8 16] [--tokens 48]
        [--media image|video] [--repeats 3] [--ways plain again] [--peer-completions N] [--no-peer] [--peer-checkpoint]
        [--memory-limit GB] [--json FILE]

Random weights, LoRA of rank 8 on every attention projection (8b: rank 16 on all projections). mlx-vlm's GRPO takes no
video, so the prompt shows images of the size of a clip's frame, as many as fit, and text fills it up to the very token.
No token ends a turn: every completion has as many tokens as asked for, drawn at temperature 1 from all of them.

A step is: vision, rollout, loss and gradient. Ours are `VideoModel.encode`, `rollout` and `group_gradient`. The peer's
are `prepare_rollout` and the gradient function of its training task, as its trainer calls them: one completion at a
time, vision and prompt anew for each. "again" is our gradient with layers that are computed again in the backward pass.
Both sides take their steps in turn, in each repeat, with the allocator's cache emptied before; a step of two tokens
that nobody times comes first, as CUDA compiles kernels when they are first used. Seconds are medians. Memory is the
most that was held beyond weights and inputs. With `--memory-limit` MLX prepares less work ahead of the device when it
holds that much, as in `mlxvr.train`. With `--peer-completions N` only N of the peer's completions
are run and their seconds counted G / N times.

A fast wrong answer is worth nothing: first our gradient of the smallest group must be the peer's. And whenever a size
is measured for the first time, both sides must give the same log-probs to completions that either of them drew.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxvr.answering.sampling_config import SamplingConfig
from mlxvr.data.rows import Row
from mlxvr.grpo.step.gradient import group_gradient, group_logprobs
from mlxvr.grpo.step.lora import attach
from mlxvr.grpo.step.lora_config import LoraConfig
from mlxvr.grpo.step.loss import advantages
from mlxvr.grpo.step.loss_config import LossConfig
from mlxvr.grpo.step.prompts import EncodedPrompt
from mlxvr.grpo.step.rollout import Completion, Rollout, rollout
from mlxvr.media import normalise
from mlxvr.model.adapter import find_layers
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import Prompt, build_prompt
from mlxvr.runtime.device_memory import limited
from tests.benchmarks.answers import SHAPES, make_model
from tests.checkpoints import random_media

LORA = {"mid": LoraConfig(rank=8, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")), "8b": LoraConfig(rank=16)}
POLICY = LossConfig(beta=0.0)
SEED = 7
# How far the two sides may be apart: gradients, relative; log-probs, on average (float32, and bfloat16 at 4 bits).
APART = {"mid": (1e-3, 1e-4), "8b": (0.1, 0.1)}
WAYS = {"plain": "gradient", "again": "again"}  # and what the table calls them
GIB = 2**30


def make_prompt(model: VideoModel, shape: str, length: int, kind: str) -> Prompt:
    """A question of exactly `length` tokens about as many frames of noise as it has room for."""
    height, width = SHAPES[shape][2]

    def ask(frames: int, filling: int) -> Prompt:
        if kind == "video":
            media = [random_media("qwen3_vl", "video", (frames, height, width))]
        else:
            media = [random_media("qwen3_vl", "image", (1, height, width), seed=seed) for seed in range(frames)]
        question = "What happens? " + "1" * filling  # a token each
        return build_prompt(model.tokenizer, model.family, model.config, media, question, system="Be brief.")

    one, two = len(ask(1, 1).ids), len(ask(2, 1).ids)
    frames = 1 + (length - one) // (two - one)
    if frames < 1:
        raise SystemExit(f"a prompt of {length} tokens is too short: the shortest has {one}")
    prompt = ask(frames, 1)
    while len(prompt.ids) > length:  # timestamps of later rows are longer
        frames -= 1
        prompt = ask(frames, 1)
    prompt = ask(frames, 1 + length - len(prompt.ids))
    assert len(prompt.ids) == length
    return prompt


class Ours:
    """A step as our trainer takes it."""

    def __init__(self, model: VideoModel, prompt: Prompt, size: int, tokens: int):
        self.model, self.prompt, self.size, self.tokens = model, prompt, size, tokens

    def sample(self) -> Rollout:
        """Vision, and all completions side by side."""
        prompt = self.prompt
        encoded = EncodedPrompt(
            row=Row(id="benchmark", question="What happens?", answer="A", line="benchmark"),
            ids=prompt.ids,
            positions=prompt.positions,
            media_mask=prompt.media_mask,
            features=self.model.encode(prompt.media),
            next_position=prompt.next_position,
        )
        return rollout(
            self.model,
            encoded,
            SamplingConfig(max_tokens=self.tokens, seed=SEED, temperature=1.0),
            group_size=self.size,
        )

    def gradient(self, made: Rollout, *, checkpoint: bool = False) -> dict[str, Any]:
        """Everything in one pass."""
        earned = advantages(np.array(rewards(len(made.completions))))
        return group_gradient(self.model, made, earned, config=POLICY, checkpoint=checkpoint)[0]


class Peer:
    """A step as mlx-vlm's trainer takes it."""

    def __init__(self, model: VideoModel, prompt: Prompt, size: int, tokens: int):
        from mlx_vlm.trainer.vlm.grpo.config import GRPOTrainingArgs
        from mlx_vlm.trainer.vlm.grpo.trainer import make_task

        self.network = model.network
        self.tokenizer = SimpleNamespace(eos_token_ids=[], decode=model.tokenizer.decode)
        patches = mx.array(np.concatenate([normalise(one.patches, model.spec) for one in prompt.media]))
        grids = mx.array([one.grid for one in prompt.media])
        video = prompt.media[0].kind == "video"
        ids = mx.array(prompt.ids)
        self.inputs = {
            "input_ids": ids,
            "attention_mask": mx.ones_like(ids),
            "pixel_values_videos" if video else "pixel_values": patches,
            "video_grid_thw" if video else "image_grid_thw": grids,
        }
        mx.eval(self.inputs)
        self.options = GRPOTrainingArgs(
            group_size=size,
            max_completion_length=tokens,
            max_seq_length=len(prompt.ids) + tokens,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
        )
        self.task = make_task(self.network, self.options, self.tokenizer)
        self.compute = self.task.value_and_grad_factory(self.network, False)

    def sample(self) -> dict[str, Any]:
        """One completion after the other, and what they earned."""
        from mlx_vlm.trainer.vlm.grpo.trainer import prepare_rollout

        def earned(completions: Sequence[str], **_: object) -> list[float]:
            return rewards(len(completions))

        rows = [{"inputs": self.inputs, "prompt": "", "answer": None}]
        mx.random.seed(SEED)
        return prepare_rollout(self.network, self.tokenizer, rows, self.options, [earned], None)

    def gradient(self, made: dict[str, Any]) -> dict[str, Any]:
        """One completion after the other, added up."""
        parameters = self.network.trainable_parameters()
        (loss, _), gradient = self.compute(self.network, made)
        mx.eval(loss, gradient)
        self.network.update(parameters)  # its checkpoints leave what they traced in the layers
        return gradient

    def batch(self, ids: np.ndarray) -> dict[str, mx.array]:
        """A completion with everything before it, as `completion_logps` wants it."""
        whole = mx.concatenate([self.inputs["input_ids"], mx.array(ids)])[None]
        return {**self.inputs, "input_ids": whole, "attention_mask": mx.ones_like(whole)}

    def samples(self, completions: Sequence[np.ndarray], earned: Sequence[float]) -> dict[str, Any]:
        """A rollout with completions of others."""
        start = self.inputs["input_ids"].size - 1
        samples = [
            {"batch": self.batch(ids), "start": start, "advantage": mx.array([advantage])}
            for ids, advantage in zip(completions, earned)
        ]
        return {"samples": samples, "reward_metrics": {}}

    def logprobs(self, ids: np.ndarray) -> np.ndarray:
        """Of a completion's tokens."""
        from mlx_vlm.trainer.vlm.grpo.loss import completion_logps

        return np.array(completion_logps(self.network, self.batch(ids), self.inputs["input_ids"].size - 1)[0])

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Layers that are computed again in the backward pass; mlx-vlm changes their classes, which is undone."""
        kinds = {type(module) for _, module in self.network.named_modules()}
        before = {kind: kind.__dict__["__call__"] for kind in kinds if "__call__" in kind.__dict__}
        self.task.checkpoint(self.network)
        try:
            yield
        finally:
            for kind, call in before.items():
                kind.__call__ = call


def rewards(count: int) -> list[float]:
    """Something that differs."""
    return np.random.default_rng(count).normal(size=count).tolist()


def difference(found: object, expected: object) -> float:
    """Relative, over all arrays of two gradients."""
    pairs = [(one, other) for (_, one), (_, other) in zip(tree_flatten(found), tree_flatten(expected), strict=True)]
    apart = sum(float(mx.sum((one - other) ** 2)) for one, other in pairs)
    return (apart / sum(float(mx.sum(other**2)) for _, other in pairs)) ** 0.5


def gradients_apart(ours: Ours, peer: Peer) -> float:
    """How far our gradient of our completions is from the peer's, relative."""
    made = ours.sample()
    earned = advantages(np.array(rewards(ours.size)))
    found = ours.gradient(made)
    return difference(found, peer.gradient(peer.samples([one.ids for one in made.completions], earned.tolist())))


def logprobs_apart(ours: Ours, peer: Peer, made: Rollout, other: Mapping[str, Any]) -> float:
    """How far log-probs are apart on average: of one of our completions, as drawn, and of one of theirs."""
    drawn = made.completions[0]
    length = len(ours.prompt.ids)
    theirs = np.array(other["samples"][0]["batch"]["input_ids"][0, length:]).astype(np.int32)
    unknown = Completion(ids=theirs, logprobs=np.zeros(len(theirs), np.float32), text="", truncated=True)
    scored = group_logprobs(ours.model, Rollout(prompt=made.prompt, completions=(unknown,)))[0]
    pairs = [(drawn.logprobs, peer.logprobs(drawn.ids)), (scored, peer.logprobs(theirs))]
    return max(float(np.abs(one - two).mean()) for one, two in pairs)


class Meter:
    """Seconds and bytes of the parts of a step."""

    def __init__(self) -> None:
        """Begin with an allocator that keeps nothing for later."""
        gc.collect()
        mx.synchronize()
        mx.clear_cache()
        self._before = mx.get_active_memory()
        self.seconds: dict[str, float] = {}
        self.gib: dict[str, float] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Do a part of the step; what it needs of the parts before counts as held."""
        mx.synchronize()
        mx.reset_peak_memory()
        started = time.perf_counter()
        result = work()
        mx.synchronize()
        self.seconds[name] = time.perf_counter() - started
        self.gib[name] = (mx.get_peak_memory() - self._before) / GIB
        return result


def our_step(ours: Ours, ways: Sequence[str]) -> tuple[Meter, Rollout]:
    """One rollout, and its gradient in the ways asked for."""
    meter = Meter()
    made = meter.run("rollout", ours.sample)
    for way in ways:
        mx.clear_cache()
        meter.run(WAYS[way], lambda way=way: ours.gradient(made, checkpoint=way == "again"))
    return meter, made


def peer_step(peer: Peer, *, checkpoint: bool) -> tuple[Meter, dict[str, Any]]:
    """One rollout and its gradient, and once more with checkpoints if asked for."""
    meter = Meter()
    made = meter.run("rollout", peer.sample)
    meter.run("gradient", lambda: peer.gradient(made))
    if checkpoint:
        mx.clear_cache()
        with peer.recomputing():
            meter.run("again", lambda: peer.gradient(made))
    return meter, made


def summary(meters: Sequence[Meter], times: float = 1.0) -> dict[str, dict[str, float]]:
    """Median seconds, and the most memory, of each part and of whole steps."""
    seconds: dict[str, list[float]] = {}
    gib: dict[str, list[float]] = {}
    for meter in meters:
        for name, value in meter.seconds.items():
            seconds.setdefault(name, []).append(value * times)
            gib.setdefault(name, []).append(meter.gib[name])
        for name, part in (("step", "gradient"), ("step_again", "again")):
            if part in meter.seconds:
                seconds.setdefault(name, []).append((meter.seconds["rollout"] + meter.seconds[part]) * times)
                gib.setdefault(name, []).append(max(meter.gib["rollout"], meter.gib[part]))
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "gib": {name: max(values) for name, values in gib.items()},
    }


def measure(
    model: VideoModel, prompt: Prompt, size: int, options: argparse.Namespace, allowed: float
) -> dict[str, Any]:
    """Steps of both sides in turn: a row of the table."""
    ours = Ours(model, prompt, size, options.tokens)
    count = min(size, options.peer_completions or size)
    peer = None if options.no_peer else Peer(model, prompt, count, options.tokens)
    mine: list[Meter] = []
    theirs: list[Meter] = []
    row: dict[str, Any] = {
        "prompt": len(prompt.ids),
        "visual": int(prompt.media_mask.sum()),
        "group": size,
        "tokens": options.tokens,
        "weights_gib": mx.get_active_memory() / GIB,
    }
    our_step(Ours(model, prompt, size, 2), options.ways)
    if peer is not None:
        peer_step(Peer(model, prompt, 2, 2), checkpoint=options.peer_checkpoint)
    for repeat in range(options.repeats):
        meter, made = our_step(ours, options.ways)
        mine.append(meter)
        assert {len(one.ids) for one in made.completions} == {options.tokens}
        if peer is None:
            continue
        meter, other = peer_step(peer, checkpoint=options.peer_checkpoint)
        theirs.append(meter)
        assert {one["batch"]["input_ids"].shape[1] - len(prompt.ids) for one in other["samples"]} == {options.tokens}
        if repeat == 0:
            row["logprobs_apart"] = logprobs_apart(ours, peer, made, other)
            if row["logprobs_apart"] > allowed:
                raise SystemExit(f"log-probs differ by {row['logprobs_apart']:.1e}: the times mean nothing")
        del made, other
    row["ours"] = summary(mine)
    if theirs:
        row["peer"] = {**summary(theirs, size / count), "completions_run": count}
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: seconds with GiB behind them, and how many times faster a step is."""
    lines = [
        "| prompt | G | rollout | mlx-vlm | gradient | again | mlx-vlm | step | mlx-vlm | faster, and with again |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def cell(side: Mapping[str, Any] | None, name: str) -> str:
        if side is None or name not in side["seconds"]:
            return "-"
        return f"{side['seconds'][name]:.2f} s, {side['gib'][name]:.2f}"

    for row in rows:
        ours, peer = row["ours"], row.get("peer")
        cells = [f"{row['prompt']:,}", str(row["group"]), cell(ours, "rollout"), cell(peer, "rollout")]
        cells += [cell(ours, "gradient"), cell(ours, "again"), cell(peer, "gradient")]
        cells += [cell(ours, "step"), cell(peer, "step")]
        steps = [ours["seconds"][name] for name in ("step", "step_again") if name in ours["seconds"]]
        faster = [peer["seconds"]["step"] / seconds for seconds in steps] if peer else []
        cells.append(", ".join(f"{value:.1f}x" for value in faster) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def findings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What grows with the group, and who holds more memory."""
    lines: list[str] = []
    for prompt in sorted({row["prompt"] for row in rows}):
        own = {row["group"]: row for row in rows if row["prompt"] == prompt}
        few, many = min(own), max(own)
        if few < many:
            seconds = [own[size]["ours"]["seconds"] for size in (few, many)]
            times = {way: seconds[1][way] / seconds[0][way] for way in WAYS.values() if way in seconds[0]}
            told = " and with ".join(f"{way} {value:.2f}" for way, value in times.items())
            lines.append(f"P={prompt}: G={many} costs, times G={few}: {told}")
    for row in rows:
        if "peer" not in row:
            continue
        ours, peer = row["ours"]["gib"], row["peer"]["gib"]
        shares = [f"{name} {ours[name] / peer['step']:.2f}" for name in ("step", "step_again") if name in ours]
        line = f"P={row['prompt']} G={row['group']}: peak in shares of mlx-vlm's: {', '.join(shares)}"
        if "step_again" in peer and "step_again" in ours:
            faster = row["peer"]["seconds"]["step_again"] / row["ours"]["seconds"]["step_again"]
            line += f"; both with again: {ours['step_again'] / peer['step_again']:.2f}, {faster:.1f}x faster"
        lines.append(f"{line}; log-probs differ by {row['logprobs_apart']:.1e}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.grpo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="mid")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="tokens of a prompt")
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8, 16], help="completions of a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="of each completion")
    parser.add_argument("--media", choices=("image", "video"), default="image", help="what the prompt shows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="our gradient's")
    parser.add_argument("--peer-completions", type=int, default=0, metavar="N", help="run N of mlx-vlm's; 0: all")
    parser.add_argument("--no-peer", action="store_true", help="measure only our own way")
    parser.add_argument("--peer-checkpoint", action="store_true", help="also mlx-vlm's gradient with its checkpoints")
    parser.add_argument("--memory-limit", type=float, metavar="GB", help="what MLX tries not to hold more than")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a row")
    options = parser.parse_args(argv)
    if options.peer_completions == 1 or min(options.groups) < 2:
        parser.error("a group has at least two completions")
    if mx.default_device() == mx.Device(mx.cpu):
        mx.disable_compile()
    model = make_model(options.shape)
    attach(model, LORA[options.shape], seed=0)
    for index, layer in enumerate(find_layers(model.network).values()):
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(index)) * 0.02
    mx.eval(model.network.parameters())
    mx.clear_cache()
    print(f"weights {mx.get_active_memory() / GIB:.2f} GiB")
    gradients_allowed, logprobs_allowed = APART[options.shape]
    if not options.no_peer:
        prompt, size = make_prompt(model, options.shape, min(options.prompts), options.media), min(options.groups)
        sides = Ours(model, prompt, size, options.tokens), Peer(model, prompt, size, options.tokens)
        apart = gradients_apart(*sides)
        del sides
        print(f"the two gradients differ by {apart:.1e}")
        if apart > gradients_allowed:
            raise SystemExit("they must not: the times mean nothing")
    if options.json:
        options.json.write_text("", encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for length in options.prompts:
        prompt = make_prompt(model, options.shape, length, options.media)
        for size in options.groups:
            with limited(options.memory_limit):
                rows.append(measure(model, prompt, size, options, logprobs_allowed))
            print("\n".join(table(rows)[0 if len(rows) == 1 else -1 :]), flush=True)
            if options.json:
                with options.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print("\n".join(findings(rows)))


if __name__ == "__main__":
    main()
