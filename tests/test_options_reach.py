"""Every option of every verb reaches what it is for, or is refused, or is said to change nothing.

A verb runs once on a tiny model with its settings replaced by a recorder, which notes each option that the package
reads. Reads that only compare, print or estimate do not count. An option that somebody adds and forgets to pass on is
never read, and fails here by name.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import checkpoints
import pytest
from groups import tiny_model

import mlxvr.cli.parser
from mlxvr import convert, fuse, generate
from mlxvr.answering.loop import AskRequest
from mlxvr.conversion.conversion_options import ConvertOptions, FuseOptions
from mlxvr.evaluation.eval_config import EvalConfig
from mlxvr.evaluation.lmms.options import LmmsOptions
from mlxvr.evaluation.runner import evaluate
from mlxvr.evaluation.samples import read_samples
from mlxvr.grpo.step.lora import attach, save_adapter
from mlxvr.grpo.step.lora_config import LoraConfig
from mlxvr.grpo.train_config import _FOR_FILTERING, TrainConfig, idle_options
from mlxvr.grpo.trainer import train
from mlxvr.media.frame_options import FrameOptions
from mlxvr.reasoner.clip import Clip
from mlxvr.reasoner.load_options import LoadOptions
from mlxvr.reasoner.reasoner import Reasoner

# Functions that look at options without acting on them.
_LOOKING = {
    *("__post_init__", "check_at_least", "check_positive", "_check_comparison", "_check_calibration"),
    *(
        "identity",
        "idle_options",
        "write_settings",
        "_schedule_identity",
        "asdict",
        "_asdict_inner",
        "replace",
        "__repr__",
    ),
    *("estimate_memory", "check_sizes", "check_lengths"),
}


def acts() -> bool:
    """Whether the function of the package that reads an attribute now does something with it."""
    frame = sys._getframe(2)
    module = frame.f_globals.get("__name__", "")
    names = []
    while frame is not None and len(names) < 4:  # comprehensions have frames of their own before Python 3.12
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return module.startswith("mlxvr.") and module != "mlxvr.cli.parser" and not _LOOKING.intersection(names)


def recorder(config: type) -> tuple[type, set[str]]:
    """A subclass of a dataclass of settings, and the names of the fields that are read from it."""
    reads: set[str] = set()
    names = {field.name for field in dataclasses.fields(config)}

    class Recorded(config):
        def __getattribute__(self, name: str):
            if name in names and acts():
                reads.add(name)
            return super().__getattribute__(name)

    return Recorded, reads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, an adapter of it, and rows about text alone, enough to calibrate on."""
    folder = tmp_path_factory.mktemp("options")
    model = tiny_model(folder / "model", "qwen3_vl")
    attach(model, LoraConfig(rank=2), seed=0)
    save_adapter(folder / "adapter", model, LoraConfig(rank=2))
    rows = [{"id": str(n), "question": f"Is it {n}?", "options": ["yes", "no"], "answer": "A"} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def longer_is_better(completion, row):
    """For one row: a group of another earns the same."""
    return float(len(completion)) if row.id == "0" else 0.0


@pytest.fixture
def rewards(monkeypatch):
    """The name of a reward function that differs between completions of a random model."""
    monkeypatch.setitem(sys.modules, "own_rewards", sys.modules[__name__])
    return ("own_rewards:longer_is_better",)


def settings(folder, **changes):
    return {
        "model": folder / "model",
        "data": folder / "rows.jsonl",
        "group_size": 2,
        "filter_samples": 2,
        "max_completion_tokens": 4,
        "batch_size": 1,
        "epochs": 2,
        **changes,
    }


def fields_of(config):
    return {field.name for field in dataclasses.fields(config)}


def test_options_of_training(folder, tmp_path, rewards):
    Recorded, reads = recorder(TrainConfig)
    train(
        Recorded(
            **settings(
                folder,
                output=tmp_path / "run",
                valid=folder / "rows.jsonl",
                valid_limit=2,
                valid_every=3,
                reward=rewards,
                limit=2,
            )
        )
    )
    idle = {"filter_samples", "filter_threshold"}
    assert fields_of(TrainConfig) - reads == idle
    changed = TrainConfig(**settings(folder, output=tmp_path, filter_threshold=0.5))
    assert {name for names in idle_options(changed).values() for name in names} == idle


def test_options_of_filtering(folder, tmp_path, rewards):
    Recorded, reads = recorder(TrainConfig)
    options = settings(
        folder, adapter=folder / "adapter", reward=rewards, filter_threshold=1.0, skip_bad_rows=True, limit=3
    )
    notes = []
    config = Recorded(**options, output=tmp_path / "run", filter_only=True, rank=3)
    with contextlib.suppress(mlxvr.DataError):  # no row is left: a random model may be right each time
        train(config, on_note=notes.append)
    refused = {"resume"}
    with pytest.raises(mlxvr.ConfigError, match="leave resume out"):
        TrainConfig(**options, output=tmp_path, filter_only=True, resume=True)
    assert set(_FOR_FILTERING) - reads == refused - reads
    (told,) = (note for note in notes if note.startswith("without effect"))
    assert told == "without effect: --rank, --epochs, --batch-size, --group-size, as --filter-only does not train"


def test_options_of_evaluation(folder, tmp_path):
    Recorded, reads = recorder(EvalConfig)
    options = {"model": folder / "model", "data": folder / "rows.jsonl", "max_tokens": 4, "resamples": 100}
    for calibrated in ({}, {"calibrate": "no_loss", "folds": 2}):  # the second run goes on where the first ended
        evaluate(Recorded(**options, **calibrated, output=tmp_path / "run"))
    with pytest.raises(mlxvr.MlxvrError):
        evaluate(Recorded(task="mvbench", data_root=tmp_path, subtitles=True, output=tmp_path / "benchmark"))
    assert fields_of(EvalConfig) - reads == set()


def run_recorded(monkeypatch, main, argv):
    """Run a verb; the names that it parsed, and those that it read."""
    reads = set()

    class Recorded(argparse.Namespace):
        def __getattribute__(self, name: str):
            if not name.startswith("__") and acts():
                reads.add(name)
            return super().__getattribute__(name)

    parsed = Recorded()
    with monkeypatch.context() as patch:
        patch.setattr(mlxvr.cli.parser.argparse, "Namespace", lambda **values: vars(parsed).update(values) or parsed)
        assert main([str(part) for part in argv]) == 0
    return set(vars(parsed)) - {"debug"}, reads  # which `run_verb` itself acts on


def test_options_of_generate(folder, tmp_path, monkeypatch, capsys):
    from PIL import Image

    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    config_reads = {}
    argv = ["--model", folder / "model", "--video", tmp_path / "a.png", "--prompt", "What?", "--max-tokens", 3]
    for config in (LoadOptions, FrameOptions, AskRequest):
        Recorded, config_reads[config] = recorder(config)
        monkeypatch.setattr(generate, config.__name__, Recorded)
    parsed, reads = run_recorded(monkeypatch, generate.main, argv)
    while_built = {"options_may_repeat"}  # `AskRequest` acts on it in its `__post_init__`
    for config, names in config_reads.items():
        assert fields_of(config) - names - while_built == set()
        parsed -= fields_of(config)
    assert parsed - reads == set()
    capsys.readouterr()


def test_options_of_convert(folder, tmp_path, monkeypatch, capsys):
    source = checkpoints.write_checkpoint(tmp_path / "source", "qwen3_vl")
    recipe = Path(__file__).parent / "recipes.py"
    assert recipe.exists()
    argv = ["--hf-path", source, "--mlx-path", tmp_path / "out", "--q-bits", "none"]
    Recorded, config_reads = recorder(ConvertOptions)
    monkeypatch.setattr(convert, "ConvertOptions", Recorded)
    parsed, reads = run_recorded(monkeypatch, convert.main, argv)
    assert fields_of(ConvertOptions) - config_reads == {"target_bytes"}  # which is of --q-bits auto
    assert parsed - reads - fields_of(ConvertOptions) == {"private"}  # which is of --upload-repo
    capsys.readouterr()


def test_options_of_fuse(folder, tmp_path, monkeypatch, capsys):
    argv = ["--model", folder / "model", "--adapter", folder / "adapter", "--mlx-path", tmp_path / "out"]
    Recorded, config_reads = recorder(FuseOptions)
    monkeypatch.setattr(fuse, "FuseOptions", Recorded)
    parsed, reads = run_recorded(monkeypatch, fuse.main, argv)
    assert fields_of(FuseOptions) - config_reads == set()
    assert parsed - reads - fields_of(FuseOptions) == set()
    capsys.readouterr()


@pytest.fixture
def plugin(monkeypatch):
    """The module of the class that lmms-eval makes, with the least of lmms-eval that it needs."""

    class Base:
        def __init__(self):
            self.cache_hook = SimpleNamespace(add_partial=lambda *arguments: None)
            self.task_dict = {}

        def clean(self):
            pass

    name = "mlxvr.evaluation.lmms.models.mlxvr"
    stubs = {module: ModuleType(module) for module in ("lmms_eval", "lmms_eval.api", name)}
    stubs["lmms_eval.api.model"] = SimpleNamespace(lmms=Base)
    stubs["lmms_eval.api.instance"] = SimpleNamespace(
        GenerationResult=lambda text, counts=None: text, Instance=None, TokenCounts=SimpleNamespace
    )
    for module, stub in stubs.items():
        monkeypatch.setitem(sys.modules, module, stub)
    del sys.modules[name]  # imported anew; what was there comes back when the test ends
    return importlib.import_module(name)


def test_options_of_lmms_eval(folder, tmp_path, monkeypatch, plugin):
    """Each model argument has a value of its own; it arrives where models are loaded, clips opened, questions asked."""
    from PIL import Image

    arguments = {
        "pretrained": str(folder / "model"),
        "adapter": str(folder / "adapter"),
        "revision": "main",
        "dtype": "float32",
        "kv_bits": 8,
        "prefill_step_size": 64,
        "memory_limit": 3.5,
        "fps": 3.0,
        "max_frames": 6,
        "video_tokens": 300,
        "image_tokens": 40,
        "mode": "think",
        "threshold": 0.25,
        "frames_fps": 5.0,
        "max_new_tokens": 3,
        "response_prefix": r"\boxed{Answer:",
        "log_file": str(tmp_path / "log.jsonl"),
    }
    ours = {"pretrained": "model", "max_new_tokens": "max_tokens"}
    expected = {ours.get(name, name): value for name, value in arguments.items()} | {"adapter": folder / "adapter"}
    assert expected.keys() == fields_of(LmmsOptions), "a new option is tried here, too"
    assert all(getattr(LmmsOptions(), name) != value for name, value in expected.items())
    arrived, opened = {}, []
    load, open_clip, ask = plugin.load_with, Reasoner.open_with, Clip.ask

    def load_and_note(options):
        arrived.update(dataclasses.asdict(options))
        return load(dataclasses.replace(options, revision=None))  # which is of Hub ids

    def open_and_note(self, source, options):
        opened.append(options)
        return open_clip(self, source, options)

    def ask_and_note(self, question, **options):
        arrived.update(options)
        return ask(self, question, **options)

    monkeypatch.setattr(plugin, "load_with", load_and_note)
    monkeypatch.setattr(Reasoner, "open_with", open_and_note)
    monkeypatch.setattr(Clip, "ask", ask_and_note)
    picture = Image.new("RGB", (64, 48))
    model = plugin.Mlxvr(**arguments)
    model.task_dict["task"] = {"test": [[picture], [picture] * 4]}
    requests = [SimpleNamespace(args=("Which color?", {}, list, number, "task", "test")) for number in range(2)]
    model.generate_until(requests)
    model.clean()
    single, several = opened
    limits = {name: getattr(single, name) for name in ("fps", "max_frames", "video_tokens", "image_tokens")}
    assert dataclasses.replace(single, fps=several.fps) == several
    assert [sample.error for sample in read_samples(tmp_path / "log.jsonl")] == [None, None]
    arrived |= {**limits, "frames_fps": several.fps, "log_file": str(tmp_path / "log.jsonl")}
    assert {name: arrived.get(name) for name in expected} == expected
