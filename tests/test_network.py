"""The networks against transformers: vision features, logits, every way in which a checkpoint may be written."""

import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import random_media

from mlxvr.errors import Cancelled, CheckpointError
from mlxvr.media.patches import normalise
from mlxvr.model.decode import prefill
from mlxvr.model.loading import load_model
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import Prompt, build_prompt

TOLERANCE = 1e-4  # relative, anywhere; float32 gives 3e-6

# What is shown: (kind, grid in patches, seconds between temporal patches).
PARTS = {
    "video": [("video", (4, 8, 12), 1.0)],
    "image": [("image", (1, 10, 6), 0.0)],
    "text": [],
    "odd video": [("video", (3, 10, 14), 0.75)],  # windows of all four sizes
    "strip": [("video", (5, 2, 30), 1.3)],
    "long and small": [("video", (21, 4, 4), 2 / 3)],
    "one row": [("video", (1, 16, 16), 1.0)],  # only whole windows
    "mixed": [
        ("video", (4, 6, 10), 0.75),
        ("image", (1, 8, 4), 0.0),
        ("video", (2, 4, 4), 2.5),
        ("image", (1, 2, 2), 0.0),
    ],
}


def media_of(family: str, name: str) -> list:
    return [
        random_media(family, kind, grid, second_per_grid=seconds, seed=index)
        for index, (kind, grid, seconds) in enumerate(PARTS[name])
    ]


def ask(model: VideoModel, media: list, question: str = "What happens at the end?") -> Prompt:
    return build_prompt(model.tokenizer, model.family, model.config, media, question, options=["a ball", "a cup"])


def all_logits(model: VideoModel, prompt: Prompt) -> np.ndarray:
    """(n, vocab) in one pass without a cache."""
    features = model.encode(prompt.media) if prompt.media else None
    hidden = model.hidden(
        mx.array(prompt.ids)[None],
        mx.array(prompt.positions)[:, None],
        features=features,
        media_mask=prompt.media_mask[None],
    )
    return np.array(model.logits(hidden)[0].astype(mx.float32))


@pytest.fixture(scope="module", params=checkpoints.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("network") / family, family)


@pytest.fixture(scope="module")
def model(path: Path) -> VideoModel:
    return load_model(path)


@pytest.fixture(scope="module")
def reference(path: Path, family: str):
    pytest.importorskip("torch")
    from reference import Reference

    return Reference(path, family)


def expected_logits(reference, model: VideoModel, prompt: Prompt, **extra: object) -> np.ndarray:
    pixels = [normalise(one.patches, model.spec) for one in prompt.media]
    return reference.logits(reference.inputs(prompt.ids, prompt.media, pixels), **extra)


@pytest.mark.parity
@pytest.mark.parametrize("name", PARTS)
def test_logits_equal_transformers(reference, model: VideoModel, family: str, name: str) -> None:
    from reference import relative_error

    prompt = ask(model, media_of(family, name))
    if prompt.media:  # transformers works its positions out from the ids; ours must be the same
        pixels = [normalise(one.patches, model.spec) for one in prompt.media]
        inputs = reference.inputs(prompt.ids, prompt.media, pixels)
        np.testing.assert_array_equal(prompt.positions, reference.positions(inputs))
    expected = expected_logits(reference, model, prompt)
    assert relative_error(all_logits(model, prompt), expected) <= TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("step_size", [5, 64, 2048])
def test_chunked_prefill_equals_transformers(reference, model: VideoModel, family: str, step_size: int) -> None:
    from reference import relative_error

    prompt = ask(model, media_of(family, "mixed"))
    cache = model.make_cache()
    features = model.encode(prompt.media)
    logits = prefill(
        model,
        prompt.ids,
        prompt.positions,
        cache,
        features=features,
        media_mask=prompt.media_mask,
        step_size=step_size,
    )
    assert logits.dtype == mx.float32
    assert relative_error(np.array(logits), expected_logits(reference, model, prompt)[-1]) <= TOLERANCE


