"""Verifying a converted model: figures against hand-made and naive ones, decisions against the product's own."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from recipes import write_plain

import mlxvr
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.checkpoint.recipe import VerificationLimits
from mlxvr.conversion.measure.first_answers import Draft, opening, write_answers
from mlxvr.conversion.measure.layerwise import LayerwiseModel
from mlxvr.conversion.measure.probes import Probe, budgeted, build_prompts, bundled, load_media
from mlxvr.conversion.measure.verification import Divergence, ProbeResult, VerificationReport, compare_logits
from mlxvr.conversion.measure.verify import verify
from mlxvr.conversion.quantize import convert
from mlxvr.errors import Cancelled, CheckpointError, ConfigError
from mlxvr.model.decode import prefill, suppression
from mlxvr.model.families.base import FAMILIES
from mlxvr.model.loading import load_model
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import Prompt

SOURCE = demo_folder() / "checkpoint"
NAMES = ("clip02-0", "clip02-1", "clip02-2", "disc", "text-0")


@pytest.fixture(scope="module")
def probes() -> list[Probe]:
    """A few of the bundled ones: sure and guessed answers, a picture, text alone."""
    return [probe for probe in bundled() if probe.name in NAMES]


class _OnDemand(dict[int, Any]):
    """By bits; made when it is first asked for."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __missing__(self, bits: int) -> Any:
        self[bits] = self._make(bits)
        return self[bits]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("verify")

    def make(bits: int) -> Path:
        convert(SOURCE, folder / str(bits), recipe=write_plain(folder), bits=bits)
        return folder / str(bits)

    return _OnDemand(make)


@pytest.fixture(scope="module")
def reports(converted: dict[int, Path], probes: list[Probe]) -> dict[int, VerificationReport]:
    return _OnDemand(lambda bits: verify(SOURCE, converted[bits], probes=probes, dtype="float32"))


# Figures.


