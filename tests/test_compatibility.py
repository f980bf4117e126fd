"""Folders in both directions: what we convert runs in stock mlx-vlm as it is, what mlx-vlm converts runs here.

"Runs" means the whole way on both sides: mlx-vlm's `load` and `stream_generate` with its own processor, which needs
no torch, beside `mlxvr.load` and `ask`. The prompts must be of the same length and every greedy token the same. A token
is evidence only where the likeliest one wins clearly, so each comparison also asks that the smallest lead is well above
what the two sides' log-probabilities differ by. In bfloat16, random weights give a tie every few tokens; so the folders
are in bfloat16, and both sides compute with them in float32. The bundled checkpoint is trained and runs as it is.

Pictures have a size that neither side changes, because the two resize differently (see tests/test_resize.py).
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import FAMILIES, SPECIAL_TOKENS, train_tokenizer, write_checkpoint
from PIL import Image

import mlxvr
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.convert import convert
from mlxvr.model.decode import decode, prefill
from mlxvr.model.loading import load_model
from mlxvr.model.prompt import SYSTEM_PROMPT, build_prompt, question_text

COUNT = 32  # greedy tokens
QUESTION = "What does the person hold at the end?"
MEDIA = ("text", "image", "video")
FLOAT_FORMATS = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # mode: bits, group size
STOCK_NAMES = {"qwen2_5_vl": "old", "qwen3_vl": "new"}  # the only spelling of each that mlx-vlm's converter knows
FACTOR = {"qwen2_5_vl": 28, "qwen3_vl": 32}  # pixels of a token's side
# Qwen2.5-VL counts time in half seconds and mlx-vlm ignores how long a pair of frames lasts: right at half a second.
FPS = {"qwen2_5_vl": 4.0, "qwen3_vl": 2.0}


SEED = {"qwen2_5_vl": 0, "qwen3_vl": 0}  # without near ties in what is compared below
# The same for pictures in floating-point formats: mlx-vlm rounds what it sees to the bfloat16 that they unpack to.
PICTURES = {"qwen2_5_vl": 2, "qwen3_vl": 6}


@dataclass(frozen=True)
class Generated:
    """Greedy tokens and the log-probability of each; from mlx-vlm also its lead over the runner-up."""

    prompt_tokens: int
    ids: list[int]
    logprobs: np.ndarray
    leads: np.ndarray | None = None


def write_source(folder: Path, family: str, *, seed: int = 0, **options: Any) -> Path:
    """A bfloat16 checkpoint that writes no special token: nothing ends its answer, and all of it can be spelt out."""
    first = train_tokenizer(family).token_to_id(SPECIAL_TOKENS[0])

    def mute(name: str, array: np.ndarray) -> np.ndarray:
        if name == "lm_head.weight":
            array[first:] = 0.0
        return array

    write_checkpoint(folder, family, dtype="BF16", seed=seed, weights=mute, **options)
    if family == "qwen2_5_vl":  # of a release that counts parts of seconds (see `mlxvr.model.mrope`), as FPS needs it
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "4.49.0"}))
    return folder


def pictures(family: str, medium: str, seed: int = 1) -> np.ndarray | None:
    """An image (h, w, 3) of 128 tokens, the 8 frames (8, h, w, 3) of a video, or nothing."""
    draw, side = np.random.default_rng(seed), FACTOR[family]
    if medium == "text":
        return None
    if medium == "image":
        return draw.integers(0, 256, (8 * side, 16 * side, 3), dtype=np.uint8)
    return draw.integers(0, 256, (8, 4 * side, 6 * side, 3), dtype=np.uint8)


def generate_here(
    folder: Path, family: str, medium: str, *, seed: int = 1, fps: float | None = None, dtype: str | None = "float32"
) -> Generated:
    """What mlxvr writes about random pictures: `load` and `ask`; without a picture, the layer below them."""
    source = pictures(family, medium, seed)
    if source is None:
        model = load_model(folder, dtype=dtype)
        prompt = build_prompt(model.tokenizer, model.family, model.config, [], QUESTION)
        cache = model.make_cache()
        logits = prefill(model, prompt.ids, prompt.positions, cache)
        tokens = list(decode(model, logits, cache, prompt.next_position, max_tokens=COUNT))
        return Generated(len(prompt.ids), [one.id for one in tokens], np.array([one.logprob for one in tokens]))
    opening = {"fps": fps or FPS[family]} if medium == "video" else {}
    with mlxvr.load(folder, dtype=dtype) as reasoner:
        answer = reasoner.ask(source, QUESTION, mode="think", max_tokens=COUNT, **opening)
    return Generated(answer.usage.prompt_tokens, list(answer.token_ids), np.array(answer.token_logprobs))


def generate_there(
    folder: Path, family: str, medium: str, *, seed: int = 1, fps: float | None = None, dtype: str | None = "float32"
) -> Generated:
    """What stock mlx-vlm writes about the same pictures."""
    source = pictures(family, medium, seed)
    media: dict[str, Any] = {}
    if medium == "image":
        media = {"image": [Image.fromarray(source)]}
    elif medium == "video":
        media = {"video": [source.transpose(0, 3, 1, 2)], "fps": fps or FPS[family]}
    return stock_answer(folder, question_text(QUESTION), media, dtype=dtype, max_tokens=COUNT)


def stock_answer(folder: Path, text: str, media: dict[str, Any], *, dtype: str | None, max_tokens: int) -> Generated:
    """Stock mlx-vlm's own loader, processor, chat template and generation; freshly loaded, because it keeps state."""
    import mlx_vlm

    content = [{"type": medium} for medium in media if medium in MEDIA] + [{"type": "text", "text": text}]
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": content}]
    ids, logprobs, leads, prompt_tokens = [], [], [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, processor = mlx_vlm.load(str(folder))
        if dtype is not None:
            model.set_dtype(getattr(mx, dtype))
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for step in mlx_vlm.stream_generate(model, processor, prompt, max_tokens=max_tokens, temperature=0.0, **media):
            runner_up, best = np.sort(np.array(step.logprobs.astype(mx.float32)))[-2:]
            prompt_tokens = step.prompt_tokens
            if step.token is not None and len(ids) < max_tokens:
                ids.append(int(step.token))
                logprobs.append(best)
                leads.append(best - runner_up)
    return Generated(prompt_tokens, ids, np.array(logprobs), np.array(leads))


def stock_convert(source: Path, out: Path, **options: Any) -> Path:
    from mlx_vlm.convert import convert as convert_there

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert_there(str(source), str(out), **options)
    return out


def check_same(here: Generated, there: Generated, *, tolerance: float = 1e-3) -> None:
    """The same tokens, and clear ones; `tolerance` is for the log-probabilities."""
    assert here.prompt_tokens == there.prompt_tokens
    assert here.ids == there.ids
    assert len(here.ids) == COUNT
    apart = np.abs(here.logprobs - there.logprobs).max()
    assert apart <= tolerance
    assert there.leads is not None
    assert there.leads.min() > 5 * apart, "a near tie is no evidence: choose another seed"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Conversions by us and by mlx-vlm, each made once: `folders(who, family, **options)`."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("compatibility")

    def make(who: str, family: str, **options: Any) -> Path:
        spelling = f"{who} {family} {sorted(options.items())}"
        if spelling not in made:
            source = root / f"source-{family}"
            if not source.exists():
                write_source(source, family, seed=SEED[family], dialect="4.57", names=STOCK_NAMES[family], shards=2)
            made[spelling] = root / f"{len(made)}"
            (convert if who == "mlxvr" else stock_convert)(source, made[spelling], **options)
        return made[spelling]

    return make


# --- ours there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("medium", MEDIA)
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_convert_writes_the_same_in_mlx_vlm(family, bits, medium, folders):
    folder = folders("mlxvr", family, bits=bits)
    check_same(generate_here(folder, family, medium), generate_there(folder, family, medium))


@pytest.mark.parametrize("mode", FLOAT_FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_floating_point_formats_too(family, mode, folders):
    bits, group_size = FLOAT_FORMATS[mode]
    folder = folders("mlxvr", family, mode=mode, bits=bits, group_size=group_size)
    here, there = (way(folder, family, "image", seed=PICTURES[family]) for way in (generate_here, generate_there))
    check_same(here, there, tolerance=5e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("mode", FLOAT_FORMATS)
def test_floating_point_formats_compute_in_the_dtype_of_the_rest(mode, dtype, folders):
    """Unpacked, they are bfloat16; in a float16 network that would make everything float32."""
    bits, group_size = FLOAT_FORMATS[mode]
    model = load_model(folders("mlxvr", "qwen3_vl", mode=mode, bits=bits, group_size=group_size), dtype=dtype)
    cache = model.make_cache()
    hidden = model.hidden(mx.array([[5, 80, 12]]), mx.broadcast_to(mx.arange(3), (3, 1, 3)), cache=cache)
    assert {hidden.dtype, cache[0].keys.dtype} == {getattr(mx, dtype)}
    assert model.logits(hidden).dtype == mx.float32  # the head's product is float32 whatever the rest computes in


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_dtype_is_the_one_that_mlx_vlm_computes_in(dtype, folders):
    import mlx_vlm
    from mlx.utils import tree_flatten

    folder = folders("mlxvr", "qwen3_vl", bits=4, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = mlx_vlm.load(str(folder))
    found = {array.dtype for _, array in tree_flatten(model.parameters())}
    assert found == {mx.uint32, getattr(mx, dtype)}
    check_same(generate_here(folder, "qwen3_vl", "video"), generate_there(folder, "qwen3_vl", "video"))


def test_dequantized_by_us_or_by_mlx_vlm_is_the_same(folders, tmp_path):
    packed = folders("mlx-vlm", "qwen3_vl", quantize=True, q_bits=4)
    convert(packed, tmp_path / "ours", dequantize=True)
    stock_convert(packed, tmp_path / "theirs", dequantize=True)
    ours, theirs = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in ours)
    check_same(
        generate_here(tmp_path / "ours", "qwen3_vl", "image"), generate_there(tmp_path / "ours", "qwen3_vl", "image")
    )


@pytest.mark.parametrize("medium", ["image", "video"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_pictures_give_other_tokens(family, medium, folders):
    """What is compared above depends on the pictures."""
    folder = folders("mlxvr", family, bits=4)
    assert generate_here(folder, family, medium).ids != generate_here(folder, family, medium, seed=2).ids


def test_where_mlx_vlm_departs_from_qwen2_5_vl(folders):
    """Pairs of frames a second apart lie two positions apart; mlx-vlm has them one apart, whatever their time."""
    folder = folders("mlxvr", "qwen2_5_vl", bits=0)
    half, whole = (generate_here(folder, "qwen2_5_vl", "video", fps=fps) for fps in (4.0, 2.0))
    stock = generate_there(folder, "qwen2_5_vl", "video", fps=2.0)
    assert stock.ids == half.ids
    assert np.abs(whole.logprobs - half.logprobs).max() > 1e-2


# --- theirs here ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantize": True, "q_bits": 4, "q_group_size": 64},
        {"quantize": True, "q_bits": 8, "q_group_size": 32},
        {"quantize": True, "quant_predicate": "mixed_4_8"},
        *({"quantize": True, "q_mode": mode, "q_bits": None, "q_group_size": None} for mode in FLOAT_FORMATS),
    ],
    ids=lambda options: "-".join(str(value) for name, value in options.items() if name != "quantize" and value),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_mlx_vlm_converts_writes_the_same_here(family, options, folders):
    folder = folders("mlx-vlm", family, **options)
    quantization = json.loads((folder / "config.json").read_text()).get("quantization", {})
    assert quantization.get("mode", "affine") == options.get("q_mode", "affine")
    floating = "q_mode" in options
    medium, seed = ("image", PICTURES[family]) if floating else ("video", 1)
    here, there = (way(folder, family, medium, seed=seed) for way in (generate_here, generate_there))
    check_same(here, there, tolerance=5e-3 if floating else 1e-3)


# --- trained weights, a real file, a whole answer --------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (0, None),
        (4, "float32"),
        pytest.param(8, "float32", marks=pytest.mark.slow),
        # MLX's CPU backend takes most of a minute to multiply packed matrices in bfloat16.
        pytest.param(4, None, marks=pytest.mark.slow),
    ],
)
def test_the_demo_reasons_in_mlx_vlm_word_for_word(bits, dtype, tmp_path):
    row = json.loads((demo_folder() / "clips.jsonl").read_text(encoding="utf-8").splitlines()[0])
    path, folder = demo_folder() / row["video"], tmp_path / "converted"
    convert(demo_folder() / "checkpoint", folder, bits=bits)
    options: Sequence[str] = row["options"]
    with mlxvr.load(folder, dtype=dtype) as reasoner:
        here = reasoner.ask(path, row["question"], options=options, kind=row["kind"], mode="think", max_tokens=120)
    text = question_text(row["question"], options, row["kind"])
    there = stock_answer(folder, text, {"video": [str(path)]}, dtype=dtype, max_tokens=120)
    assert here.reasoned
    assert len(there.ids) >= 24
    assert here.usage.prompt_tokens == there.prompt_tokens
    assert list(here.token_ids) == there.ids  # mlx-vlm hands the end of the turn out too