@pytest.mark.parity
def test_a_continuation_on_the_cache_equals_transformers(reference, model: VideoModel, family: str) -> None:
    """The prefix, then the question in two pieces, each on what is cached."""
    from reference import relative_error

    prompt = ask(model, media_of(family, "mixed"))
    features, end = model.encode(prompt.media), prompt.prefix_length
    cache, expected = model.make_cache(), expected_logits(reference, model, prompt)
    cuts = [0, end, end + 9, len(prompt.ids)]
    for start, stop in pairwise(cuts):
        logits = prefill(
            model,
            prompt.ids[start:stop],
            prompt.positions[:, start:stop],
            cache,
            features=features if start == 0 else None,
            media_mask=prompt.media_mask[start:stop] if start == 0 else None,
        )
        assert relative_error(np.array(logits), expected[stop - 1]) <= TOLERANCE


@pytest.mark.parity
def test_published_positions_of_a_long_video(reference, tmp_path: Path) -> None:
    """A Qwen2.5-VL of transformers 4.57 places text after the video's time; told so, transformers 5 agrees."""
    import torch
    from reference import Reference, relative_error

    path = checkpoints.write_checkpoint(tmp_path / "m", "qwen2_5_vl", dialect="4.57")
    model = load_model(path)
    prompt = ask(model, [random_media("qwen2_5_vl", "video", (21, 4, 4), second_per_grid=2.75)])
    after = prompt.positions[0, prompt.prefix_length - 1]  # the vision-end token, after 21 rows 2 whole seconds apart
    assert after == prompt.positions[0, np.argmax(prompt.media_mask)] + 20 * 2 * 2 + 1
    positions = torch.tensor(prompt.positions.astype(np.int64))[:, None]
    expected = expected_logits(Reference(path, "qwen2_5_vl"), model, prompt, position_ids=positions)
    assert relative_error(all_logits(model, prompt), expected) <= TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "dialect", "names", "shards", "tied"),
    [
        ("qwen2_5_vl", "5", "new", 3, True),
        ("qwen2_5_vl", "4.57", "new", 1, False),
        ("qwen2_5_vl", "4.57", "old", 2, True),
        ("qwen2_5_vl", "first", "old", 1, False),
        ("qwen3_vl", "5", "new", 3, True),
        ("qwen3_vl", "4.57", "new", 1, False),  # no release wrote its first dialect or the old names
    ],
)
def test_every_way_of_writing_a_checkpoint(
    family: str, tmp_path: Path, dialect: str, names: str, shards: int, tied: bool
) -> None:
    torch = pytest.importorskip("torch")
    from reference import Reference, relative_error

    layout = {"names": names, "shards": shards, "tied": tied}
    path = checkpoints.write_checkpoint(tmp_path / "m", family, dialect=dialect, **layout)
    model = load_model(path)
    prompt = ask(model, media_of(family, "odd video"))
    positions = torch.tensor(prompt.positions.astype(np.int64))[:, None]  # those of the release: see test_mrope
    expected = expected_logits(Reference(path, family), model, prompt, position_ids=positions)
    assert relative_error(all_logits(model, prompt), expected) <= TOLERANCE


@pytest.mark.parity
def test_weights_that_transformers_wrote(reference, family: str, tmp_path: Path, model: VideoModel) -> None:
    from reference import relative_error

    saved = tmp_path / "saved"
    reference.model.save_pretrained(saved, max_shard_size="400KB")
    assert len(list(saved.glob("*.safetensors"))) > 1
    checkpoints.write_side_files(saved, family)
    ours = load_model(saved)
    prompt = ask(ours, media_of(family, "mixed"))
    assert relative_error(all_logits(ours, prompt), expected_logits(reference, model, prompt)) <= TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("grid", [(1, 4, 4), (2, 8, 16), (2, 10, 14), (5, 2, 18), (1, 34, 2)])