def naive(expected: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """The figures in float64, from their formulas."""
    errors, kl, same = [], [], []
    for a, b in zip(expected.astype(np.float64), found.astype(np.float64)):
        centred_a, centred_b = a - a.mean(), b - b.mean()
        errors.append(math.sqrt(((centred_b - centred_a) ** 2).sum() / (centred_a**2).sum()))
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        kl.append((p * np.log(p / q)).sum())
        same.append(a.argmax() == b.argmax())
    return {
        "logits_error": float(np.mean(errors)),
        "largest_error": float(np.max(errors)),
        "top1": float(np.mean(same)),
        "kl": float(np.mean(kl)),
    }


def test_figures_of_hand_made_logits() -> None:
    expected = mx.array([[1.0, 0.0, -1.0], [0.0, math.log(3.0), 0.0]])
    found = mx.array([[0.0, 1.0, -1.0], [7.0, 7.0 + math.log(3.0), 7.0]])  # two change places; all are shifted
    figures = compare_logits(expected, found)
    assert figures.tokens == 2
    assert figures.top1 == 0.5
    assert figures.largest_error == pytest.approx(1.0, abs=1e-6)  # |(-1, 1, 0)| = |(1, 0, -1)|
    assert figures.logits_error == pytest.approx(0.5, abs=1e-6)
    assert figures.kl == pytest.approx((math.e - 1) / (math.e + 1 + 1 / math.e) / 2, abs=1e-6)


def test_figures_equal_numpy_in_float64() -> None:
    draw = np.random.default_rng(0)
    expected = draw.standard_normal((20, 300)).astype(np.float32) * 4
    found = expected + draw.standard_normal((20, 300)).astype(np.float32) * 0.7 + 3
    figures = dataclasses.asdict(compare_logits(mx.array(expected), mx.array(found)))
    truth = naive(expected, found)
    assert 0 < truth["top1"] < 1
    assert {name: figures[name] for name in truth} == pytest.approx(truth, rel=1e-4)


def result(name: str = "p", **changes: object) -> ProbeResult:
    usual: dict[str, object] = {
        "prompt_tokens": 9,
        "divergence": Divergence(tokens=2, logits_error=0.1, largest_error=0.2, top1=1.0, kl=0.01),
        "source_answer": "A",
        "converted_answer": "A",
        "source_confidence": 0.99,
        "converted_confidence": 0.98,
        "source_exits": True,
        "converted_exits": True,
    }
    return ProbeResult(name=name, **{**usual, **changes})  # type: ignore[arg-type]


def report(*results: ProbeResult) -> VerificationReport:
    return VerificationReport(
        source="a", converted="b", threshold=0.97, probes=results, source_run="in memory", seconds=1.0, peak_memory=10
    )


def test_what_counts_as_flipped() -> None:
    found = report(
        result("same"),
        result("same but for its case", source_answer="Left  cup", converted_answer="left cup"),
        result("another answer", converted_answer="B"),
        result("reasons", converted_confidence=0.5, converted_exits=False),
        result("no answer", converted_answer=None, converted_exits=False),
        result("both reason", converted_answer="C", source_exits=False, converted_exits=False),
        result("no box", source_answer=None, converted_answer=None, source_exits=None, converted_exits=None),
    )
    assert [probe.name for probe in found.flipped] == ["another answer", "reasons", "no answer"]
    assert (found.decisions, found.different_answers, found.flipped_exits) == (6, 1, 0.5)
    assert found.confidence_drift == pytest.approx((6 * 0.01 + 0.49) / 7)
    assert found.largest_confidence_drift == pytest.approx(0.49)
    lines = found.table().splitlines()
    assert any("3 of 6 (50.0%), 1 by another answer" in line for line in lines)
    assert "  reasons: exits (A, 0.990) -> reasons (A, 0.500)" in lines


def test_tokens_count_alike() -> None:
    """A probe with more tokens weighs more in the figures about tokens."""
    long = Divergence(tokens=8, logits_error=0.6, largest_error=0.9, top1=0.5, kl=0.11)
    found = report(result(), result(divergence=long))
    assert (found.tokens, found.top1) == (10, pytest.approx(0.6))
    assert (found.logits_error, found.kl) == (pytest.approx(0.5), pytest.approx(0.09))
    assert found.largest_logits_error == 0.9


def test_the_table_shows_each_limit_and_ends_with_the_verdict() -> None:
    found = report(result(), result(converted_confidence=0.9, converted_exits=False))
    easy = VerificationLimits(bits=4, logits_error=0.5, top1=0.25, kl=0.2, confidence_drift=0.08, flipped_exits=0.6)
    lines = found.table(easy).splitlines()
    for line, limit in zip(
        lines, (", limit 0.5", ", limit 25.0%", "limit 0.2", ", limit 0.08", ", limit 60%"), strict=False
    ):
        assert line.endswith(limit)
    assert lines[-1] == "passed: within the limits of 4 bits"
    assert found.table(VerificationLimits(bits=16, kl=0.001)).endswith("\nfalls short: KL is 0.01, the limit is 0.001")
    assert found.verdict(VerificationLimits(bits=16, kl=0.5)) == "passed: within the limits of unquantized weights"
    assert found.verdict(VerificationLimits(bits=16)) == "no verdict: the recipe sets no limits"
    assert found.to_dict(VerificationLimits(bits=16))["passed"] is None
    assert "limit" not in found.table()
    judged = found.to_dict(easy)
    assert (judged["passed"], judged["shortfalls"], judged["limits"]["kl"]) == (True, [], 0.2)
    assert found.to_dict(VerificationLimits(bits=16, kl=0.001))["passed"] is False


def test_limits() -> None:
    found = report(result(), result(converted_confidence=0.9, converted_exits=False))
    strict = VerificationLimits(bits=4, logits_error=0.05, top1=1.0, kl=0.001, confidence_drift=0.01, flipped_exits=0.1)
    assert found.failures(strict) == (
        "logits error is 0.1, the limit is 0.05",
        "KL is 0.01, the limit is 0.001",
        "confidence drift is 0.05, the limit is 0.01",
        "share of flipped exit decisions is 0.5, the limit is 0.1",
    )
    at_the_limit = VerificationLimits(
        bits=4, logits_error=found.logits_error, top1=1.0, kl=found.kl, confidence_drift=0.051, flipped_exits=0.5
    )
    assert found.failures(at_the_limit) == found.failures(VerificationLimits(bits=4)) == ()
    worse = report(result(divergence=Divergence(tokens=2, logits_error=0.1, largest_error=0.2, top1=0.9, kl=0.0)))
    assert worse.failures(strict)[-1] == "top-1 agreement is 0.9, the limit is 1"


def test_a_figure_that_is_no_number_fails_and_is_none_in_json() -> None:
    broken = Divergence(tokens=2, logits_error=math.nan, largest_error=math.nan, top1=0.0, kl=math.inf)
    found = report(result(), result(divergence=broken))
    assert len(found.failures(VerificationLimits(bits=2, logits_error=9.0, kl=9.0))) == 2
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["logits_error"] is values["kl"] is values["probes"][1]["kl"] is None
    assert values["probes"][0]["logits_error"] == 0.1


# Models.


@pytest.mark.slow
def test_identical_models_do_not_differ(probes: list[Probe]) -> None:
    told: list[tuple[str, int, int]] = []
    found = verify(SOURCE, SOURCE, probes=probes, progress=lambda *said: told.append(said))
    figures = (found.logits_error, found.largest_logits_error, found.kl, found.largest_confidence_drift)
    assert figures == (0.0, 0.0, 0.0, 0.0)
    assert (found.top1, found.flipped_exits) == (1.0, 0.0)
    assert found.decisions >= 3
    assert found.tokens > 8 * len(probes)
    assert (
        found.failures(VerificationLimits(bits=16, logits_error=0, top1=1, kl=0, confidence_drift=0, flipped_exits=0))
        == ()
    )
    done = [one for _, one, _ in told]
    assert done == sorted(done)
    assert {stage for stage, _, _ in told} == {"verify"}
    assert {(done[-1], total) for _, _, total in told} == {(done[-1], done[-1])}


@pytest.mark.slow
def test_fewer_bits_mean_more_error(reports: dict[int, VerificationReport]) -> None:
    for figure in ("logits_error", "kl", "confidence_drift"):
        values = [getattr(reports[bits], figure) for bits in (8, 4, 2)]
        assert 0 < values[0] < values[1] / 2 < values[2] / 4, figure
    assert reports[8].top1 > reports[2].top1
    assert reports[8].flipped_exits == 0.0
    assert reports[2].flipped
    assert {reports[bits].source_run for bits in (8, 4, 2)} == {"in memory"}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 2])
