"""The settings of a run decide what they say: each is shown by what a small run does, or by what its parts get."""

import json
from dataclasses import asdict
from fractions import Fraction
from os import PathLike

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import CLIPS, entries, exact, run

from mlxvr.answering.sampling_config import SamplingConfig
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.cli.settings import read_settings, settings_of, write_settings
from mlxvr.errors import ConfigError
from mlxvr.grading.reward import Weights
from mlxvr.grpo import training_step, validation
from mlxvr.grpo.setup import reward_weights
from mlxvr.grpo.step import policy_update
from mlxvr.grpo.step.lora_config import LoraConfig
from mlxvr.grpo.step.loss_config import LossConfig
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.media.frame_options import FrameLimitOptions
from mlxvr.reasoner.load_options import LoadOptions

SHORT = {"steps": 1, "batch_size": 1, "group_size": 2, "max_completion_tokens": 4}


def noted(monkeypatch, module, name):
    """Keyword arguments and sampling settings of every call of a function, which goes on as it was."""
    calls, function = [], getattr(module, name)

    def noting(*given, **options):
        sampling = [asdict(argument) for argument in given if isinstance(argument, SamplingConfig)]
        calls.append({**options, **(sampling[0] if sampling else {})})
        return function(*given, **options)

    monkeypatch.setattr(module, name, noting)
    return calls


def test_the_adapter(tmp_path, small_model):
    how = {"rank": 3, "scale": 5.0, "dropout": 0.25, "dora": True, "target_modules": ("q_proj", "down_proj")}
    run(tmp_path, small_model, **SHORT, **how)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    parameters = config["lora_parameters"]
    assert (parameters["rank"], parameters["scale"], parameters["dropout"]) == (3, 5.0, 0.25)
    weights = load_file(tmp_path / "adapters.safetensors")
    assert {name.split(".")[-2] for name in weights} == {"q_proj", "down_proj"}
    assert all(3 in array.shape for name, array in weights.items() if name.endswith(("lora_a", "lora_b")))
    assert any(name.endswith(".m") for name in weights), "DoRA's lengths"


def test_the_learning_rate(tmp_path, small_model):
    """Two steps of three up to the highest; then half a cosine down, of which the next step is the middle."""
    how = {"steps": 4, "warmup_steps": 2, "schedule": "cosine", "learning_rate": 1e-3}
    run(tmp_path, small_model, **{**SHORT, **how})
    rates = [entry["learning_rate"] for entry in entries(tmp_path)]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 0.5e-3])


@pytest.mark.parametrize(
    ("how", "rows", "most"),
    [
        ({"max_frames": 6}, 3, 1000),
        ({"max_frames": 2, "video_tokens": 16}, 1, 16),
        ({"max_frames": None, "fps": 0.5, "video_tokens": 64}, None, 64),
    ],
)
def test_frames(tmp_path, small_model, monkeypatch, how, rows, most):
    """Two frames are a temporal patch, four patches a token; the clip's length and the rate give the number."""
    record = json.loads(CLIPS.read_text().splitlines()[0])
    if rows is None:
        rows = int(record["frames"] / Fraction(record["fps"]) * how["fps"]) // 2
        assert rows > 2, "more than the fewest frames that are sampled"
    seen = noted(monkeypatch, training_step, "encode_row")
    run(tmp_path, small_model, **{**SHORT, "video_tokens": None, "limit": 1, **how})
    ((time, height, width),) = [call["vision"].grid for call in seen]
    assert time == rows
    assert 0 < time * height * width // 4 <= most


def test_sampling(tmp_path, small_model, monkeypatch):
    """What rollouts are given; validation takes the most probable token, whatever training samples with."""
    drawn = noted(monkeypatch, policy_update, "rollout")
    measured = noted(monkeypatch, validation, "rollout")
    how = {"temperature": 0.7, "top_p": 0.9, "prefill_step_size": 33, "valid": CLIPS, "valid_limit": 1}
    run(tmp_path, small_model, **SHORT, **how)
    assert {
        name: drawn[0][name] for name in ("temperature", "top_p", "prefill_step_size", "max_tokens", "group_size")
    } == {
        "temperature": 0.7,
        "top_p": 0.9,
        "prefill_step_size": 33,
        "max_tokens": 4,
        "group_size": 2,
    }
    assert len(measured) == 2, "before the first step and after the last"
    assert {(call["temperature"], call["group_size"], call["prefill_step_size"]) for call in measured} == {(0.0, 1, 33)}


def test_the_share_of_probability_that_is_drawn_from(tmp_path, small_model):
    """Nearly none of it leaves the most probable token alone, so that completions of a row are the same."""
    for top_p, equal in ((1e-6, 1.0), (1.0, 0.0)):
        run(tmp_path / str(top_p), small_model, **SHORT, top_p=top_p)
        assert entries(tmp_path / str(top_p))[0]["frac_reward_zero_std"] == equal


