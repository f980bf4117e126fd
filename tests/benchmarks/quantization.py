"""How far quantization moves the first answer: confidence, exits, and what the recipes' defaults rest on.

    python -m tests.benchmarks.quantization --clips DIR [--table bits|kept|modes|auto|answers|random] [--count 300]

The bundled checkpoint is asked about held-out clips of its own world, written to DIR if it has none. Every scheme
quantizes MLX's way and keeps scales in bfloat16, as a conversion does; the numbers that come back from packed weights,
in bfloat16, then run in float32. First answers decide confidence and exits, so the sweeps read those alone: the answer
of the unquantized checkpoint is given, and where a scheme would have written another token, its own answer is written
out. `--table answers` lets a few schemes think to the end.

The language model runs on transformers (torch, float32): on a CPU MLX takes exponentials one at a time, and a scheme
took two to three times as long. A run begins by comparing both.

Clips of one seed choose, clips of another report: a scheme picked on the clips that it is judged by looks better than
it is.
"""

import argparse
import functools
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from examples.shellgame.evaluate import load_rows
from mlxvr.answering.confidence import score_first_answer
from mlxvr.answering.loop import Outcome, run_answer_loop
from mlxvr.checkpoint import recipe as recipes
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.checkpoint.recipe import Precision, Quantization, Rule
from mlxvr.conversion.measure import knapsack, mixed_precision
from mlxvr.conversion.measure.verify import compare_logits
from mlxvr.conversion.source import Checkpoint
from mlxvr.conversion.tensor_plan import make_plan
from mlxvr.media import load_vision
from mlxvr.model.decode import decode, prefill
from mlxvr.model.loading import load_model
from mlxvr.model.network import VisionFeatures
from mlxvr.model.prompt import Prompt, build_prompt
from tests.checkpoints import FAMILIES, random_media, write_checkpoint
from tests.reference import Reference

THRESHOLD = 0.97
LONGEST_FIRST = 24  # tokens of a first answer at most
RECOMMENDED = Quantization(
    bits=4,
    rules=(Rule(match="language_model.model.embed_tokens", min_bits=8), Rule(match="*.mlp.down_proj", min_bits=6)),
)
Stored = Mapping[str, Precision | None]


@dataclass(frozen=True, eq=False)
class Asked:
    """A question, and what the unquantized model answers: its tokens, their distributions, its confidence."""

    clip: int
    prompt: Prompt
    truth: str
    ids: tuple[int, ...] = ()
    logprobs: np.ndarray | None = None  # (tokens, vocab)
    confidence: float = 0.0
    first: str | None = None


@dataclass(frozen=True, eq=False)
class Figures:
    """What a scheme does to the first answers of all questions.

    Attributes:
        bits_per_weight: of the whole network, scales and unquantized parts included.
        language_bits: the same of the language model alone.
        confidences: of each question, 0 where there is none.
        drift: mean |difference of confidence|; `spread` is its standard error.
        flips: questions whose decision to exit turned; `to_exit` are those that now exit.
        interval: Wilson's 95% interval of their share.
        direct: share of right first answers.
        wrong_exits: share of questions that exit with a wrong answer.
        kl: nats for a token of the first answer.
        top1: share of its tokens that are still the likeliest.
    """

    bits_per_weight: float
    language_bits: float
    confidences: np.ndarray
    drift: float
    spread: float
    worst: float
    flips: int
    to_exit: int
    interval: tuple[float, float]
    direct: float
    wrong_exits: float
    kl: float
    top1: float


