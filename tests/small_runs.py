"""Small training runs: a random model of two layers on the bundled clips, and a reward that any text earns some of.

What a run saves, where it stops and how it goes on does not depend on what its model knows. A step takes a few tenths
of a second here; on the bundled checkpoint it takes several.

    run(tmp_path / "run", small_model, steps=2)

As a script this is `mlxvr.train` in a process that signals itself and notes what it does:

    python tests/small_runs.py NOTES SIGNAL STEP --data .. --output ..

The signal is sent after step STEP has sampled and before it learns (0: never); NOTES has a line of JSON for each step.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.grpo.step.lora import lora_weights
from mlxvr.grpo.step.policy_update import PolicyUpdater
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.grpo.train_state import state_file
from mlxvr.grpo.trainer import train

__all__ = ["CLIPS", "REWARD", "command", "entries", "exact", "flags", "make_settings", "run", "write_small_model"]

CLIPS = demo_folder() / "clips.jsonl"
REWARD = "small_runs:by_text"
TIMED = {"tokens_per_second", "rollout_seconds", "update_seconds", "peak_memory"}
EQUAL = "MLXVR_TEST_EQUAL_REWARDS"  # of the script: {step: [ids of rows whose completions all earn the same]}
_step = 0


def by_text(text, row):
    """From 0 to 1, by the text alone."""
    if row.id in json.loads(os.environ.get(EQUAL, "{}")).get(str(_step), ()):
        return 0.5
    return hashlib.sha256(text.encode()).digest()[0] / 255


def write_small_model(folder):
    """A Qwen3-VL of two layers with random weights and a short system prompt; returns its folder."""
    from checkpoints import write_checkpoint  # not needed in the script, whose start is part of every test's time

    text = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "deepstack_visual_indexes": [0]}
    write_checkpoint(folder, "qwen3_vl", text=text, vision=vision)
    (folder / "mlxvr.json").write_text(json.dumps({"system_prompt": "Answer in a box."}))
    return folder


def make_settings(model, output, **changes):
    """Fields of `TrainConfig`: two rows a step, three completions of at most eight tokens, one frame of a clip."""
    return {
        "model": model,
        "data": CLIPS,
        "output": output,
        "dtype": "float32",
        "batch_size": 2,
        "group_size": 3,
        "max_completion_tokens": 8,
        "max_frames": 2,
        "video_tokens": 16,
        "learning_rate": 1e-3,
        "rank": 4,
        "reward": (REWARD,),
        **changes,
    }


def run(output, model, *, progress=None, on_note=None, should_stop=None, **changes):
    """Train in this process."""
    config = TrainConfig(**make_settings(model, output, **changes))
    return train(config, progress=progress, on_note=on_note, should_stop=should_stop)


def flags(settings):
    """Settings as the command line takes them."""
    told = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return [part for name, value in told.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def command(notes, settings, *more, stop="SIGINT", at=0):
    """The command line of a process that signals itself in step `at`."""
    return [sys.executable, __file__, notes, stop, at, *flags(settings), *more]


def entries(output):
    """Of the journal; a run that ended before it did anything left none."""
    journal = output / "metrics.jsonl"
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def exact(output):
    """All that has to be the same bit for bit: figures that are not times, what the state notes, and its arrays."""
    timeless = [{name: value for name, value in entry.items() if name not in TIMED} for entry in entries(output)]
    arrays, notes = mx.load(str(state_file(output)), return_metadata=True)
    return timeless, notes["mlxvr_train"], {name: np.array(array).tobytes() for name, array in arrays.items()}


def _bits(model):
    digest = hashlib.sha256()
    for _, array in sorted(lora_weights(model).items()):
        digest.update(np.array(array).tobytes())
    return digest.hexdigest()


def _main(notes, name, at, argv):
    import small_runs  # the module that the reward is taken from, not this script

    from mlxvr.train import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what was started in the background
    update, sample, calls = PolicyUpdater.update, PolicyUpdater.sample, []

    def watched_sample(self, prompt, step, **options):
        small_runs._step = step
        return sample(self, prompt, step, **options)

    def watched_update(self, groups, *given, **options):
        calls.append(groups)
        if len(calls) == at:
            os.kill(os.getpid(), getattr(signal, name))
        done = update(self, groups, *given, **options)
        texts = {group.row.id: list(group.rollout.texts) for group in groups}
        varied = [group.row.id for group in groups if not group.is_unanimous]
        with Path(notes).open("a") as file:
            print(json.dumps({"texts": texts, "varied": varied, "bits": _bits(self.model)}), file=file)
        return done

    PolicyUpdater.update, PolicyUpdater.sample = watched_update, watched_sample
    return main(argv)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
