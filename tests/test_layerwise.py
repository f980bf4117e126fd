"""A model layer by layer against the same model in one piece, and against transformers."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import random_media

from mlxvr.conversion.measure.layerwise import Layer, LayerwiseModel, Piece
from mlxvr.conversion.quantize import convert
from mlxvr.errors import Cancelled
from mlxvr.media.patches import normalise
from mlxvr.model.decode import decode, prefill
from mlxvr.model.loading import load_model
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import Prompt, build_prompt
from mlxvr.runtime.device_memory import backend

LIMITS = (None, 1_500_000, 0)  # everything stays, some layers stay, nothing stays


def ask(model: VideoModel, family: str) -> list[Prompt]:
    """A video with two questions, an image, media of several kinds, and text alone."""
    video = random_media(family, "video", (3, 10, 14), second_per_grid=0.75)
    image = random_media(family, "image", (1, 10, 6), seed=1)
    short = random_media(family, "video", (2, 4, 4), second_per_grid=2.5, seed=2)
    asked = [
        ([video], "What happens at the end?", ["a ball", "a cup"]),
        ([video], "Which colour is it?", None),
        ([image], "What is this?", None),
        ([image, short, image], "Are they alike?", ["yes", "no"]),
        ([], "How many sides has a square?", None),
    ]
    return [
        build_prompt(model.tokenizer, model.family, model.config, media, question, options=options)
        for media, question, options in asked
    ]


def all_logits(model: VideoModel, prompt: Prompt) -> np.ndarray:
    """(n, vocab) of the whole network in one pass without a cache."""
    hidden = model.hidden(
        mx.array(prompt.ids)[None],
        mx.array(prompt.positions)[:, None],
        features=model.encode(prompt.media) if prompt.media else None,
        media_mask=prompt.media_mask[None],
    )
    return np.array(model.logits(hidden)[0].astype(mx.float32))


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal up to the rounding of float32, relative to the largest number."""
    assert found.shape == expected.shape
    return bool(np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max())


def greedy(model: VideoModel, prompt: Prompt, count: int) -> list[int]:
    cache = model.make_cache()
    features = model.encode(prompt.media) if prompt.media else None
    logits = prefill(
        model, prompt.ids, prompt.positions, cache, features=features, media_mask=prompt.media_mask, step_size=2048
    )
    tokens = decode(model, logits, cache, prompt.next_position, max_tokens=count, suppress_tokens=())
    return [token.id for token in tokens]


def greedy_in_lock_step(model: LayerwiseModel, prompts: list[Prompt], count: int) -> tuple[list[list[int]], np.ndarray]:
    """Tokens of each prompt, and all logits on the way."""
    tracks, logits = model.read(prompts)
    rows = [one[-1] for one in logits]
    tokens: list[list[int]] = [[] for _ in prompts]
    seen = [np.array(mx.stack(rows))]
    for _ in range(count):
        chosen = [int(mx.argmax(row)) for row in rows]
        for own, token in zip(tokens, chosen):
            own.append(token)
        rows = model.step(tracks, chosen)
        seen.append(np.array(mx.stack(rows)))
    return tokens, np.stack(seen)


@pytest.fixture(scope="module", params=checkpoints.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("layerwise") / family, family, shards=2)


@pytest.fixture(scope="module")
def model(path: Path) -> VideoModel:
    return load_model(path)


@pytest.mark.parametrize("memory_limit", LIMITS)
def test_logits_equal_the_whole_network(model: VideoModel, path: Path, family: str, memory_limit: int | None) -> None:
    layerwise = LayerwiseModel.open(path, memory_limit=memory_limit)
    prompts = ask(model, family)
    _, logits = layerwise.read(prompts, last=5)
    for prompt, found in zip(prompts, logits):
        assert found.dtype == mx.float32
        assert close(np.array(found), all_logits(model, prompt)[-5:])


def test_an_embedding_that_is_also_the_head(family: str, tmp_path: Path) -> None:
    path = checkpoints.write_checkpoint(tmp_path / "m", family, tied=True)
    model = load_model(path)
    prompts = ask(model, family)
    _, logits = LayerwiseModel.open(path, memory_limit=0).read(prompts)
    for prompt, found in zip(prompts, logits):
        assert close(np.array(found), all_logits(model, prompt)[-1:])