class Bench:
    """A checkpoint, its questions, and weights that can be put in and taken out."""

    def __init__(self, folder: Path, clips: Path, records: Sequence[dict[str, Any]]):
        """Read the clips, run the unquantized vision tower over each, and let the unquantized model answer."""
        self.folder = folder
        self.checkpoint = Checkpoint.open(folder)
        torch.set_num_threads(1)  # more of them wait for each other where the machine has other work
        self.model = load_model(folder, dtype="float32")
        self.original = {path: module.weight for path, module in _matrices(load_model(folder).network).items()}
        self._modules = _matrices(self.model.network)
        self._torch = Reference(folder, self.model.family.name).model
        self._inner = self._torch.model.language_model
        self._now: dict[str, Precision | None] = {}
        self._seen: dict[tuple[Any, ...], list[tuple[np.ndarray, ...]]] = {}
        self.media, self.asked = [], []
        opened = ""
        for record in records:
            if record["video"] != opened:
                opened = record["video"]
                self.media.append(load_vision(clips / opened, self.model.spec))
            draft = self.model.tokenizer.encode(f"\\boxed{{{record['answer']}}}<think>")
            self.asked.append(Asked(len(self.media) - 1, self._prompt(record), record["answer"], tuple(draft)))
        self._compare()
        self.asked = self._first_answers(self.asked)

    def stored(self, quantization: Quantization) -> Stored:
        """How each matrix is stored under a recipe's words."""
        plan = make_plan(self.checkpoint, quantization.precision, quantization.dtype)
        return plan.stored

    def nbytes(self, stored: Stored, *, language: bool = False) -> int:
        """Size of all tensors of a conversion, or of the language model's alone."""
        plan = make_plan(self.checkpoint, stored.get, "bfloat16")
        jobs = [job for job in plan.jobs if not language or not self.model.family.is_vision(job.source.key)]
        return sum(output.nbytes for job in jobs for output in job.outputs)

    def measure(self, stored: Stored) -> Figures:
        """Put a scheme's weights in and ask every question."""
        self._apply(stored)
        logits = self._forced(self.asked, self._features(stored))
        kl, top1, confidences, firsts = [], [], np.zeros(len(self.asked)), [one.first for one in self.asked]
        other = []
        for index, (one, logprobs) in enumerate(zip(self.asked, logits, strict=True)):
            kl.append(float((np.exp(one.logprobs) * (one.logprobs - logprobs)).sum(-1).mean()))
            likeliest = logprobs.argmax(-1) == np.array(one.ids)
            top1.append(float(likeliest.mean()))
            if likeliest.all():
                taken = logprobs[np.arange(len(one.ids)), list(one.ids)]
                scored = score_first_answer(one.ids, taken.tolist(), self.model.tokenizer.decode)
                confidences[index] = 0.0 if scored is None else scored.confidence
            else:
                other.append(index)
        for index, own in zip(other, self._first_answers([self.asked[index] for index in other]), strict=True):
            confidences[index], firsts[index] = own.confidence, own.first
        return self._sum_up(stored, confidences, firsts, float(np.mean(kl)), float(np.mean(top1)))

    def think(self, stored: Stored, confidences: np.ndarray) -> float:
        """Accuracy in mode auto: questions that do not exit are reasoned about with MLX, to the end."""
        self._apply(stored)
        for path, module in self._modules.items():
            module.weight = _as_stored(self.original[path], stored.get(path)).astype(mx.float32)
        features = self._features(stored)
        right = 0
        for one, own, confidence in zip(self.asked, self._firsts, confidences, strict=True):
            if confidence >= THRESHOLD:
                right += own == one.truth
                continue
            right += self._second(one, features[one.clip]) == one.truth
        return right / len(self.asked)

    def alignment(self, low: Precision, high: Precision) -> dict[str, float]:
        """Gradient of KL(original || all modules at `low`) times the difference of roundings to `low` and `high`."""
        modules = [path for path in self.original if not path.startswith("vision_tower.")]
        self._apply(dict.fromkeys(modules, low))
        owners = [self._inner.get_submodule(path.removeprefix("language_model.model.")) for path in modules]
        weights = [owner.weight.requires_grad_() for owner in owners]
        sums = [torch.zeros_like(weight) for weight in weights]
        for one in self.asked:
            rows = self._rows([one], self._features({}))[0]
            expected = torch.from_numpy(one.logprobs)
            kl = (expected.exp() * (expected - rows)).sum(-1).mean()
            for total, gradient in zip(sums, torch.autograd.grad(kl, weights), strict=True):
                total += gradient
        found = {}
        for path, total in zip(modules, sums, strict=True):
            apart = [_as_stored(self.original[path], one).astype(mx.float32) for one in (low, high)]
            step = torch.from_numpy(np.array(apart[0] - apart[1]))
            found[path] = float((total * step).sum()) / total.numel()
        return found

    def _sum_up(
        self, stored: Stored, confidences: np.ndarray, firsts: Sequence[str | None], kl: float, top1: float
    ) -> Figures:
        self._firsts = list(firsts)
        before = np.array([one.confidence for one in self.asked])
        drift = np.abs(confidences - before)
        exits, exited = confidences >= THRESHOLD, before >= THRESHOLD
        right = np.array([first == one.truth for first, one in zip(firsts, self.asked)])
        sizes = {
            job.source.key: math.prod(job.source.shape)
            for job in make_plan(self.checkpoint, stored.get, "bfloat16").jobs
        }
        language = sum(size for key, size in sizes.items() if not self.model.family.is_vision(key))
        flips = int((exits != exited).sum())
        return Figures(
            bits_per_weight=8 * self.nbytes(stored) / sum(sizes.values()),
            language_bits=8 * self.nbytes(stored, language=True) / language,
            confidences=confidences,
            drift=float(drift.mean()),
            spread=float(drift.std(ddof=1) / math.sqrt(len(drift))),
            worst=float(drift.max()),
            flips=flips,
            to_exit=int((exits & ~exited).sum()),
            interval=wilson(flips, len(drift)),
            direct=float(right.mean()),
            wrong_exits=float((exits & ~right).mean()),
            kl=kl,
            top1=top1,
        )

    def _prompt(self, record: Mapping[str, Any]) -> Prompt:
        model = self.model
        return build_prompt(
            model.tokenizer,
            model.family,
            model.config,
            [self.media[-1]],
            record["question"],
            options=record["options"],
            kind=record["kind"],
        )

    def _apply(self, stored: Stored) -> None:
        """Give torch's language model and MLX's vision tower the weights that a scheme leaves of the original ones."""
        for path, weight in self.original.items():
            precision = stored.get(path)
            if path in self._now and self._now[path] == precision:
                continue
            self._now[path] = precision
            values = _as_stored(weight, precision).astype(mx.float32)
            if path.startswith("vision_tower."):
                self._modules[path].weight = values
                continue
            name = path.removeprefix("language_model.").removeprefix("model.")
            owner = self._torch if name == "lm_head" else self._inner
            owner.get_submodule(name).weight.data.copy_(torch.from_numpy(np.array(values)))

    def _features(self, stored: Stored) -> list[tuple[np.ndarray, ...]]:
        """What the scheme's vision tower sees in each clip: embeddings, then deepstack levels; kept for the next."""
        tower = tuple((path, one) for path, one in sorted(stored.items()) if path.startswith("vision_tower.") and one)
        if tower not in self._seen:
            for path in [path for path in self._seen if path]:
                del self._seen[path]  # one quantized tower's features at a time beside the unquantized one's
            encoded = [self.model.encode([one]) for one in self.media]
            self._seen[tower] = [tuple(np.array(a) for a in (one.embeds, *one.deepstack)) for one in encoded]
        return self._seen[tower]

    def _forced(self, asked: Sequence[Asked], features: Sequence[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
        """Log-probabilities (tokens, vocab) of what stands at each place of the given answers, in batches."""
        order = sorted(range(len(asked)), key=lambda index: len(asked[index].prompt.ids))
        found: dict[int, np.ndarray] = {}
        for first in range(0, len(order), 8):
            batch = order[first : first + 8]
            found |= zip(batch, self._batch([asked[index] for index in batch], features), strict=True)
        return [found[index] for index in range(len(asked))]

    @torch.no_grad()
    def _batch(self, asked: Sequence[Asked], features: Sequence[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
        return [rows.numpy() for rows in self._rows(asked, features)]

    def _rows(self, asked: Sequence[Asked], features: Sequence[tuple[np.ndarray, ...]]) -> list[torch.Tensor]:
        """Rows are filled up on the right, where causal attention does not look."""
        longest = max(len(one.prompt.ids) + len(one.ids) for one in asked)
        ids = np.zeros((len(asked), longest), np.int64)
        positions = np.zeros((3, len(asked), longest), np.int64)
        media = np.zeros((len(asked), longest), bool)
        for row, one in enumerate(asked):
            start, end = len(one.prompt.ids), len(one.prompt.ids) + len(one.ids)
            ids[row, :end] = [*one.prompt.ids, *one.ids]
            positions[:, row, :start] = one.prompt.positions
            positions[:, row, start:end] = one.prompt.next_position + np.arange(len(one.ids))
            media[row, :start] = one.prompt.media_mask
        embeds = self._inner.embed_tokens(torch.from_numpy(ids)).clone()
        levels = [torch.from_numpy(np.concatenate(level)) for level in zip(*(features[one.clip] for one in asked))]
        embeds[torch.from_numpy(media)] = levels[0]
        extra: dict[str, Any] = {}
        if len(levels) > 1:
            extra = {"visual_pos_masks": torch.from_numpy(media), "deepstack_visual_embeds": levels[1:]}
        out = self._inner(
            inputs_embeds=embeds, position_ids=torch.from_numpy(positions), use_cache=False, **extra
        ).last_hidden_state
        found = []
        for row, one in enumerate(asked):
            start = len(one.prompt.ids) - 1
            hidden = out[row, start : start + len(one.ids) + 1]
            found.append(torch.log_softmax(self._torch.lm_head(hidden), dim=-1)[: max(1, len(one.ids))])
        return found

    def _first_answers(self, asked: Sequence[Asked]) -> list[Asked]:
        """Write the greedy first answers of the weights that are in.

        What stands in `ids` is a draft: all of it is read at once, the part that greedy decoding would have written is
        kept, and the rest is tried again after the first token that differs.
        """
        features = self._features(self._now)
        answers, taken = list(asked), [0] * len(asked)
        still = list(range(len(answers)))
        while still:
            found = self._forced([answers[index] for index in still], features)
            for index, logprobs in zip(still, found, strict=True):
                answers[index], taken[index] = self._accept(answers[index], logprobs, taken[index])
            still = [index for index in still if taken[index]]
        return answers

    def _accept(self, one: Asked, logprobs: np.ndarray, taken: int) -> tuple[Asked, int]:
        """Keep what is greedy of a draft; also returns how many tokens are final, 0 once the first box is closed."""
        ids = list(one.ids)
        for at in range(taken, len(ids)):
            likeliest = int(logprobs[at].argmax())
            differs, ids[at] = likeliest != ids[at], likeliest
            if done := self._closed(replace(one, ids=tuple(ids[: at + 1])), logprobs[: at + 1]):
                return done, 0
            if differs:
                return replace(one, ids=tuple([*ids, 0][:LONGEST_FIRST])), at + 1
        return replace(one, ids=(*ids, 0)), len(ids)

    def _closed(self, one: Asked, logprobs: np.ndarray) -> Asked | None:
        """The scored answer when its first box is closed by its last token, or can no longer be."""
        chosen = logprobs[np.arange(len(one.ids)), list(one.ids)].tolist()
        outcome = Outcome()
        tokens = [_Token(*pair) for pair in zip(one.ids, chosen)]
        decoder = self.model.tokenizer.decode
        for _ in run_answer_loop(
            tokens, decoder, outcome, mode="direct", threshold=THRESHOLD, max_tokens=LONGEST_FIRST
        ):
            pass
        if not outcome.exited and one.ids[-1] not in self.model.eos_ids and len(one.ids) < LONGEST_FIRST:
            return None
        scored, transcript = outcome.scored, outcome.transcript
        return replace(
            one,
            logprobs=logprobs,
            confidence=0.0 if scored is None else scored.confidence,
            first=None if transcript is None else transcript.first,
        )

    def _second(self, one: Asked, seen: tuple[np.ndarray, ...]) -> str | None:
        """The second answer, written by MLX."""
        prompt = one.prompt
        features = VisionFeatures(mx.array(seen[0]), [mx.array(level) for level in seen[1:]])
        kv = self.model.make_cache()
        logits = prefill(self.model, prompt.ids, prompt.positions, kv, features=features, media_mask=prompt.media_mask)
        outcome, stop = Outcome(), self.model.eos_ids
        with closing(decode(self.model, logits, kv, prompt.next_position, max_tokens=400, stop_ids=stop)) as tokens:
            for _ in run_answer_loop(
                tokens,
                self.model.tokenizer.decode,
                outcome,
                mode="think",
                threshold=THRESHOLD,
                max_tokens=400,
                stop_ids=stop,
            ):
                pass
        return None if outcome.transcript is None else outcome.transcript.second

    def _compare(self) -> None:
        """The two libraries must give the same log-probabilities."""
        self._apply({})
        features = self._features({})
        one = replace(self.asked[0], ids=(0,))
        ours = self._forced([one], features)[0][-1]
        seen = features[one.clip]
        theirs = prefill(
            self.model,
            one.prompt.ids,
            one.prompt.positions,
            self.model.make_cache(),
            features=VisionFeatures(mx.array(seen[0]), [mx.array(level) for level in seen[1:]]),
            media_mask=one.prompt.media_mask,
        )
        difference = np.abs(np.array(theirs - mx.logsumexp(theirs)) - ours).max()
        if difference > 1e-3:
            raise RuntimeError(f"torch and MLX differ by {difference:.2g} nats before anything is quantized")


@dataclass(frozen=True, eq=False)
class _Token:
    id: int
    logprob: float


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927)."""
    z, share = 1.96, hits / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def _matrices(network: Any) -> dict[str, Any]:
    """Modules that hold a matrix, by path: what can be quantized."""
    return {path: one for path, one in network.named_modules() if "weight" in one and one.weight.ndim == 2}


def _as_stored(weight: mx.array, precision: Precision | None) -> mx.array:
    """What comes back from a stored matrix, in its dtype."""
    if precision is None:
        return weight
    how = {"group_size": precision.group_size, "bits": precision.bits, "mode": precision.mode}
    return mx.dequantize(*mx.quantize(weight, **how), **how)


def bundled_schemes() -> dict[str, dict[str, Quantization]]:
    """What is compared, by table."""
    embedding, down = "language_model.model.embed_tokens", "*.mlp.down_proj"
    first, last = "language_model.model.layers.0.*", "language_model.model.layers.4.*"

    def four(*rules: tuple[str, int], **changes: Any) -> Quantization:
        return Quantization(bits=4, rules=tuple(Rule(match=match, min_bits=bits) for match, bits in rules), **changes)

    uniform = {f"{bits} bits, groups of 64": Quantization(bits=bits) for bits in (8, 6, 5, 4, 3, 2)}
    small = {f"{bits} bits, groups of 32": Quantization(bits=bits, group_size=32) for bits in (4, 3, 2)}
    modes = {mode: Quantization().changed(mode=mode) for mode in ("mxfp8", "mxfp4", "nvfp4")}
    return {
        "bits": uniform | small,
        "modes": modes,
        "kept": {
            "4 bits": four(),
            "embedding 6": four((embedding, 6)),
            "embedding 8": four((embedding, 8)),
            "down_proj 6": four((down, 6)),
            "o_proj 6": four(("*.o_proj", 6)),
            "v_proj 6": four(("*.v_proj", 6)),
            "q_proj and k_proj 6": four(("*.[qk]_proj", 6)),
            "first layer 8": four((first, 8)),
            "last layer 8": four((last, 8)),
            "embedding 8, v_proj 6": four((embedding, 8), ("*.v_proj", 6)),
            "embedding 8, attention 6": four((embedding, 8), ("*.self_attn.*", 6)),
            "embedding 8, first layer 8": four((embedding, 8), (first, 8)),
            "embedding 8, first and last layer 8": four((embedding, 8), (first, 8), (last, 8)),
            "embedding 6, down_proj 6": four((embedding, 6), (down, 6)),
            "embedding 8, down_proj 5": four((embedding, 8), (down, 5)),
            "embedding 8, down_proj 6": RECOMMENDED,
            "vision tower 8, the rest unquantized": Quantization(bits=8, keep=("language_model.*",)),
            "vision tower 4, the rest unquantized": Quantization(bits=4, keep=("language_model.*",)),
        },
        "answers": {"unquantized": Quantization(bits=0), "4 bits": four(), "embedding 8, down_proj 6": RECOMMENDED},
    }


def chosen_schemes(bench: Bench) -> dict[str, Stored]:
    """At three sizes: a scheme of the same bits everywhere or of rules, mlx-lm's choice, and ours.

    Ours is measured on the bundled probes about clips, mlx-lm's on the questions of those clips; none is asked again.
    """
    free = replace(recipes.load("shellgame"), quantization=Quantization())  # its rules would be floors
    options = mixed_precision.candidates(bench.checkpoint, free)
    costs = mixed_precision.measure(bench.folder, options, probes=mixed_precision.clip_probes())
    rest = bench.nbytes({}) - sum(own[-1].nbytes for own in options.values())
    clips = (demo_folder() / "clips.jsonl").read_text(encoding="utf-8")
    calibration = Bench(bench.folder, demo_folder(), [json.loads(line) for line in clips.splitlines()])
    found: dict[str, Stored] = {}
    for name, quantization, low in (
        ("4 bits", Quantization(bits=4), 3),
        ("embedding 8, down_proj 6", RECOMMENDED, 4),
        ("5 bits", Quantization(bits=5), 4),
    ):
        found[name] = bench.stored(quantization)
        size = bench.nbytes(found[name])
        items = [[(one.nbytes, cost) for one, cost in zip(options[m], costs[m])] for m in options]
        picks = knapsack.assign(items, size - rest)
        found[f"ours, at most as large as {name}"] = {m: options[m][pick].precision for m, pick in zip(options, picks)}
        found[f"mlx-lm's {low} or 8 bits, at most as large as {name}"] = choose_by_threshold(
            bench, calibration, low, size
        )
    return found


def choose_by_threshold(bench: Bench, calibration: Bench, low: int, size: int) -> Stored:
    """What `mlx_lm.quant.dynamic_quant` chooses between `low` and 8 bits: 8 above a threshold that fits the size.

    Its function for the sensitivities reads text and calls a language model with token ids, so the formula is taken
    over: the gradient of KL(original || all modules at the low precision) times the difference of the two roundings,
    for each weight of the module.
    """
    few, many = (Precision(bits=bits, group_size=64) for bits in (low, 8))
    alignment = calibration.alignment(few, many)
    stored: dict[str, Precision | None] = dict.fromkeys(alignment, few)
    for module in sorted(alignment, key=lambda one: -alignment[one]):
        raised = stored | {module: many}
        if bench.nbytes(raised) > size:
            break
        stored = raised
    return stored


def random_table() -> str:
    """Random checkpoints of 8 layers of 1,024 of both families: how far logits move."""
    lines = ["| | logits error | top-1 | KL | drift |", "|---|---|---|---|---|"]
    schemes = bundled_schemes()
    head = Quantization(bits=4, rules=tuple(Rule(match=m, min_bits=8) for m in ("*.embed_tokens", "*.lm_head")))
    down = replace(head, rules=(*head.rules, Rule(match="*.mlp.down_proj", min_bits=6)))
    chosen = {**schemes["bits"], "4 bits, groups of 128": Quantization(bits=4, group_size=128), **schemes["modes"]}
    chosen |= {"4 bits, embedding and head 8": head, "4 bits, embedding and head 8, down_proj 6": down}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            text = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "vocab_size": 4096}
            text |= {"num_attention_heads": 32, "num_key_value_heads": 8}
            write_checkpoint(Path(folder), family, dtype="BF16", text=text)
            model = load_model(folder, dtype="float32")
            plan = functools.partial(make_plan, Checkpoint.open(Path(folder)))
            original = {path: one.weight for path, one in _matrices(load_model(folder).network).items()}
            modules = _matrices(model.network)
            before = _random_logits(model, family)
            for name, quantization in chosen.items():
                stored = plan(quantization.precision, quantization.dtype).stored
                for path, module in modules.items():
                    module.weight = _as_stored(original[path], stored.get(path)).astype(mx.float32)
                after = _random_logits(model, family)
                apart = compare_logits(before, after)
                drift = np.mean([abs(_sure(before, i, before) - _sure(after, i, before)) for i in range(0, 64, 8)])
                lines.append(
                    f"| {family}: {name} | {apart.logits_error:.4f} | {apart.top1:.3f} | {apart.kl:.5f} | {drift:.4f} |"
                )
    return "\n".join(lines)


def _random_logits(model: Any, family: str) -> mx.array:
    """Float32 logits of 64 places after an image."""
    media = [random_media(family, "image", (1, 8, 8))]
    question = " ".join(str(number) for number in range(60))
    prompt = build_prompt(model.tokenizer, model.family, model.config, media, question)
    cache = model.make_cache()
    end = len(prompt.ids) - 64
    prefill(
        model,
        prompt.ids[:end],
        prompt.positions[:, :end],
        cache,
        features=model.encode(media),
        media_mask=prompt.media_mask[:end],
    )
    hidden = model.hidden(mx.array(prompt.ids[end:])[None], mx.array(prompt.positions[:, end:])[:, None], cache=cache)
    return model.logits(hidden)[0].astype(mx.float32)


def _sure(logits: mx.array, start: int, chosen: mx.array) -> float:
    """exp(mean log p) of the likeliest tokens under `chosen` at eight places."""
    rows = slice(start, start + 8)
    taken = mx.take_along_axis(logits[rows], mx.argmax(chosen[rows], axis=-1, keepdims=True), axis=-1)[:, 0]
    return float(mx.exp((taken - mx.logsumexp(logits[rows], axis=-1)).mean()).item())


def _row(name: str, found: Figures, count: int) -> str:
    low, high = found.interval
    return (
        f"| {name} | {found.bits_per_weight:.2f} | {found.language_bits:.2f} | "
        f"{found.drift:.4f} ± {1.96 * found.spread:.4f} | {found.worst:.3f} | "
        f"{found.flips} of {count} ({low:.1%} to {high:.1%}) | {found.kl:.5f} | {found.top1:.3f} |"
    )


HEADER = (
    "| | bits a weight | language model | drift | largest | exits flipped (95%) | KL | top-1 |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--clips", type=Path, help="folder of held-out clips; written if it has none")
    add("--table", choices=("bits", "kept", "modes", "auto", "answers", "random"), default="bits")
    add("--count", type=int, default=300, help="clips")
    add("--seed", type=int, default=102, help="of the clips")
    options = parser.parse_args(argv)
    if options.table == "random":
        print(random_table())
        return 0
    if options.clips is None:
        parser.error("--clips is needed for every table but random")
    records = load_rows(options.clips, seed=options.seed, count=options.count)
    videos = sorted({record["video"] for record in records})[: options.count]
    records = [record for record in records if record["video"] in videos]
    bench = Bench(demo_folder() / "checkpoint", options.clips, records)
    print(f"{len(videos)} clips, {len(records)} questions\n\n{HEADER}", flush=True)
    schemes: Mapping[str, Any] = chosen_schemes(bench) if options.table == "auto" else bundled_schemes()[options.table]
    for name, scheme in schemes.items():
        stored = bench.stored(scheme) if isinstance(scheme, Quantization) else scheme
        found = bench.measure(stored)
        print(_row(name, found, len(records)), flush=True)
        if options.table == "answers":
            accuracy = bench.think(stored, found.confidences)
            print(f"{name}: {accuracy:.4f} right in mode auto, {found.direct:.4f} direct", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
