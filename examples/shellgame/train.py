"""Train the bundled checkpoint from scratch: `python -m shellgame.train --out OUT`.

A pool of examples is made by forked workers while the model is built and compiled. Each step draws a bucket (frame size
and clip length), draws rows of it, renders their frames on the GPU and takes one step; on CUDA the whole step is one
captured graph. Matrices learn by Muon, everything else by AdamW, at a rate that is constant for the first 30% of the
time and falls linearly after that. The result is written in bfloat16, as transformers writes it, beside
`training.json`.
"""

import argparse
import copy
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from .muon import Muon
from .pool import (
    LONGEST_TAIL,
    ROW_KINDS,
    Bucket,
    Pool,
    evaluation_example,
    fill,
    join,
    longest_row,
    make_buckets,
    training_example,
)
from .rendering import paint, pixel_centres, random_lighting
from .tokens import IGNORED, Codec, build_tokenizer
from .torch_model import FastQwen3VL, Layout, Size, initialise, make_config, vary


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line; the defaults are the recipe of the bundled checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    add("--seconds", type=float, default=220.0, help="training time, without start-up and compilation")
    add("--steps", type=int, default=None, help="stop after so many steps instead (for trying things out)")
    add("--keep-at", type=float, nargs="*", default=(), metavar="S", help="also write snapshots at these seconds")
    add("--batch", type=int, default=128)
    add("--rows", type=int, default=800_000, help="examples in the pool")
    add("--workers", type=int, default=os.cpu_count())
    add("--hidden", type=int, default=Size.hidden)
    add("--layers", type=int, default=Size.layers)
    add("--vision-hidden", type=int, default=Size.vision_hidden)
    add("--vision-layers", type=int, default=Size.vision_layers)
    add("--muon-rate", type=float, default=3e-3)
    add("--adam-rate", type=float, default=1.5e-3)
    add("--decay", type=float, default=0.05)
    add("--warmup", type=int, default=300, help="steps")
    add("--report-every", type=float, default=20.0, help="seconds")
    add("--lengths", type=int, nargs=2, default=(7, 16), metavar=("LEAST", "MOST"), help="pairs of frames of a clip")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