def test_scaled_advantages(tmp_path, small_model):
    """A gradient is linear in the advantages, and they are divided by the rewards' standard deviation or not."""
    lengths = {}
    for scale in (True, False):
        run(tmp_path / str(scale), small_model, **{**SHORT, "group_size": 4}, beta=0.0, scale_rewards=scale)
        (entry,) = entries(tmp_path / str(scale))
        lengths[scale] = entry["grad_norm"]
    assert lengths[False] / lengths[True] == pytest.approx(entry["reward_std"], rel=1e-3)
    assert abs(entry["reward_std"] - 1.0) > 0.2, "scaling changes something"


def test_curves_and_reports(tmp_path, small_model):
    run(tmp_path / "run", small_model, **SHORT, plot=tmp_path / "curves.svg", report_to=("tensorboard",))
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_the_best_adapter_is_that_of_the_best_measurement(tmp_path, small_model, monkeypatch):
    rewards = iter([0.9, 0.2, 0.7, 0.4])  # the first before training, of which there is no adapter
    summarise = validation.summarise
    monkeypatch.setattr(validation, "summarise", lambda rows: {**summarise(rows), "valid_reward": next(rewards)})
    how = {"valid": CLIPS, "valid_limit": 1, "valid_every": 1}
    report = run(tmp_path / "run", small_model, **{**SHORT, "steps": 3}, **how)
    assert report.best_step == 2
    run(tmp_path / "two", small_model, **{**SHORT, "steps": 2})
    best = (tmp_path / "run" / "best" / "adapters.safetensors").read_bytes()
    assert best == (tmp_path / "two" / "adapters.safetensors").read_bytes()
    assert best != (tmp_path / "run" / "adapters.safetensors").read_bytes()


def test_what_watches_training_without_labels_goes_on_as_well(tmp_path, small_model):
    records = [json.loads(line) for line in CLIPS.read_text().splitlines()[:2]]
    for record in records:
        del record["answer"]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    how = {**SHORT, "data": data, "media_root": demo_folder(), "reward": ("agreement",), "save_every": 1, "epochs": 4}
    run(tmp_path / "whole", small_model, **{**how, "steps": 4})
    run(tmp_path / "cut", small_model, **{**how, "steps": 2})
    run(tmp_path / "cut", small_model, **{**how, "steps": 4}, resume=True)
    _, notes, _ = whole = exact(tmp_path / "whole")
    assert json.loads(notes)["guard"], "it has seen something"
    assert exact(tmp_path / "cut") == whole
    assert np.isfinite([entry["rewards/agreement/mean"] for entry in entries(tmp_path / "cut")]).all()


def test_parts_have_their_defaults_and_flat_keywords_reach_them(tmp_path):
    """A default of the loss, the adapter or the reward is written once; flags, TOML keys and keywords are flat."""
    config = TrainConfig(data=tmp_path, output=tmp_path)
    assert config.loss == LossConfig(max_completion_tokens=1024)
    assert config.lora == LoraConfig()
    assert reward_weights(config) == Weights()
    changed = {"beta": 0.5, "loss_type": "bnpo", "rank": 3, "target_modules": ("q_proj",), "epsilon": 0.1}
    config = TrainConfig(data=tmp_path, output=tmp_path, **changed)
    assert config.loss == LossConfig(beta=0.5, loss_type="bnpo", epsilon=0.1, max_completion_tokens=1024)
    assert config.lora == LoraConfig(rank=3, target_modules=("q_proj",))
    write_settings(tmp_path / "settings.toml", config, title="of a test")
    values = read_settings(tmp_path / "settings.toml", TrainConfig)
    assert {name: values[name] for name in changed} == changed
    assert TrainConfig(**values) == config


def test_a_model_and_frames_have_the_options_that_they_have_for_answers():
    """Name, type, default, help and choices, but for what an adapter and a limit of memory mean to a run."""
    ours, theirs = settings_of(TrainConfig), settings_of(LoadOptions) | settings_of(FrameLimitOptions)
    shared = ours.keys() & theirs.keys() - {"adapter", "memory_limit"}
    assert shared == theirs.keys() - {"adapter", "memory_limit", "kv_bits"}
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    for name in ("adapter", "memory_limit"):
        assert (ours[name].kind, ours[name].default) == (theirs[name].kind, theirs[name].default)


@pytest.mark.parametrize("changed", [{"dtype": "float8"}, {"prefill_step_size": 0}, {"memory_limit": float("nan")}])
def test_options_of_the_model_are_checked_when_the_settings_are_built(tmp_path, changed):
    with pytest.raises(ConfigError, match=next(iter(changed))):
        TrainConfig(data=tmp_path, output=tmp_path, **changed)


def test_a_model_of_any_kind_of_path_is_found_again(tmp_path, monkeypatch):
    class Folder(PathLike):
        def __fspath__(self) -> str:
            return "model"

    monkeypatch.chdir(tmp_path)
    write_settings(tmp_path / "a.toml", TrainConfig(model=Folder(), data=tmp_path, output=tmp_path), title="of a test")
    assert read_settings(tmp_path / "a.toml", TrainConfig)["model"] == str(tmp_path / "model")
