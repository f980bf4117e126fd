"""Twenty steps of training as they once were: a change of any part that changes what is learned shows here.

    python -m tests.test_trajectory     # writes the golden file anew, for a change that is meant

The early snapshot of the bundled world, on the bundled clips. Other BLAS libraries round differently, and a token whose
draw is that close may come out differently; a seed was chosen with which OpenBLAS and MLX's own library agree.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from mlxvr.grpo.config import TrainConfig
from mlxvr.grpo.trainer import train
from mlxvr.reasoner import demo_folder

GOLDEN = Path(__file__).parent / "golden" / "trajectory.json"
EARLY = Path(__file__).parents[1] / "examples" / "shellgame" / "early"
FIGURES = ("reward", "first", "second", "format", "tokens_mean", "entropy", "kl", "grad_norm", "zero_variance")


def walk(output: Path) -> list[dict[str, float | None]]:
    """The figures of each step."""
    steps: list[dict[str, float | None]] = []
    train(
        TrainConfig(
            model=EARLY,
            dtype="float32",
            data=demo_folder() / "clips.jsonl",
            output=output,
            steps=20,
            batch_size=2,
            group_size=4,
            max_completion_tokens=96,
            learning_rate=1e-3,
            beta=0.04,
            seed=3,
        ),
        on_entry=lambda entry, _: steps.append({name: entry[name] for name in FIGURES}),
    )
    return steps


@pytest.mark.slow
def test_twenty_steps(tmp_path):
    golden, found = json.loads(GOLDEN.read_text()), walk(tmp_path / "run")
    assert len(found) == len(golden) == 20
    for step, (now, before) in enumerate(zip(found, golden), start=1):
        for name in FIGURES:
            told = f"step {step}: {name}"
            if before[name] is None:
                assert now[name] is None, told
            else:
                assert now[name] == pytest.approx(before[name], rel=1e-2, abs=1e-4), told
    assert sum(entry["grad_norm"] > 0 for entry in golden) >= 15, "most steps teach something"


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        lines = ",\n ".join(json.dumps(entry) for entry in walk(Path(folder) / "run"))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(f"[{lines}]\n")
    sys.stdout.write(f"{GOLDEN}\n")
