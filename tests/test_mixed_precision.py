"""Bits for each module: gradients, sizes and the knapsack, each against the plain way of doing it."""

import itertools
import json
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxvr.checkpoint import recipe as recipes
from mlxvr.checkpoint.recipe import Precision, Quantization, Recipe, Rule
from mlxvr.conversion.measure import knapsack, mixed_precision, squared_gradients
from mlxvr.conversion.measure.knapsack import assign
from mlxvr.conversion.measure.layerwise import LayerwiseModel
from mlxvr.conversion.measure.mixed_precision import candidates, choose_precisions, measure
from mlxvr.conversion.measure.probes import Probe
from mlxvr.conversion.measure.verify import verify
from mlxvr.conversion.source import Checkpoint
from mlxvr.convert import convert
from mlxvr.errors import Cancelled, ConfigError
from mlxvr.model.loading import load_model
from mlxvr.runtime.hooks import Hooks
from tests.checkpoints import FAMILIES, random_media, write_checkpoint

EMBEDDING, HEAD = "language_model.model.embed_tokens", "language_model.lm_head"
PICTURE = (np.indices((64, 96)).sum(axis=0)[..., None] * [1, 2, 3] % 256).astype(np.uint8)
PROBES = [
    Probe(name="picture", source=PICTURE, question="What is it?", options=("a cat", "a dog")),
    Probe(name="text", question="Is two more than one?"),
]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Random weights close no box."""
    monkeypatch.setattr("mlxvr.conversion.measure.first_answers.MOST_TOKENS", 6)


@pytest.fixture(scope="module")
def one_checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("one") / "qwen3_vl", "qwen3_vl", dtype="BF16")


def make_recipe(family, **quantization):
    return Recipe(name="test", family=family, threshold=0.9, quantization=Quantization(**quantization))


@pytest.fixture(scope="module", params=[(family, tied) for family in FAMILIES for tied in (False, True)], ids=str)
def checkpoint(request, tmp_path_factory):
    family, tied = request.param
    return write_checkpoint(tmp_path_factory.mktemp("model") / family, family, dtype="BF16", tied=tied)


def open_answered(folder, **options):
    """A layer-wise model and its answers to a video and a text."""
    model = LayerwiseModel.open(folder, dtype="float32", **options)
    from mlxvr.model.prompt import build_prompt

    parts = (model.model.tokenizer, model.model.family, model.model.config)
    video = random_media(model.model.family.name, "video", (2, 4, 8))
    prompts = [build_prompt(*parts, [video], "What moves?"), build_prompt(*parts, [], "Is two more than one?")]
    return model, squared_gradients.answer_prompts(model, prompts, None)


def whole_squares(folder, answered):
    """Squared gradients by `mx.grad` through the whole network, summed over answers."""
    model = load_model(folder, dtype="float32")
    weights = {
        key: one
        for key, one in tree_flatten(model.network.language_model.parameters())
        if key.endswith(".weight") and one.ndim == 2
    }
    sums = {}
    for one in answered:
        prompt = one.prompt
        features = model.encode(prompt.media) if prompt.media else None

        def certainty(parameters, prompt=prompt, one=one, features=features):
            model.network.language_model.update(tree_unflatten(list(parameters.items())))
            hidden = model.hidden(
                mx.array(prompt.ids)[None],
                mx.array(prompt.positions)[:, None],
                features=features,
                media_mask=prompt.media_mask[None],
            )
            logits = model.logits(hidden)[0, one.first : one.first + len(one.targets)]
            chances = mx.softmax(logits, axis=-1)[mx.arange(len(one.targets)), mx.array(one.targets)]
            return mx.mean(mx.log(chances))

        for key, gradient in mx.grad(certainty)(weights).items():
            name = f"language_model.{key.removesuffix('.weight')}"
            sums[name] = sums.get(name, 0.0) + np.array(gradient).astype(np.float64) ** 2
    return sums


def test_squared_gradients_are_those_of_the_whole_model(checkpoint):
    model, answered = open_answered(checkpoint, memory_limit=0)
    found = {}
    for module, _, squares in squared_gradients.SquaredGradients(model, answered, 1 << 40).squares():
        found[module] = np.concatenate([found[module], np.array(squares)]) if module in found else np.array(squares)
    expected = whole_squares(checkpoint, answered)
    assert found.keys() == expected.keys()
    for module, squares in expected.items():
        np.testing.assert_allclose(found[module], squares, rtol=2e-3, atol=1e-5 * squares.max(), err_msg=module)
        assert squares.max() > 0, module


def test_rows_of_a_vocabulary_may_come_in_parts(one_checkpoint, monkeypatch):
    model, answered = open_answered(one_checkpoint)
    whole = {m: np.array(s) for m, _, s in squared_gradients.SquaredGradients(model, answered, 1 << 40).squares()}
    monkeypatch.setattr(squared_gradients, "_ROWS", 100)
    model, answered = open_answered(one_checkpoint)
    parts = [(m, np.array(s)) for m, _, s in squared_gradients.SquaredGradients(model, answered, 1 << 40).squares()]
    for module in (EMBEDDING, HEAD):
        own = [squares for name, squares in parts if name == module]
        if module in whole:
            assert len(own) == 6
            np.testing.assert_allclose(np.concatenate(own), whole[module], rtol=1e-3, atol=1e-6 * whole[module].max())


def test_what_goes_into_layers_may_be_kept_in_bfloat16(one_checkpoint):
    model, answered = open_answered(one_checkpoint)
    exact = {
        m: float(s.sum().item()) for m, _, s in squared_gradients.SquaredGradients(model, answered, 1 << 40).squares()
    }
    model, answered = open_answered(one_checkpoint)
    rounded = {m: float(s.sum().item()) for m, _, s in squared_gradients.SquaredGradients(model, answered, 0).squares()}
    assert rounded != exact
    assert rounded == {module: pytest.approx(total, rel=0.1) for module, total in exact.items()}


def test_weights_may_take_a_share_of_what_mlx_should_use(one_checkpoint, monkeypatch):
    """As a model is loaded: not of all memory that the machine has."""
    info = {"memory_size": 5000, "max_recommended_working_set_size": 1000}
    monkeypatch.setattr("mlxvr.runtime.device_memory.mx.device_info", lambda: info)
    limits = []

    def refuse(folder, *, dtype=None, memory_limit=None):
        limits.append(memory_limit)
        raise Cancelled("far enough")

    monkeypatch.setattr(LayerwiseModel, "open", refuse)
    with pytest.raises(Cancelled):
        measure(one_checkpoint, {}, probes=PROBES)
    with pytest.raises(Cancelled):
        verify(one_checkpoint, one_checkpoint, probes=PROBES)
    assert limits == [400, 400]
    with pytest.raises(Cancelled):
        verify(one_checkpoint, one_checkpoint, probes=PROBES, memory_limit=7)
    assert limits[-1] == 7


def test_the_cost_is_the_weighted_error_of_rounding(one_checkpoint):
    options = candidates(Checkpoint.open(one_checkpoint), make_recipe("qwen3_vl"))
    costs = measure(one_checkpoint, options, probes=PROBES)
    model = LayerwiseModel.open(one_checkpoint, dtype="float32")
    prompts = mixed_precision.build_prompts(
        model.model, PROBES, mixed_precision.load_media(PROBES, mixed_precision.budgeted(model.model.spec))
    )
    expected = whole_squares(one_checkpoint, squared_gradients.answer_prompts(model, prompts, None))
    module = "language_model.model.layers.1.mlp.down_proj"
    weight = load_model(one_checkpoint).network.language_model.model.layers[1].mlp.down_proj.weight
    for option, cost in zip(options[module], costs[module], strict=True):
        if option.precision is None:
            assert cost == 0.0
            continue
        how = {"bits": option.precision.bits, "group_size": option.precision.group_size}
        back = mx.dequantize(*mx.quantize(weight, **how), **how)
        error = np.array(back.astype(mx.float32)) - np.array(weight.astype(mx.float32))
        assert cost == pytest.approx((expected[module] * error**2).sum() / len(PROBES), rel=5e-3)


def test_a_layer_that_changes_nothing_costs_nothing(tmp_path):
    def silence(name, array):
        return array * 0 if "layers.1." in name and name.endswith(("o_proj.weight", "down_proj.weight")) else array

    folder = write_checkpoint(tmp_path / "model", "qwen3_vl", weights=silence)
    recipe = make_recipe("qwen3_vl")
    options = candidates(Checkpoint.open(folder), recipe)
    costs = measure(folder, options, probes=PROBES)
    for module, spent in costs.items():
        silent = "layers.1." in module
        assert (max(spent) == 0.0) == silent, module
    middle = (sizes(options, 0) + sizes(options, -2)) // 2
    fixed = total_bytes(folder, dict.fromkeys(options))[1] - sizes(options, -1)
    chosen = choose_precisions(folder, recipe, target_bytes=fixed + middle, probes=PROBES)
    bits = {module: 16 if one is None else one.bits for module, one in chosen.items() if module in options}
    assert {own for module, own in bits.items() if "layers.1." in module} == {3}
    assert min(own for module, own in bits.items() if "layers.1." not in module) > 3


def sizes(options, index):
    return sum(own[index].nbytes for own in options.values())


def total_bytes(folder, chosen):
    from mlxvr.conversion.tensor_plan import make_plan

    plan = make_plan(Checkpoint.open(folder), chosen.get, "bfloat16")
    return plan, plan.nbytes


def tensor_bytes(folder):
    """Bytes of all tensors, from the headers alone."""
    total = 0
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header.pop("__metadata__", None)
        total += sum(end - start for start, end in (one["data_offsets"] for one in header.values()))
    return total


def test_a_conversion_has_the_size_that_was_predicted(one_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(mixed_precision, "clip_probes", lambda: PROBES)
    recipe = recipes.load("qwen3_vl")
    options = candidates(Checkpoint.open(one_checkpoint), recipe)
    fixed = total_bytes(one_checkpoint, dict.fromkeys(options))[1] - sizes(options, -1)
    target = fixed + (sizes(options, 0) + sizes(options, -2)) // 2
    chosen = choose_precisions(one_checkpoint, recipe, target_bytes=target)
    predicted = total_bytes(one_checkpoint, chosen)[1]
    report = convert(one_checkpoint, tmp_path / "out", bits="auto", target_bytes=target)
    assert tensor_bytes(tmp_path / "out") == report.bytes_after == predicted
    assert 0.97 * target < predicted <= target
    assert len({one.bits for one in chosen.values() if one is not None}) > 1
    smallest = fixed + sizes(options, 0)
    least = choose_precisions(one_checkpoint, recipe, target_bytes=smallest)
    assert total_bytes(one_checkpoint, least)[1] == smallest


def test_more_room_never_costs_more(one_checkpoint):
    options = candidates(Checkpoint.open(one_checkpoint), make_recipe("qwen3_vl"))
    costs = measure(one_checkpoint, options, probes=PROBES)
    items = [[(one.nbytes, cost) for one, cost in zip(options[m], costs[m])] for m in options]
    spent = []
    for budget in np.linspace(sizes(options, 0), sizes(options, -1), 25).astype(int):
        picks = assign(items, int(budget))
        assert sum(item[pick][0] for item, pick in zip(items, picks)) <= budget
        spent.append(sum(item[pick][1] for item, pick in zip(items, picks)))
    assert spent == sorted(spent, reverse=True)
    assert spent[-1] == 0.0 < spent[0]


def test_what_the_recipe_keeps_and_asks_for_is_respected(one_checkpoint):
    rules = (Rule(match="*.down_proj", min_bits=6, group_size=32), Rule(match=EMBEDDING, min_bits=8))
    keep = ("vision_tower.*", "*.layers.0.*")
    recipe = make_recipe("qwen3_vl", keep=keep, rules=rules)
    options = candidates(Checkpoint.open(one_checkpoint), recipe)
    fixed = total_bytes(one_checkpoint, dict.fromkeys(options))[1] - sizes(options, -1)
    for extra in (0, 5000):
        chosen = choose_precisions(
            one_checkpoint, recipe, target_bytes=fixed + sizes(options, 0) + extra, probes=PROBES
        )
        assert chosen.keys() == total_bytes(one_checkpoint, {})[0].stored.keys()
        for module, one in chosen.items():
            if module.startswith("vision_tower.") or ".layers.0." in module:
                assert one is None
            elif module.endswith("down_proj"):
                assert one is None or (one.bits >= 6 and one.group_size == 32)
            elif module == EMBEDDING:
                assert one is None or one.bits == 8


def test_rows_that_no_group_divides_stay(tmp_path):
    folder = write_checkpoint(tmp_path / "model", "qwen3_vl", text={"intermediate_size": 80})
    options = candidates(Checkpoint.open(folder), make_recipe("qwen3_vl"))
    assert not [module for module in options if module.endswith("down_proj")]  # its rows have 80 numbers
    assert "language_model.model.layers.0.mlp.up_proj" in options


def test_a_tower_that_is_not_kept_is_stored_as_the_recipe_says(tmp_path):
    folder = write_checkpoint(tmp_path / "model", "qwen3_vl")
    recipe = make_recipe("qwen3_vl", keep=(), bits=8, group_size=32)
    options = candidates(Checkpoint.open(folder), recipe)
    assert not [module for module in options if module.startswith("vision_tower.")]
    target = total_bytes(folder, {m: recipe.precision(m) for m in total_bytes(folder, {})[0].stored})[1]
    chosen = choose_precisions(folder, recipe, target_bytes=target, probes=PROBES)
    assert chosen["vision_tower.blocks.0.attn.qkv"] == Precision(bits=8, group_size=32)
    assert total_bytes(folder, chosen)[1] <= target


def test_a_target_out_of_reach_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "model", "qwen3_vl")
    with pytest.raises(ConfigError, match=r"target of 0\.00 MB is too small.*take 1\.03 MB"):
        choose_precisions(folder, make_recipe("qwen3_vl"), target_bytes=1000, probes=PROBES)
    with pytest.raises(ConfigError, match=r"more than the unquantized weights take"):
        choose_precisions(folder, make_recipe("qwen3_vl"), target_bytes=10**9, probes=PROBES)
    options = candidates(Checkpoint.open(folder), make_recipe("qwen3_vl"))
    fitting = total_bytes(folder, dict.fromkeys(options))[1] - 1000
    with pytest.raises(ConfigError, match="no probes"):
        choose_precisions(folder, make_recipe("qwen3_vl"), target_bytes=fitting, probes=[])
    with pytest.raises(Cancelled):
        choose_precisions(
            folder, make_recipe("qwen3_vl"), target_bytes=fitting, probes=PROBES, hooks=Hooks(should_stop=lambda: True)
        )


def test_only_clips_are_asked_about_by_default():
    assert {probe.source.suffix for probe in mixed_precision.clip_probes()} == {".mp4"}
    assert len({probe.source for probe in mixed_precision.clip_probes()}) == 6


def brute_force(items, budget):
    """The least cost over all ways to pick, by trying each."""
    costs = [
        math.fsum(item[pick][1] for item, pick in zip(items, picks))
        for picks in itertools.product(*(range(len(item)) for item in items))
        if sum(item[pick][0] for item, pick in zip(items, picks)) <= budget
    ]
    return min(costs)


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_finds_what_trying_everything_finds(seed):
    draw = np.random.default_rng(seed)
    items = [
        [(int(size), float(cost)) for size, cost in zip(draw.integers(1, 60, 4) * 8, draw.random(4))] for _ in range(5)
    ]
    least = sum(min(size for size, _ in item) for item in items)
    for budget in range(least, least + 900, 37):
        picks = assign(items, budget)
        assert sum(item[pick][0] for item, pick in zip(items, picks)) <= budget
        spent = math.fsum(item[pick][1] for item, pick in zip(items, picks))
        assert spent == pytest.approx(brute_force(items, budget))


def test_a_greedy_choice_would_be_wrong_here():
    items = [[(0, 10.0), (6, 0.0)], [(0, 9.0), (5, 0.0)], [(0, 8.9), (5, 0.0)]]
    assert assign(items, 10) == [0, 1, 1]  # by gain per byte the first would be taken, and nothing else would fit


def test_sizes_without_a_common_divisor_still_fit(monkeypatch):
    monkeypatch.setattr(knapsack, "_UNITS", 50)
    draw = np.random.default_rng(1)
    items = [[(int(size), 1 / size) for size in draw.integers(10_000, 90_001, 5)] for _ in range(20)]
    least = sum(min(size for size, _ in item) for item in items)
    for budget in (least, least + 12_345, least + 400_000):
        assert sum(item[pick][0] for item, pick in zip(items, assign(items, budget))) <= budget


def test_a_budget_below_the_least_is_an_error():
    with pytest.raises(ValueError, match="smallest sizes take 7"):
        assign([[(3, 1.0), (9, 0.0)], [(4, 1.0)]], 6)