def test_vision_features_equal_transformers(reference, model: VideoModel, family: str, grid: tuple) -> None:
    from reference import relative_error

    media = random_media(family, "video", grid)
    found = model.encode([media])
    expected = reference.vision(grid, normalise(media.patches, model.spec))
    for ours, theirs in zip([found.embeds, *found.deepstack], expected, strict=True):
        assert relative_error(np.array(ours), theirs) <= TOLERANCE


@pytest.mark.parametrize("grid", [(3, 8, 16), (2, 10, 14)])
def test_vision_features_equal_mlx_vlms_own_tower(model: VideoModel, family: str, grid: tuple) -> None:
    media = random_media(family, "video", grid)
    theirs = model.network.vision_tower(mx.array(normalise(media.patches, model.spec)), mx.array([grid]))
    found = model.encode([media])
    theirs = [theirs[0], *theirs[1]] if isinstance(theirs, tuple) else [theirs]
    for ours, other in zip([found.embeds, *found.deepstack], theirs, strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(other), atol=1e-5)


@pytest.mark.parametrize("patches_at_once", [1, 300, 10**9])
def test_vision_in_chunks_is_vision(model: VideoModel, family: str, patches_at_once: int) -> None:
    media = [random_media(family, "video", (7, 8, 12)), random_media(family, "image", (1, 6, 6), seed=1)]
    whole = [model.encode([one]) for one in media]
    calls: list[tuple[str, int, int]] = []
    found = model.encode(media, patches_at_once=patches_at_once, progress=lambda *call: calls.append(call))
    assert len(found) == 7 * 24 + 9
    for level, ours in enumerate([found.embeds, *found.deepstack]):
        expected = np.concatenate([np.array([one.embeds, *one.deepstack][level]) for one in whole])
        np.testing.assert_allclose(np.array(ours), expected, atol=2e-6)
    assert calls[-1] == ("vision", 8, 8)
    assert len(calls) == {1: 8, 300: 4, 10**9: 2}[patches_at_once]


