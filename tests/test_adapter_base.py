"""An adapter on other weights than those that it was trained on: it says so, wherever it is put on top."""

import json
import logging

import checkpoints
import pytest
from groups import stir, tiny_model

from mlxvr.conversion.fusing import fuse
from mlxvr.conversion.quantize import convert
from mlxvr.errors import CheckpointError
from mlxvr.grpo.step.lora import attach, attach_saved, save_adapter
from mlxvr.grpo.step.lora_config import LoraConfig
from mlxvr.model.adapter_base import difference_of_bases
from mlxvr.model.loading import load_model


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A checkpoint and its copy, another one of the same shapes, the first at 4 bits, and an adapter of the first."""
    folder = tmp_path_factory.mktemp("bases")
    model = tiny_model(folder / "own", "qwen3_vl")
    attach(model, LoraConfig(rank=2), seed=0)
    stir(model)
    save_adapter(folder / "adapter", model, LoraConfig(rank=2))
    checkpoints.write_checkpoint(folder / "copy", "qwen3_vl")
    checkpoints.write_checkpoint(folder / "other", "qwen3_vl", seed=7)
    convert(folder / "own", folder / "packed", bits=4, group_size=32)
    return folder


def warnings_of(caplog, act):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="mlxvr"):
        act()
    return [record.getMessage() for record in caplog.records if "adapter" in record.getMessage()]


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("own", None),
        ("copy", None),
        ("other", "but it was trained on other weights than these"),
        ("packed", "but it was trained on weights of F32, and these have 4 bits"),
    ],
)
def test_who_puts_an_adapter_on_top_is_told(bases, tmp_path, caplog, base, told):
    adapter = bases / "adapter"
    for act in (
        lambda: load_model(bases / base, adapter=adapter),
        lambda: attach_saved(load_model(bases / base), adapter),
        lambda: fuse(bases / base, adapter, tmp_path / "fused"),
    ):
        messages = warnings_of(caplog, act)
        assert [message.partition(", ")[2].partition(":")[0] for message in messages] == ([told] if told else [])
        assert all(message.startswith(f"the adapter {adapter} fits, ") for message in messages)


def test_an_adapter_that_says_nothing_of_its_base_is_taken_as_it_is(bases, tmp_path, caplog):
    config = json.loads((bases / "adapter" / "adapter_config.json").read_text())
    assert difference_of_bases(config, {"sample": "x", "bits": None, "dtype": "F32"}) is not None
    for base in (None, {}, {"sample": None}, "text"):
        assert difference_of_bases({**config, "base": base}, {"sample": "x", "bits": 4, "dtype": "F32"}) is None
    del config["base"]
    assert difference_of_bases(config, {"sample": "x", "bits": None, "dtype": "F32"}) is None


def test_other_shapes_are_refused(bases, tmp_path):
    checkpoints.write_checkpoint(tmp_path / "m", "qwen2_5_vl")
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "m", adapter=bases / "adapter")