class Lane:
    """One bucket on the device: its rows, its layout, and the captured step that learns from them."""

    def __init__(self, pool: Pool, device: str, batch: int) -> None:
        self.bucket, self.rows, self.batch = pool.bucket, pool.rows, batch
        self.data = {name: torch.from_numpy(array).to(device) for name, array in pool.arrays.items()}
        learned = pool.arrays["labels"] != IGNORED
        self.start = int(learned.argmax(1).min()) - 1  # nothing before is learned by any row
        self.layout = Layout(self.bucket.height, self.bucket.width, device)
        self.pixels = [vary(grid, 0) for grid in pixel_centres(self.bucket.height, self.bucket.width, device)]
        self.index = torch.zeros(batch, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def draw(self) -> None:
        """Choose the rows of the next step."""
        self.index.copy_(torch.randint(0, self.rows, (self.batch,)), non_blocking=True)


class Trainer:
    """The network, its optimisers, and one step on a lane."""

    def __init__(self, options: argparse.Namespace, codec: Codec, device: str) -> None:
        from transformers import Qwen3VLForConditionalGeneration

        size = Size(options.hidden, options.layers, options.vision_hidden, options.vision_layers)
        self.device, self.options, self.codec = device, options, codec
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.module = Qwen3VLForConditionalGeneration(make_config(size, codec.size, codec.special)).to(torch.float32)
        initialise(self.module, options.seed)
        self.module.to(device)
        compiler: Callable = torch.compile if options.compile else lambda function: function
        self.network = FastQwen3VL(
            self.module, size, codec.special["<|video_pad|>"], dtype=self.dtype, compiler=compiler
        )
        self.paint = compiler(paint)
        self.loss = torch.zeros((), device=device)
        self._make_optimisers()

    def _make_optimisers(self) -> None:
        named = list(self.network.weights.items())
        self.parameters = [p for _, p in named]
        matrices = [p for k, p in named if p.ndim == 2 and "embed" not in k]
        tables = [p for k, p in named if p.ndim > 1 and not (p.ndim == 2 and "embed" not in k)]
        vectors = [p for _, p in named if p.ndim <= 1]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.muon_rate = torch.tensor(0.0, device=self.device)
        self.adam_rate = torch.tensor(0.0, device=self.device)
        self.muon = Muon(matrices, self.muon_rate, decay=self.options.decay)
        groups = [
            {"params": tables, "weight_decay": self.options.decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        cuda = self.device == "cuda"
        self.adam = torch.optim.AdamW(groups, lr=self.adam_rate, betas=(0.9, 0.98), fused=cuda, capturable=cuda)

    def logits(self, lane: Lane) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, n, vocabulary) logits and (batch, n) labels of the rows that the lane has drawn."""
        rows = {name: values[lane.index] for name, values in lane.data.items()}
        light = random_lighting(rows["color"].long())
        shape = (lane.batch, lane.bucket.pairs, 4 * lane.layout.tokens, 3, 2, 16, 16)
        noise = torch.randn(shape, device=self.device, dtype=self.dtype)
        patches = self.paint(
            *lane.pixels, vary(rows["places"].float(), 1), rows["radius"], rows["outline"], rows["scale"],
            light.colors, light.background, light.slope, light.softness, light.chroma_softness,
            light.gain, light.offset, light.noise, vary(noise, 1, 2),
        )  # fmt: skip
        logits = self.network.logits(rows["ids"].long(), patches, lane.layout, lane.start)
        return logits, rows["labels"][:, lane.start + 1 :].long()

    def step(self, lane: Lane) -> None:
        """One step of learning, eagerly."""
        torch._foreach_zero_([p.grad for p in self.parameters])
        logits, labels = self.logits(lane)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.adam.step()
        self.muon.step()
        self.loss.copy_(loss.detach())

    def capture(self, lanes: list[Lane], say: Callable) -> None:
        """Turn the step on each lane into a CUDA graph; all share one memory pool, since none outlives its replay."""
        memory = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for lane in sorted(lanes, key=lambda lane: lane.bucket.pairs != 10):  # 10: equal to no other axis
                for _ in range(2):
                    lane.draw()
                    self.step(lane)
                torch.cuda.synchronize()
                say("warm", lane.bucket.pairs, lane.bucket.height, lane.bucket.width, round(float(self.loss), 3))
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()
        for lane in lanes:
            lane.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(lane.graph, pool=memory):
                self.step(lane)
        say("captured", len(lanes), "graphs, GB in use", round(torch.cuda.max_memory_allocated() / 2**30, 1))

    def set_rates(self, step: int, done: float) -> None:
        """The schedule: warm-up by steps, then constant to 30% of the time, then down to 2%."""
        scale = min(1.0, (step + 1) / self.options.warmup) * min(1.0, max(0.02, (1 - done) / 0.7))
        self.muon_rate.fill_(self.options.muon_rate * scale)
        self.adam_rate.fill_(self.options.adam_rate * scale)

    @torch.no_grad()
    def measure(self, lanes: list[Lane]) -> dict[str, list[float]]:
        """Teacher-forced figures of each kind of question.

        Rows, first answer right, its confidence, share of confidences of at least 0.97, and the share of rows whose
        every token after the first answer is right.
        """
        found = defaultdict(list)
        for lane in lanes:
            for begin in range(0, lane.rows - lane.batch + 1, lane.batch):
                lane.index.copy_(torch.arange(begin, begin + lane.batch))
                for key, value in self._judge(lane):
                    found[key].append(value)
        return {
            key: [len(values), *(round(float(np.mean(column)), 3) for column in zip(*values))]
            for key, values in sorted(found.items())
        }

    def _judge(self, lane: Lane) -> list[tuple[str, tuple[bool, float, bool, bool]]]:
        logits, labels = self.logits(lane)
        top, guess = logits.float().log_softmax(-1).max(-1)
        learned = labels != IGNORED
        right = (guess == labels) | ~learned
        place = torch.arange(labels.shape[1], device=self.device)[None] + lane.start + 1
        begin, end = lane.data["first"][lane.index].long().split(1, 1)
        first = (place >= begin) & (place < end) & learned
        confidence = ((top * first).sum(1) / first.sum(1).clamp(min=1)).exp().tolist()
        first_right, rest_right = (right | ~first).all(1).tolist(), (right | (place < end)).all(1).tolist()
        kinds, swaps = lane.data["kind"][lane.index].tolist(), lane.data["swaps"][lane.index].tolist()
        names = [f"{ROW_KINDS[k]} {n}" if ROW_KINDS[k] in _BY_SWAPS else ROW_KINDS[k] for k, n in zip(kinds, swaps)]
        return [(k, (a, c, c >= 0.97, b)) for k, a, c, b in zip(names, first_right, confidence, rest_right)]


_BY_SWAPS = ("final_cup", "held_out", "count")


def make_pools(codec: Codec, buckets: list[Bucket], rows: int) -> list[Pool]:
    """Pools for the buckets: half of all rows are square, the rest is shared by the other sizes."""
    square = sum(b.height == b.width for b in buckets)
    other = len(buckets) - square
    share = [0.5 / square if b.height == b.width else 0.5 / other for b in buckets]
    return [Pool(b, max(64, int(rows * s)), longest_row(codec, b)) for b, s in zip(buckets, share)]


def train(trainer: Trainer, lanes: list[Lane], checks: list[Lane], say: Callable) -> dict:
    """Run the steps; returns what happened."""
    options = trainer.options
    keep = sorted(options.keep_at)
    rng = np.random.default_rng(options.seed)
    weights = np.array([lane.rows for lane in lanes], dtype=float)
    order = rng.choice(len(lanes), size=1 << 20, p=weights / weights.sum())
    begin = last = time.time()
    step, last_step, done, history = 0, 0, 0.0, []
    while done < 1:
        lane = lanes[order[step % len(order)]]
        trainer.set_rates(step, done)
        lane.draw()
        if lane.graph is not None:
            lane.graph.replay()
        else:
            trainer.step(lane)
        step += 1
        if options.steps is not None:
            done = step / options.steps
        if step % 10:
            continue
        if trainer.device == "cuda":
            torch.cuda.synchronize()
        now = time.time()
        if options.steps is None:
            done = (now - begin) / options.seconds
        if keep and now - begin >= keep[0]:
            folder = options.out / f"at_{keep.pop(0):g}s"
            save(trainer, folder / "checkpoint")
            say("snapshot", folder, "at step", step)
        if now - last > options.report_every:
            rate, loss = (step - last_step) / (now - last), float(trainer.loss)
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss is {loss} at step {step}")
            entry = {"step": step, "seconds": round(now - begin, 1), "rate": round(rate, 1), "loss": round(loss, 4)}
            entry["figures"] = {k: v[1:] for k, v in trainer.measure(checks[:3]).items()}
            history.append(entry)
            say(json.dumps(entry))
            last, last_step = time.time(), step
    return {"steps": step, "seconds": round(time.time() - begin, 1), "history": history}


def save(trainer: Trainer, folder: Path) -> None:
    """Write the network as transformers does, in bfloat16, with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    special = trainer.codec.special
    trainer.module.generation_config.eos_token_id = special["<|im_end|>"]
    trainer.module.generation_config.pad_token_id = special["<|endoftext|>"]
    copy.deepcopy(trainer.module).to(torch.bfloat16).save_pretrained(folder)
    trainer.codec.tokenizer.save(str(folder / "tokenizer.json"))


def main(argv: list[str] | None = None) -> int:
    """Train, measure, save."""
    options, begin = parse(argv), time.time()

    def say(*words: object) -> None:
        print(f"[{time.time() - begin:6.1f}]", *words, flush=True)

    torch.manual_seed(options.seed)
    torch._dynamo.config.cache_size_limit = 64
    torch.backends.cuda.matmul.allow_tf32 = True
    codec = Codec(build_tokenizer())
    buckets = make_buckets(*options.lengths)
    pools = make_pools(codec, buckets, options.rows)
    check_pools = [Pool(b, 2 * options.batch, longest_row(codec, b)) for b in buckets[-1::-4]]
    children = fill(check_pools, codec, 2 + 10 * options.seed, workers=2, guess_span=0.0, make=evaluation_example)
    children += fill(
        pools, codec, 1 + 10 * options.seed, workers=options.workers, guess_span=0.5, make=training_example
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"  # after the forks: a child can't share a CUDA context
    trainer = Trainer(options, codec, device)
    parameters = sum(p.numel() for p in trainer.parameters)
    say(f"{parameters / 1e6:.2f} M parameters, vocabulary {codec.size}, tail {LONGEST_TAIL}, {len(buckets)} buckets")
    join(children)
    say("examples made:", options.rows)
    lanes = [Lane(pool, device, options.batch) for pool in pools]
    checks = [Lane(pool, device, options.batch) for pool in check_pools]
    trainer.set_rates(0, 0.999)
    if device == "cuda":
        trainer.capture(lanes, say)
    outcome = train(trainer, lanes, checks, say)
    outcome["final"] = trainer.measure(checks)
    outcome["parameters"], outcome["device"] = parameters, torch.cuda.get_device_name() if device == "cuda" else "cpu"
    outcome["options"] = {name: value for name, value in vars(options).items() if name != "out"}
    for kind, figures in outcome["final"].items():
        say(f"{kind:16s}", figures)
    save(trainer, options.out / "checkpoint")
    outcome["wall_seconds"] = round(time.time() - begin, 1)
    (options.out / "training.json").write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    say(f"{outcome['steps']} steps in {outcome['seconds']} s; written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