def test_confidence_is_the_product_s(
    converted: dict[int, Path], reports: dict[int, VerificationReport], probes: list[Probe], bits: int
) -> None:
    """At two bits the converted model leaves the source's answer, and its own must still be the product's."""
    found = {probe.name: probe for probe in reports[bits].probes}
    with mlxvr.load(converted[bits], dtype="float32") as reasoner:
        clip = reasoner.open(demo_folder() / "clips" / "clip02.mp4")
        for probe in probes[:3]:
            answer = clip.ask(probe.question, options=probe.options, mode="direct")
            ours = found[probe.name]
            assert ours.converted_confidence == pytest.approx(answer.confidence, abs=1e-6)
            assert ours.converted_answer == answer.text
            assert ours.converted_exits == (answer.confidence >= 0.97)
    if bits == 2:
        assert any(probe.converted_answer != probe.source_answer for probe in found.values())


@pytest.mark.slow
def test_layer_by_layer_finds_the_same(
    converted: dict[int, Path], reports: dict[int, VerificationReport], probes: list[Probe]
) -> None:
    streamed = verify(SOURCE, converted[2], probes=probes, memory_limit=0, dtype="float32")
    assert streamed.source_run.startswith("layer by layer, 0.0 of 0.0 GB")
    assert streamed.probes == reports[2].probes


def test_a_report_fits_into_json(reports: dict[int, VerificationReport]) -> None:
    values = json.loads(json.dumps(reports[2].to_dict(), allow_nan=False))
    assert values["flipped_exits"] == reports[2].flipped_exits
    assert [probe["name"] for probe in values["probes"]] == list(NAMES)
    assert {"logits_error", "kl", "top1", "drift", "flipped", "source_exits"} <= values["probes"][0].keys()
    assert max(map(len, reports[2].table().splitlines())) <= 100


def greedy_answer(model: VideoModel, prompt: Prompt) -> list[int]:
    """24 tokens, the first of which open the box."""
    opening, cache = model.tokenizer.encode("\\boxed"), model.make_cache()
    features = model.encode(prompt.media) if prompt.media else None
    logits = prefill(model, prompt.ids, prompt.positions, cache, features=features, media_mask=prompt.media_mask)
    tokens: list[int] = []
    while len(tokens) < 24 and not model.eos_ids.intersection(tokens):
        tokens.append(opening[len(tokens)] if len(tokens) < len(opening) else int(mx.argmax(logits)))
        position = mx.full((3, 1, 1), prompt.next_position + len(tokens) - 1, dtype=mx.int32)
        logits = model.logits(model.hidden(mx.array([[tokens[-1]]]), position, cache=cache))[0, -1]
    return tokens


