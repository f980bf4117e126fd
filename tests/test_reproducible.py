"""Training gives the same bits every time, on a GPU too.

A GPU adds up the gradient of a gather's repeated rows with atomics, in the order in which its threads arrive, so the
last bits of the sum differ from run to run; so does `array.at[..].add` with repeated indices. No GPU is needed to see
whether a pass does that: its graph names every operation.
"""

import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import FAMILIES
from groups import make_group, stir, tiny_model
from mlx.utils import tree_flatten
from test_gradient import ADVANTAGES

from mlxvr.grpo.step import forward
from mlxvr.grpo.step.forward import completion_logprobs
from mlxvr.grpo.step.lora import attach, lora_weights
from mlxvr.grpo.step.lora_config import LoraConfig
from mlxvr.grpo.step.loss import objective
from mlxvr.grpo.step.loss_config import LossConfig
from mlxvr.grpo.step.packing import pack
from mlxvr.grpo.step.policy_update import PolicyUpdater, ScoredGroup
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.runtime.distributed import ProcessGroup


def operations(path: Path, *arrays: mx.array) -> list[str]:
    """The names of all operations that arrays wait for."""
    mx.export_to_dot(str(path), *arrays)
    return re.findall(r'label ?= ?"([^"]+)"', path.read_text())


def sums_by_index(names: list[str]) -> list[str]:
    """Those that add to rows by index; `ScatterAxis Sum` is the gradient of `take_along_axis`, see below."""
    return [name for name in names if re.fullmatch(r"Scatter(Axis)? ?\w+", name) and name != "Scatter"]


def test_the_graph_shows_a_gather_whose_rows_repeat(tmp_path):
    """The control: what the tests below look for is there where it should be."""
    gradient = mx.grad(lambda rows: rows[mx.array([0, 0, 1])].sum())(mx.ones((2, 3)))
    assert sums_by_index(operations(tmp_path / "a.dot", gradient)) == ["Scatter Sum"]
    added = mx.zeros((2, 3)).at[mx.array([0, 0])].add(1.0)
    assert sums_by_index(operations(tmp_path / "b.dot", added)) == ["Scatter Sum"]


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("bits", [None, 4], ids=["float", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_is_added_up_by_index(tmp_path, family, bits, checkpoint):
    """But for the head's, which takes one logit of each row: no two of these are added to the same place."""
    model = tiny_model(tmp_path / "m", family, bits=bits)
    attach(model, LoraConfig(rank=4), seed=1)
    stir(model)
    group = make_group(model)
    packed = pack(group.prompt, [completion.ids for completion in group.completions])

    def loss(_):
        logprobs = completion_logprobs(model, packed, checkpoint=checkpoint, tokens_at_once=7)
        old, reference = mx.stop_gradient(logprobs), mx.zeros(logprobs.shape)
        config = LossConfig(beta=0.1)
        return objective(logprobs, old, reference, mx.array(ADVANTAGES), mx.array(packed.mask), config)[0]

    value, gradient = nn.value_and_grad(model.network, loss)(None)
    names = operations(tmp_path / "graph.dot", value, *(array for _, array in tree_flatten(gradient)))
    assert len(names) > 500
    chunks = -(-int(packed.mask.sum()) // 7)
    assert sums_by_index(names) == ["ScatterAxis Sum"] * chunks


def test_what_predicts_a_token_is_the_column_that_packing_names(tmp_path):
    """Slices and a broadcast in the place of one gather: the same rows, and padding as it was."""
    model = tiny_model(tmp_path / "m", "qwen3_vl")
    group = make_group(model, lengths=(5, 1, 9, 1, 3))
    packed = pack(group.prompt, [completion.ids for completion in group.completions])
    hidden = mx.random.normal((len(packed.ids), 4))
    found = np.array(forward._predicting(hidden, packed))
    np.testing.assert_array_equal(found, np.array(hidden)[packed.columns[packed.mask]])
    values = np.arange(1.0, 20.0, dtype=np.float32)
    expected = np.zeros(packed.mask.shape, dtype=np.float32)
    expected[packed.mask] = values
    np.testing.assert_array_equal(np.array(forward._pad(mx.array(values), packed.mask.sum(axis=1))), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_step_is_the_same_whatever_was_drawn_before(tmp_path, dropout):
    """Dropout draws by the run's seed, the step and the row, not by what MLX's own generator has come to."""
    results = []
    for state, step in ((1, 4), (2, 4), (1, 5)):
        mx.random.seed(state)
        model = tiny_model(tmp_path / f"m{len(results)}", "qwen3_vl")
        attach(model, LoraConfig(rank=4, dropout=dropout), seed=1)
        stir(model)
        config = TrainConfig(data=tmp_path / "rows.jsonl", output=tmp_path / "run", dropout=dropout)
        updater = PolicyUpdater(model, config, None, ProcessGroup())
        group = ScoredGroup(rollout=make_group(model), scores=None, advantages=ADVANTAGES)
        updater.update([group], 1e-3, step=step)
        results.append({name: np.array(array).tobytes() for name, array in lora_weights(model).items()})
    assert results[0] == results[1]
    assert (results[0] == results[2]) == (dropout == 0.0)
