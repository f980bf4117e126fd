"""What an answer costs: early exit, thinking, the public demo's way, follow-up questions, and mlx-vlm beside us.

    python -m tests.benchmarks.answers [--shape mid|8b] [--tokens 1536] [--repeats 5] [--json]

Runs on random weights and a random clip, all ways in turn in each repeat, so that a machine whose speed drifts slows
all of them; medians and ratios are printed. Shape `mid` is a Qwen3-VL of 8 layers of 512; `8b` is Qwen3-VL-8B's own
shape at 4 bits, for machines with the memory for it. Random weights close no box, so the length of the first answer (8
tokens) and of the reasoning (150) is set, and is the same for all.

The public demo stops at `<think>` and then runs prompt and video through the model a second time. mlx-vlm's generate
runs on the same weights and must write the same tokens.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxvr.model.decode import decode, prefill
from mlxvr.model.families.base import family_of
from mlxvr.model.network import VideoModel
from mlxvr.model.prefix import Prefix
from mlxvr.model.prompt import Prompt, build_prompt
from mlxvr.model.tokenizer import ChatTokenizer
from tests.checkpoints import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    make_config,
    random_media,
    text_settings,
    train_tokenizer,
    vision_settings,
)

FIRST, REASONING = 8, 150
SHAPES: dict[str, tuple[dict[str, object], dict[str, object], tuple[int, ...]]] = {
    "mid": (
        {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "vocab_size": 8192,
        },
        {
            "depth": 4,
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_heads": 3,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        (16, 16),
    ),
    "8b": (
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 262144,
            "vocab_size": 151936,
        },
        {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        (20, 36),  # 180 tokens a row
    ),
}


def make_model(shape: str) -> VideoModel:
    """A Qwen3-VL of this shape with random weights: float32, or for 8b bfloat16 with a language model of 4 bits."""
    text, vision, _ = SHAPES[shape]
    tokenizer = train_tokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    text = text_settings("qwen3_vl") | text | {"head_dim": 128}
    vision = vision_settings("qwen3_vl") | vision | {"out_hidden_size": text["hidden_size"]}
    raw = make_config("qwen3_vl", text, vision, ids)
    rope = {"mrope_section": [24, 20, 20], "rope_theta": 5e6, "rope_type": "default", "mrope_interleaved": True}
    raw["text_config"]["rope_parameters"] = rope
    family = family_of(raw)
    config = family.mlx_config(raw)
    network = family.build(config)
    if shape == "8b":
        network.set_dtype(mx.bfloat16)
        nn.quantize(network.language_model, group_size=64, bits=4)
    mx.eval(network.parameters())
    mx.clear_cache()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        chat = ChatTokenizer(Path(folder) / "tokenizer.json", chat_template=CHAT_TEMPLATE)
    chat.eos_ids = frozenset()  # nothing ends an answer but its length
    return VideoModel(network, family, config, spec=family.vision_spec(config), tokenizer=chat)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes, with the device idle before and after."""
    mx.synchronize()
    started = time.perf_counter()
    work()
    mx.synchronize()
    return time.perf_counter() - started