def rows_along(model: VideoModel, prompt: Prompt, tokens: list[int]) -> np.ndarray:
    """Logits of the last eight tokens of a prompt and of all but the last of `tokens`, in one pass without a cache."""
    added = tokens[:-1]
    at = np.arange(prompt.next_position, prompt.next_position + len(added), dtype=np.int32)
    hidden = model.hidden(
        mx.array(np.concatenate([prompt.ids, np.array(added, np.int32)]))[None],
        mx.array(np.concatenate([prompt.positions, np.tile(at, (3, 1))], axis=1))[:, None],
        features=model.encode(prompt.media) if prompt.media else None,
        media_mask=np.concatenate([prompt.media_mask, np.zeros(len(added), bool)])[None],
    )
    return np.array(model.logits(hidden[0, -8 - len(added) :]).astype(mx.float32))


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_models_that_close_no_box(family: str, tmp_path: Path) -> None:
    """Random weights: every figure against a naive computation; no exit decision, the drift of the source's tokens."""
    source = checkpoints.write_checkpoint(tmp_path / "source", family)
    target = tmp_path / "converted"
    convert(source, target, bits=3, group_size=32)
    probes = [probe for probe in bundled() if probe.name in ("clip07-0", "text-0")]
    found = verify(source, target, probes=probes)
    models = [load_model(folder, dtype="float32") for folder in (source, target)]
    media = load_media(probes, budgeted(models[1].spec))
    assert (found.decisions, found.flipped_exits, found.flipped) == (0, None, ())
    for one, prompt in zip(found.probes, build_prompts(models[0], probes, media)):
        tokens = greedy_answer(models[0], prompt)
        expected, rows = (rows_along(model, prompt, tokens) for model in models)
        truth = naive(expected, rows)
        figures = dataclasses.asdict(one.divergence)
        assert figures.pop("tokens") == len(expected)
        assert figures == pytest.approx(truth, rel=1e-3)
        confidences = []
        for logits in (expected[-len(tokens) :], rows[-len(tokens) :]):
            logprobs = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
            own = logprobs[np.arange(len(tokens)), tokens][len(models[0].tokenizer.encode("\\boxed")) :]
            confidences.append(math.exp(own.mean()))
        assert [one.source_confidence, one.converted_confidence] == pytest.approx(confidences, rel=1e-3)
        assert one.source_answer is one.converted_answer is None


def test_probes_write_what_the_product_would(tmp_path: Path, probes: list[Probe]) -> None:
    """No visual placeholders, however likely; and nothing at all when float16 overflows."""
    folder = checkpoints.write_checkpoint(tmp_path / "m", "qwen3_vl", weights=checkpoints.overflow_float16)
    with pytest.raises(ConfigError, match="float16 overflowed"):
        verify(folder, folder, probes=probes[-1:], dtype="float16")
    model = LayerwiseModel.open(checkpoints.write_checkpoint(tmp_path / "n", "qwen3_vl"))
    never, whole = model.model.suppress_tokens, model.model.logits
    push = np.zeros(checkpoints.VOCABULARY, np.float32)
    push[sorted(never)] = 40.0
    model.model.logits = lambda hidden: whole(hidden) + mx.array(push)  # type: ignore[method-assign]
    (prompt,) = build_prompts(model.model, probes[-1:], [()])
    (track,), (row,) = model.read([prompt])
    draft = Draft(model.model.tokenizer, track, suppression(model.model), row[-1])
    write_answers(model, [draft])
    assert len(draft.tokens) > len(opening(model.model.tokenizer))
    assert not never & set(draft.tokens)


@pytest.mark.slow
def test_the_source_goes_before_the_converted_model_comes(tmp_path: Path, probes: list[Probe]) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 6}
    path = checkpoints.write_checkpoint(tmp_path / "wide", "qwen3_vl", text=wide)
    weights = (path / "model.safetensors").stat().st_size
    resident = verify(path, path, probes=probes[-1:])
    streamed = verify(path, path, probes=probes[-1:], memory_limit=0)
    assert weights < resident.peak_memory < 1.6 * weights
    assert streamed.peak_memory < 0.7 * weights


def test_cancelling(probes: list[Probe]) -> None:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 12

    with pytest.raises(Cancelled):
        verify(SOURCE, SOURCE, probes=probes[-1:], should_stop=should_stop)


# What is refused.