def test_big_frames_go_one_by_one(model: VideoModel, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that is not fused holds all scores of a chunk: 2 heads x 64 x 64 for each row here."""
    monkeypatch.setattr("mlxvr.model.network.SCORES_AT_ONCE", 3 * 2 * 64 * 64)
    calls: list[int] = []
    model.encode([random_media(family, "video", (7, 8, 8))], progress=lambda stage, done, total: calls.append(done))
    assert calls == [3, 6, 7]


@pytest.mark.parametrize("queries", [1020, 100, 1])
def test_a_large_picture_is_seen_in_pieces(
    model: VideoModel, family: str, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,020 patches, whose attention takes so many queries at a time: the same numbers as all at once."""
    photo = random_media(family, "image", (1, 34, 30))
    whole = model.encode([photo])
    monkeypatch.setattr("mlxvr.model.network.SCORES_AT_ONCE", 2 * 1020 * queries)
    pieces = model.encode([photo])
    for ours, theirs in zip([pieces.embeds, *pieces.deepstack], [whole.embeds, *whole.deepstack], strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=2e-6)


@pytest.mark.slow
def test_a_large_picture_needs_no_room_for_all_scores(
    model: VideoModel, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,096 patches have 134 MB of scores in two heads; 128 queries at a time have 4."""
    photo = random_media(family, "image", (1, 64, 64))
    peaks = []
    for queries in (4096, 128):
        monkeypatch.setattr("mlxvr.model.network.SCORES_AT_ONCE", 2 * 4096 * queries)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        model.encode([photo])
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < peaks[0] - 100e6 if mx.default_device() == mx.Device(mx.cpu) else peaks[1] <= peaks[0] * 1.1


def test_a_large_picture_can_be_stopped_between_layers(
    model: VideoModel, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxvr.model.network.SCORES_AT_ONCE", 2 * 1020 * 100)
    answers = iter([False, False, True])  # before the picture, before its first layer, before its second
    with pytest.raises(Cancelled):
        model.encode([random_media(family, "image", (1, 34, 30))], should_stop=lambda: next(answers))


def test_vision_can_be_stopped(model: VideoModel, family: str) -> None:
    answers = iter([False, True])
    with pytest.raises(Cancelled):
        model.encode([random_media(family, "video", (4, 4, 4))], patches_at_once=1, should_stop=lambda: next(answers))


def test_features_that_are_not_there_are_not_used(model: VideoModel, family: str) -> None:
    """The features of a prompt matter, and each lands where it belongs."""
    media = media_of(family, "mixed")
    prompt = ask(model, media)
    swapped = dataclasses.replace(
        prompt, media=(media[0], media[1], media[2], random_media(family, "image", (1, 2, 2), seed=9))
    )
    one, other = all_logits(model, prompt), all_logits(model, swapped)
    last_image = np.flatnonzero(prompt.media_mask)[-1]
    np.testing.assert_array_equal(one[:last_image], other[:last_image])
    assert np.abs(one[last_image:] - other[last_image:]).max() > 1e-3


@pytest.mark.parity
def test_bfloat16_stays_close(reference, family: str, tmp_path: Path) -> None:
    from reference import relative_error

    path = checkpoints.write_checkpoint(tmp_path / "m", family, dtype="BF16")
    model = load_model(path)
    prompt = ask(model, media_of(family, "long and small"))
    logits = all_logits(model, prompt)
    assert model.dtype == mx.bfloat16
    assert model.logits(mx.zeros((1, 64), mx.bfloat16)).dtype == mx.float32  # see test_head
    # the reference keeps the weights in float32; bf16 has 8 bits
    assert relative_error(logits, expected_logits(reference, model, prompt)) < 0.04  # 0.022 and 0.019 on an x86 CPU


def test_quantized_as_mlx_does_it(model: VideoModel, path: Path, family: str, tmp_path: Path) -> None:
    """A folder that is quantized per module gives what `nn.quantize` gives in memory."""
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    other = load_model(path)
    how = {"group_size": 32, "bits": 8}
    # Groups are shorter than rows, as in real models: MLX's CUDA backend (0.32.4) is wrong where they are as long.
    chosen = {"language_model.model.layers.1.mlp.down_proj": {"group_size": 64, "bits": 4}}

    def predicate(name: str, module: nn.Module) -> bool | dict:
        if not name.startswith("language_model") or not hasattr(module, "to_quantized"):
            return False
        return chosen.get(name, how)

    nn.quantize(other.network, class_predicate=predicate)
    folder = tmp_path / "quantized"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(other.network.parameters())))
    config = {**other.config, "quantization": {**how, **chosen}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text((path / "generation_config.json").read_text())
    checkpoints.write_side_files(folder, family)
    prompt = ask(model, media_of(family, "video"))
    logits = all_logits(load_model(folder), prompt)
    np.testing.assert_allclose(logits, all_logits(other, prompt), atol=1e-5)
    assert np.abs(logits - all_logits(model, prompt)).max() > 1e-4


def test_what_a_model_says_about_itself(model: VideoModel, family: str) -> None:
    tokenizer = checkpoints.train_tokenizer(family)
    assert model.family.name == family
    assert model.context_length == 4096
    assert model.eos_ids == {tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")}
    assert set(model.placeholder_ids) == {tokenizer.token_to_id(f"<|{kind}_pad|>") for kind in ("image", "video")}
    assert model.spec.patch_size == (14 if family == "qwen2_5_vl" else 16)
    assert model.folder.settings == {}
    assert len(model.layers) == 3


def drop_eos(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))


def drop_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def shrink_embedding(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    text = {**checkpoints.text_settings("qwen3_vl"), "vocab_size": 128}
    tensors = checkpoints.random_tensors("qwen3_vl", text, checkpoints.vision_settings("qwen3_vl"))
    checkpoints.write_weights(folder, tensors)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_eos, "define the token that ends an answer"),
        (drop_template, "has no chat template"),
        (shrink_embedding, "embedding has 128 rows"),
    ],
)
def test_folders_that_load_but_do_not_fit(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    path = checkpoints.write_checkpoint(tmp_path / "m", "qwen3_vl")
    damage(path)
    with pytest.raises(CheckpointError, match=words) as raised:
        load_model(path)
    assert "\n" not in str(raised.value)


# Adapters, in the layout that mlx-vlm writes.

KEYS = ("language_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.2.mlp.down_proj")


def write_adapter(folder: Path, model: VideoModel, *, rank: int = 4, **config: object) -> Path:
    folder.mkdir()
    shapes = model.family.expected_shapes(model.config)
    arrays = {}
    for index, key in enumerate(KEYS):
        outputs, inputs = shapes[f"{key}.weight"]
        arrays[f"{key}.lora_a"] = mx.random.normal((inputs, rank), key=mx.random.key(index))
        arrays[f"{key}.lora_b"] = mx.random.normal((rank, outputs), key=mx.random.key(index + 10)) * 0.1
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    lora = {"rank": rank, "scale": 2.0, "dropout": 0.1, "keys": list(KEYS)}
    described = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": lora, **config}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def test_an_adapter_adds_its_product(model: VideoModel, path: Path, family: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", model)
    adapted = load_model(path, adapter=adapter)
    weights = mx.load(str(adapter / "adapters.safetensors"))
    by_hand = load_model(path)
    for key in KEYS:
        module = by_hand.network
        for name in key.split("."):
            module = module[int(name)] if name.isdigit() else module[name]
        module.weight = module.weight + 2.0 * (weights[f"{key}.lora_a"] @ weights[f"{key}.lora_b"]).T
    prompt = ask(model, media_of(family, "video"))
    logits = all_logits(adapted, prompt)
    np.testing.assert_allclose(logits, all_logits(by_hand, prompt), atol=1e-4)
    assert np.abs(logits - all_logits(model, prompt)).max() > 1e-2
    assert adapted.fingerprint != model.fingerprint == by_hand.fingerprint


def break_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def remove_weights(folder: Path) -> None:
    (folder / "adapters.safetensors").unlink()


def truncate(folder: Path) -> None:
    file = folder / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def other_rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_parameters"]["rank"] = 8
    (folder / "adapter_config.json").write_text(json.dumps(config))


def other_modules(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_parameters"]["keys"] = ["language_model.model.layers.40.mlp.down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


def fewer_modules(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_parameters"]["keys"] = [KEYS[0]]
    (folder / "adapter_config.json").write_text(json.dumps(config))


def more_modules(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_parameters"]["keys"] = [*KEYS, "language_model.model.layers.1.mlp.down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


def peft_layout(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')


def full(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "full"}')


@pytest.mark.parametrize("family", ["qwen3_vl"], scope="module")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_config, "cannot be read as JSON"),
        (remove_weights, r"has no adapters\.safetensors"),
        (truncate, "is cut short"),
        (other_rank, r"lora_[ab] has the shape"),
        (other_modules, "does not fit this model"),
        (fewer_modules, r"holds .*down_proj\.lora_., which this model does not have"),
        (more_modules, r"lacks .*layers\.1\.mlp\.down_proj\.lora_a"),
        (peft_layout, "does not describe a LoRA adapter"),
        (full, "not an adapter"),
    ],
)
def test_adapters_that_do_not_fit(
    model: VideoModel, path: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", model)
    damage(adapter)
    with pytest.raises(CheckpointError, match=words) as raised:
        load_model(path, adapter=adapter)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("family", ["qwen3_vl"], scope="module")
def test_loading_is_quick_and_needs_no_torch(path: Path) -> None:
    """Two seconds are the goal on two idle cores; the bound leaves room for busy ones."""
    import subprocess
    import sys

    code = (
        "import sys, time; start = time.perf_counter(); sys.modules['torch'] = None\n"
        "from mlxvr.model.loading import load_model\n"
        f"load_model({str(path)!r}); print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    assert float(done.stdout) < 10