class Ways:
    """The ways to get an answer, on one model and one clip."""

    def __init__(self, shape: str, tokens: int):
        self.model = make_model(shape)
        height, width = SHAPES[shape][2]
        rows = max(1, tokens * 4 // (height * width))
        self.media = [random_media("qwen3_vl", "video", (rows, height, width))]
        self.prompt = self.ask("What happens at the end of the clip, and who is there to see it?")
        self.other = self.ask("Which?")

    def ask(self, question: str) -> Prompt:
        """A prompt about the clip."""
        model = self.model
        return build_prompt(model.tokenizer, model.family, model.config, self.media, question)

    def _read(self) -> tuple[list[object], mx.array]:
        model, prompt = self.model, self.prompt
        features = model.encode(prompt.media)
        cache = model.make_cache()
        logits = prefill(model, prompt.ids, prompt.positions, cache, features=features, media_mask=prompt.media_mask)
        return cache, logits

    def _write(self, cache: list[object], logits: mx.array, prompt: Prompt, count: int) -> list[int]:
        tokens = decode(self.model, logits, cache, prompt.next_position, max_tokens=count)
        return [token.id for token in tokens]

    def least(self) -> list[int]:
        """Prefill and the tokens of the first answer, nothing else."""
        cache, logits = self._read()
        return self._write(cache, logits, self.prompt, FIRST)

    def _answer(self, count: int) -> list[int]:
        prefix, _ = Prefix.compute(self.model, self.prompt)
        logits = prefix.extend(self.model, self.prompt)
        return self._write(prefix.cache, logits, self.prompt, count)

    def early_exit(self) -> list[int]:
        """As a reasoner answers directly: the shared prefix, the question, the first answer."""
        return self._answer(FIRST)

    def think(self) -> list[int]:
        """As a reasoner thinks: the same, and on from the same cache."""
        return self._answer(FIRST + REASONING)

    def two_passes(self) -> list[int]:
        """The public demo's way: a first answer, then everything anew for the reasoning."""
        self.least()
        cache, logits = self._read()
        return self._write(cache, logits, self.prompt, FIRST + REASONING)

    def follow_up(self) -> Callable[[], object]:
        """Another question on a clip whose prefix is there."""
        prefix, _ = Prefix.compute(self.model, self.prompt)
        mx.eval([layer.state for layer in prefix.cache])

        def work() -> None:
            mx.eval(prefix.extend(self.model, self.other))

        return work

    def first_question(self) -> None:
        """The same question on a clip that the model has not seen."""
        prefix, _ = Prefix.compute(self.model, self.other)
        mx.eval(prefix.extend(self.model, self.other))

    def stock_generate(self, count: int) -> tuple[list[int], float]:
        """mlx-vlm's generate for the same prompt: its tokens, and the seconds until the first of them."""
        from mlx_vlm.generate.ar import generate_step

        from mlxvr.media import normalise

        one = self.media[0]
        steps = generate_step(
            mx.array(self.prompt.ids)[None],
            self.model.network,
            None,
            None,
            max_tokens=count,
            temperature=0.0,
            pixel_values_videos=mx.array(normalise(one.patches, self.model.spec)),
            video_grid_thw=mx.array([one.grid]),
        )
        started = time.perf_counter()
        ids, first = [], 0.0
        for token, _ in steps:
            ids.append(int(token))
            first = first or time.perf_counter() - started
        return ids, first


def measure(ways: Ways, repeats: int) -> dict[str, float]:
    """Median seconds of each way."""
    ways.think()  # warm up both
    stock_ids, _ = ways.stock_generate(FIRST)
    assert stock_ids == ways.least(), "mlx-vlm and we must write the same tokens"
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    for _ in range(repeats):
        note("prefill + first answer", timed(ways.least))
        note("early exit", timed(ways.early_exit))
        note("think, one cache", timed(ways.think))
        note("think, the demo's two passes", timed(ways.two_passes))
        note("first question, to its first token", timed(ways.first_question))
        note("follow-up question, to its first token", timed(ways.follow_up()))
        started = time.perf_counter()
        _, first = ways.stock_generate(FIRST + REASONING)
        total = time.perf_counter() - started
        note("mlx-vlm, to its first token", first)
        note("mlx-vlm, decode a token", (total - first) / (FIRST + REASONING - 1))
        cache, logits = ways._read()
        note("ours, to its first token", timed(lambda: ways._read()[1].tolist()))
        mx.eval(logits)
        note(
            "ours, decode a token",
            timed(lambda c=cache, z=logits: ways._write(c, z, ways.prompt, FIRST + REASONING)) / (FIRST + REASONING),
        )
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--tokens", type=int, default=1536, help="video tokens of the clip")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ways = Ways(options.shape, options.tokens)
    found = measure(ways, options.repeats)
    base = found["prefill + first answer"]
    ratios = {
        "early exit / (prefill + first answer)": found["early exit"] / base,
        "two passes / one cache": found["think, the demo's two passes"] / found["think, one cache"],
        "think / early exit": found["think, one cache"] / found["early exit"],
        "follow-up / first question": found["follow-up question, to its first token"]
        / found["first question, to its first token"],
        "mlx-vlm / ours, to the first token": found["mlx-vlm, to its first token"] / found["ours, to its first token"],
        "mlx-vlm / ours, decode": found["mlx-vlm, decode a token"] / found["ours, decode a token"],
    }
    if options.json:
        print(json.dumps({"prompt": len(ways.prompt.ids), "seconds": found, "ratios": ratios}))
        return
    print(f"prompt of {len(ways.prompt.ids)} tokens, {np.sum(ways.prompt.media_mask)} of them visual; medians")
    for name, value in found.items():
        print(f"  {name:<42} {value:8.4f} s")
    for name, value in ratios.items():
        print(f"  {name:<42} {value:8.2f}")


if __name__ == "__main__":
    main()