@pytest.mark.parity
def test_logits_equal_transformers(model: VideoModel, path: Path, family: str) -> None:
    pytest.importorskip("torch")
    from reference import Reference, relative_error

    reference = Reference(path, family)
    prompts = ask(model, family)
    _, logits = LayerwiseModel.open(path, memory_limit=0).read(prompts, last=10)
    for prompt, found in zip(prompts, logits):
        pixels = [normalise(one.patches, model.spec) for one in prompt.media]
        expected = reference.logits(reference.inputs(prompt.ids, prompt.media, pixels))
        assert relative_error(np.array(found), expected[-10:]) <= 1e-4


def test_greedy_tokens_equal_decode(model: VideoModel, path: Path, family: str) -> None:
    prompts = ask(model, family)
    tokens, _ = greedy_in_lock_step(LayerwiseModel.open(path, memory_limit=0), prompts, 12)
    assert tokens == [greedy(model, prompt, 12) for prompt in prompts]
    assert len({tuple(own) for own in tokens}) > 1  # the prompts do not merely agree


def test_what_stays_in_memory_changes_no_bit(model: VideoModel, path: Path, family: str) -> None:
    prompts = ask(model, family)
    opened = [LayerwiseModel.open(path)]
    opened += [LayerwiseModel.open(path, memory_limit=limit) for limit in (opened[0].nbytes - 1, 0)]
    assert [one.resident for one in opened] == [True, False, False]
    assert opened[0].kept_bytes > opened[1].kept_bytes > opened[2].kept_bytes == 0
    runs = [greedy_in_lock_step(one, prompts, 4) for one in opened]
    np.testing.assert_array_equal(runs[1][1], runs[0][1])
    np.testing.assert_array_equal(runs[2][1], runs[0][1])


def test_a_quantized_model_in_another_dtype(model: VideoModel, path: Path, family: str, tmp_path: Path) -> None:
    convert(path, tmp_path / "q", bits=4, group_size=32)
    whole = load_model(tmp_path / "q", dtype="float32")
    prompts = ask(model, family)
    _, logits = LayerwiseModel.open(tmp_path / "q", dtype="float32", memory_limit=0).read(prompts)
    for prompt, found in zip(prompts, logits):
        assert close(np.array(found), all_logits(whole, prompt)[-1:])
        assert not close(np.array(found), all_logits(model, prompt)[-1:])


def test_as_the_product_computes_to_the_last_bit(model: VideoModel, path: Path, family: str) -> None:
    """A clip's prefix is read first and its question on top of it; in bfloat16 any other cut shows."""
    from mlxvr.model.prefix import Prefix

    whole = load_model(path, dtype="bfloat16")
    prompts = [prompt for prompt in ask(model, family) if prompt.media]
    _, logits = LayerwiseModel.open(path, dtype="bfloat16", memory_limit=0).read(prompts)
    for prompt, found in zip(prompts, logits):
        prefix, _ = Prefix.compute(whole, prompt)
        np.testing.assert_array_equal(np.array(found)[-1], np.array(prefix.extend(whole, prompt)))


def longer(prompt: Prompt, own: list[int]) -> Prompt:
    """A prompt with tokens after it."""
    at = np.arange(prompt.next_position, prompt.next_position + len(own), dtype=np.int32)
    return Prompt(
        np.concatenate([prompt.ids, np.array(own, np.int32)]),
        np.concatenate([prompt.positions, np.tile(at, (3, 1))], axis=1),
        prompt.media,
        np.concatenate([prompt.media_mask, np.zeros(len(own), bool)]),
        prompt.prefix_length,
        prompt.next_position + len(own),
    )


def test_extending_by_several_tokens_and_forking(model: VideoModel, path: Path, family: str) -> None:
    layerwise = LayerwiseModel.open(path)
    prompts = ask(model, family)
    tracks, _ = layerwise.read(prompts)
    forks = [track.fork() for track in tracks]
    layerwise.step(forks, [9] * len(forks))  # must not be seen by the tracks
    added = [[5, 6, 7], [8, 5], [6], [7, 7, 7, 7], [5]]
    found = layerwise.extend(tracks, added, last=2)
    after = layerwise.step(tracks, [8] * len(tracks))
    for prompt, own, rows, row in zip(prompts, added, found, after):
        expected = all_logits(model, longer(prompt, [*own, 8]))
        assert close(np.array(rows), expected[-1 - min(2, len(own)) : -1])
        assert close(np.array(row), expected[-1])


def with_weight(layer: Layer, piece: Piece) -> Callable[[mx.array, mx.array], mx.array]:
    """A layer as a function of its input and of one of its weights."""

    def through(hidden: mx.array, weight: mx.array) -> mx.array:
        layer.module.mlp.down_proj.weight = weight
        return layer(hidden, piece)

    return through