def test_models_that_do_not_belong_together(tmp_path: Path, probes: list[Probe]) -> None:
    one = checkpoints.write_checkpoint(tmp_path / "one", "qwen3_vl")
    family = checkpoints.write_checkpoint(tmp_path / "family", "qwen2_5_vl")
    wide = checkpoints.write_checkpoint(tmp_path / "wide", "qwen3_vl", text={"intermediate_size": 160})
    deep = checkpoints.write_checkpoint(tmp_path / "deep", "qwen3_vl", text={"num_hidden_layers": 4})
    tokens = checkpoints.write_checkpoint(tmp_path / "tokens", "qwen3_vl")
    tokenizer = json.loads((tokens / "tokenizer.json").read_text())
    kept = tokenizer["model"]["merges"][: len(tokenizer["model"]["merges"]) // 2]
    tokenizer["model"]["merges"] = kept
    (tokens / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = checkpoints.write_checkpoint(tmp_path / "template", "qwen3_vl")
    jinja = template / "chat_template.jinja"
    jinja.write_text(jinja.read_text().replace("assistant\\n", "assistant \\n"))
    colours = checkpoints.write_checkpoint(tmp_path / "colours", "qwen3_vl")
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        values = json.loads((colours / file).read_text())
        (colours / file).write_text(json.dumps({**values, "image_mean": [0.4, 0.5, 0.5]}))
    for other, words in (
        (family, "it is a qwen2_5_vl, that a qwen3_vl"),
        (wide, r"mlp\.down_proj\.weight is \[64, 160\] there and \[64, 128\] in the source"),
        (deep, r"layers\.3\.\S+ is .* there and missing in the source"),
        (tokens, "tokenizer"),
        (template, "chat template"),
        (colours, "processor files differ in mean"),
    ):
        with pytest.raises(CheckpointError, match=words) as raised:
            verify(one, other, probes=probes[-1:])
        assert "\n" not in str(raised.value)
        assert f"{other} was not converted from {one}" in str(raised.value)


def test_options_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no probes"):
        verify(SOURCE, SOURCE, probes=[])
    with pytest.raises(ConfigError, match="outside"):
        verify(SOURCE, SOURCE, threshold=97.0)
    with pytest.raises(ConfigError, match="dtype"):
        verify(SOURCE, SOURCE, dtype="int8")
    with pytest.raises(CheckpointError, match="nowhere"):
        verify(tmp_path / "nowhere", SOURCE)


@pytest.mark.slow
def test_the_threshold_is_the_converted_model_s(
    converted: dict[int, Path], reports: dict[int, VerificationReport], probes: list[Probe], tmp_path: Path
) -> None:
    guess = probes[1:2]  # a confidence of 0.35
    assert reports[2].threshold == 0.97
    assert reports[2].probes[1].source_exits is False
    shutil.copytree(converted[2], tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "mlxvr.json").read_text())
    (tmp_path / "out" / "mlxvr.json").write_text(json.dumps({**settings, "threshold": 0.25}))
    own = verify(SOURCE, tmp_path / "out", probes=guess)
    assert own.threshold == 0.25
    assert own.probes[0].source_exits is True
    assert verify(SOURCE, tmp_path / "out", probes=probes[-1:], threshold=1.0).threshold == 1.0


# Probes.


def test_bundled_probes() -> None:
    probes, again = bundled(), bundled()
    assert len({probe.name for probe in probes}) == len(probes) == 30
    for one, other in zip(probes, again):
        assert (one.name, one.question, one.options, one.kind) == (
            other.name,
            other.question,
            other.options,
            other.kind,
        )
    assert sum(isinstance(probe.source, Path) for probe in probes) == 24
    assert sum(probe.source is None for probe in probes) == 4
    assert [probe.kind for probe in probes].count("grounding") == 1
    assert 5 < sum(probe.options is None for probe in probes) < 20
    assert max(len(probe.question) for probe in probes if probe.source is None) > 800


@pytest.mark.parametrize(("family", "patch"), [("qwen3_vl", 16), ("qwen2_5_vl", 14)])
def test_probes_are_short_and_share_their_media(family: str, patch: int) -> None:
    spec = FAMILIES[family].vision_spec({"vision_config": {"patch_size": patch}})
    probes = bundled()
    media = load_media(probes, budgeted(spec))
    for probe, shown in zip(probes, media):
        tokens = [math.prod(one.grid) // 4 for one in shown]
        assert max(tokens, default=0) <= (320 if isinstance(probe.source, Path) else 80)
    assert len({id(one) for shown in media for one in shown}) == 6 + 2
