"""What examples/shellgame/learn.py makes of its runs, on answers made up so that the figures are known."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from shellgame import learn

from mlxvr.data.rows import load_rows

GROUPS = ("reworded", "reworded", "kept back", "kept back", "perception", "tracking")


def write(file, second, confidences, *, clips=10):
    """Answers to six questions on each clip; `second` says of each of the six whether it was right."""
    file.parent.mkdir(exist_ok=True)
    rows = [
        {
            "id": f"{clip}-{number}", "clip": str(clip), "group": group, "first": 0.0, "second": float(right),
            "auto": float(right), "confidence": confidence, "reasoned": 1.0, "tokens": 50, "format": 1.0,
            "reward": 1.0 + 1.1 * right,
        }
        for clip in range(clips)
        for number, (group, right, confidence) in enumerate(zip(GROUPS, second, confidences, strict=True))
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def outcomes(tmp_path):
    write(tmp_path / "before.jsonl", (1, 0, 0, 0, 1, 1), (0.5,) * 6)
    files = [
        write(tmp_path / "paper-0" / "answers.jsonl", (1, 1, 1, 0, 1, 1), (0.5, 0.5, 0.5, 0.5, 0.9, 0.3)),
        write(tmp_path / "paper-1" / "answers.jsonl", (1, 1, 0, 0, 1, 0), (0.5, 0.5, 0.5, 0.5, 0.9, None)),
    ]
    return learn.Outcomes(tmp_path, {"paper": files, "equal": []})


def test_figures_before_and_after(outcomes):
    assert list(outcomes.after) == ["paper"], "what was not run is not told"
    assert outcomes.figure("second", "reworded").value == 0.25
    assert outcomes.figure("second", "reworded", "paper").value == (0.75 + 0.5) / 2
    assert outcomes.figure("second", "reworded", "paper", 1).value == 0.5
    assert outcomes.figure("second", "words kept back", "paper", 0).value == 0.5
    change = outcomes.change("second", "the words trained on", "paper")
    assert (change.value, change.low, change.high) == (0.5, 0.5, 0.5), "every clip changed alike"
    assert outcomes.change("reward", "familiar: tracking", "paper").value == pytest.approx(-0.55)


def test_separation(outcomes):
    assert outcomes.separation() == 0.5
    assert outcomes.separation("paper") == 1.0


def test_the_table_and_the_numbers_agree(outcomes):
    lines = learn.table(outcomes, "reworded").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| before", "| paper"]
    assert "| 0.625 [0.625, 0.625] | +0.375 [+0.375, +0.375] | 0.750, 0.500 |" in lines[3]
    told = learn.results(outcomes)
    assert told["parts"]["paper"]["reworded"]["second"]["value"] == 0.625
    assert [seed["reworded"]["second"] for seed in told["seeds"]["paper"]] == [0.75, 0.5]
    json.dumps(told)


def test_the_curve(tmp_path):
    pytest.importorskip("matplotlib")
    journals = []
    for seed in range(2):
        file = tmp_path / f"{seed}.jsonl"
        file.write_text(
            "".join(
                json.dumps({"step": n, "second_accuracy": n / 9, "rewards/format/mean": 1.0}) + "\n" for n in range(9)
            )
        )
        journals.append(file)
    learn.draw({"paper": journals, "equal": []}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_trained_on(tmp_path):
    learn.write_data(tmp_path, train_clips=4, held_out_clips=4)
    assert len(load_rows(tmp_path / "train" / "clips.jsonl")) == 8
    bare = load_rows(tmp_path / "train" / "unlabelled.jsonl", labelled=False)
    assert [row.answer for row in bare] == [None] * 8


def test_settings_of_the_variants(tmp_path):
    weights = {
        variant: (
            config.first_weight,
            config.second_weight,
            config.fallback_weight,
            str(config.data.relative_to(tmp_path)),
            config.label_free,
        )
        for variant in learn.VARIANTS
        for config in [learn.settings(tmp_path, tmp_path / "run", variant, 0)]
    }
    assert weights == {
        "paper": (0.9, 1.1, 0.3, "train/clips.jsonl", ()),
        "equal": (1.0, 1.0, 0.0, "train/clips.jsonl", ()),
        "unlabelled": (0.9, 1.1, 0.3, "train/unlabelled.jsonl", ("agreement", "coherence")),
    }