def sum_of_last_logits(model: VideoModel, index: int, prompts: list[Prompt]) -> Callable[[mx.array], mx.array]:
    """The whole network as a function of the same weight of one layer."""

    def whole(weight: mx.array) -> mx.array:
        model.layers[index].mlp.down_proj.weight = weight
        total = mx.zeros(())
        for prompt in prompts:
            hidden = model.hidden(
                mx.array(prompt.ids)[None],
                mx.array(prompt.positions)[:, None],
                features=model.encode(prompt.media) if prompt.media else None,
                media_mask=prompt.media_mask[None],
            )
            total += model.logits(hidden[0, -1]).sum()
        return total

    return whole


@pytest.mark.slow
def test_gradients_layer_by_layer_backwards(path: Path, family: str) -> None:
    """Of the sum of the last logits with respect to one weight of each layer: as through the whole network."""
    layerwise = LayerwiseModel.open(path, memory_limit=0)
    prompts = ask(layerwise.model, family)
    pieces = [track.pieces[0] for track in layerwise.embed(prompts, shared=False)]
    inputs: list[list[mx.array]] = []
    for layer in layerwise.layers():
        inputs.append([piece.hidden for piece in pieces])
        for piece in pieces:
            piece.hidden = layer(piece.hidden, piece)
        mx.eval([piece.hidden for piece in pieces])
    with layerwise.head() as head:
        cotangents = [mx.grad(lambda hidden: head(hidden[0, -1]).sum())(piece.hidden) for piece in pieces]
        mx.eval(cotangents)
    found: dict[int, mx.array] = {}
    for layer in layerwise.layers(backwards=True):
        weight = layer.module.mlp.down_proj.weight
        total = mx.zeros_like(weight)
        for at, piece in enumerate(pieces):
            primals = [inputs[layer.index][at], weight]
            _, (cotangents[at], own) = mx.vjp(with_weight(layer, piece), primals, [cotangents[at]])
            total = total + own
        layer.module.mlp.down_proj.weight = weight
        mx.eval(cotangents, total)
        found[layer.index] = total
    assert list(found) == [2, 1, 0]

    model = load_model(path)
    for index, layer in enumerate(model.layers):
        weight = layer.mlp.down_proj.weight
        expected = np.array(mx.grad(sum_of_last_logits(model, index, prompts))(weight))
        layer.mlp.down_proj.weight = weight
        assert np.abs(np.array(found[index]) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_progress_and_cancelling(path: Path, model: VideoModel, family: str) -> None:
    told: list[tuple[str, int, int]] = []
    layerwise = LayerwiseModel.open(path, memory_limit=0)
    layerwise.read(ask(model, family)[-1:], progress=lambda *said: told.append(said))
    assert told == [("layers", 1, 3), ("layers", 2, 3), ("layers", 3, 3)]
    with pytest.raises(Cancelled):
        layerwise.read(ask(model, family)[-1:], should_stop=lambda: len(told) > 0)


MEASURE = """
import sys
from pathlib import Path
import mlx.core as mx
from mlxvr.model.prompt import build_prompt
from mlxvr.conversion.measure.layerwise import Layer, LayerwiseModel, Piece
layerwise = LayerwiseModel.open(Path(sys.argv[1]), memory_limit=None if sys.argv[2] == "all" else int(sys.argv[2]))
model = layerwise.model
prompts = [build_prompt(model.tokenizer, model.family, model.config, [], f"Question {n}?") for n in range(1)]
tracks, _ = layerwise.read(prompts)
layerwise.step(tracks, [5])
status = Path("/proc/self/status")
held = status.read_text().split("VmHWM:")[1].split()[0] if status.exists() else 0
print(layerwise.nbytes, mx.get_peak_memory(), int(held) * 1024)
"""


@pytest.mark.slow
def test_memory_is_that_of_one_layer(tmp_path: Path) -> None:
    """Eight wide layers: what the allocator holds at most, and (where the system tells) what the process does."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    path = checkpoints.write_checkpoint(tmp_path / "wide", "qwen3_vl", text=wide)

    def measure(limit: str) -> tuple[int, int, int]:
        command = [sys.executable, "-c", MEASURE, str(path), limit]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        weights, allocated, held = map(int, done.stdout.split())
        return weights, allocated, held

    weights, allocated, held = measure("all")
    _, allocated_streamed, held_streamed = measure("0")
    assert weights > 100e6
    assert allocated > weights
    assert allocated_streamed < 0.45 * weights
    if held and backend() == "cpu":  # a GPU's weights are no part of the process
        assert held - held_streamed > 0.5 * weights
