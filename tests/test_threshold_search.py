"""Thresholds against exhaustive search, held-out figures against loops, and the file that they are written into."""

import errno
import json
import math
import os
import random
from itertools import pairwise

import numpy as np
import pytest

from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.convert import convert
from mlxvr.errors import CheckpointError, ConfigError, DataError
from mlxvr.evaluation import threshold_file
from mlxvr.evaluation.analysis.reliability import fit_temperature, scale
from mlxvr.evaluation.analysis.threshold_search import CalibrationPlan, calibrate
from mlxvr.evaluation.samples import Sample
from mlxvr.evaluation.threshold_file import save_threshold, write_threshold
from tests.decisions import decision


def make(count, seed=0, *, labelled=True, skill=1.0, think=0.8, per_clip=1, levels=None, task=lambda number: ""):
    """Rows whose first answers are right with probability confidence ** skill, and the others with `think`."""
    rng = random.Random(seed)
    samples = []
    for number in range(count):
        confidence = rng.choice(levels) if levels else rng.uniform(0.3, 1)
        if rng.random() < 0.1:
            confidence = None
        right = confidence is not None and rng.random() < confidence**skill
        samples.append(
            Sample(
                id=f"r{number:04}",
                kind="exact_match",
                options=("x", "y"),
                answer="A" if labelled else None,
                media=f"v{number // per_clip}",
                task=task(number),
                first=None if confidence is None else "A" if right else "B",
                confidence=confidence,
                second="A" if rng.random() < think else "B",
                first_tokens=rng.randrange(4, 9),
                total_tokens=rng.randrange(50, 200),
            )
        )
    return samples


def figures_at(samples, threshold):
    """Think ratio, mean tokens and accuracy at a threshold, counted row by row."""
    made = [decision(sample, threshold) for sample in samples]
    return (
        sum(one.reasoned for one in made) / len(made),
        sum(one.tokens for one in made) / len(made),
        sum(one.text == sample.answer for one, sample in zip(made, samples)) / len(made),
    )


def every_threshold(samples):
    """One between each two confidences, one below and one above all."""
    levels = sorted({sample.confidence for sample in samples if sample.confidence is not None})
    return [0.0, *[(a + b) / 2 for a, b in pairwise(levels)], 1.0 if levels[-1] < 1 else 1.0000001]


def same_decisions(samples, one, other):
    return [decision(sample, one).reasoned for sample in samples] == [decision(s, other).reasoned for s in samples]


LEVELS = [None, [0.5, 0.9, 0.97, 1.0], [0.0, 0.3, 0.9999999, 1.0]]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("budget", [0.15, 0.4, 0.8, 1.0])
def test_the_ratio_goal_thinks_as_much_as_it_may(levels, budget):
    samples = make(120, 1, labelled=False, levels=levels)
    found = calibrate(samples, CalibrationPlan("ratio", budget=budget, bootstrap=0))
    ratio = figures_at(samples, found.threshold)[0]
    allowed = [
        value
        for value in (figures_at(samples, threshold)[0] for threshold in every_threshold(samples))
        if value <= budget
    ]
    assert ratio == max(allowed) == pytest.approx(found.in_sample.think_ratio.value)
    assert found.in_sample.auto is None
    assert (found.goal, found.budget, found.margin) == ("ratio", budget, None)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("budget", [25, 60, 100, 1000])
def test_the_tokens_goal_spends_as_much_as_it_may(levels, budget):
    samples = make(120, 2, labelled=False, levels=levels)
    found = calibrate(samples, CalibrationPlan("tokens", budget=budget, bootstrap=0))
    tokens = figures_at(samples, found.threshold)[1]
    allowed = [
        value
        for value in (figures_at(samples, threshold)[1] for threshold in every_threshold(samples))
        if value <= budget
    ]
    assert tokens == max(allowed) == pytest.approx(found.in_sample.tokens.value)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("seed", range(4))
def test_the_accuracy_goal_finds_the_best_that_thinks_least(levels, seed):
    samples = make(90, seed, levels=levels)
    found = calibrate(samples, CalibrationPlan("accuracy", bootstrap=0))
    tried = [
        (figures_at(samples, threshold)[2], -figures_at(samples, threshold)[0], threshold)
        for threshold in every_threshold(samples)
    ]
    assert same_decisions(samples, found.threshold, max(tried)[2])


@pytest.mark.parametrize(("seed", "margin"), [(0, 0.02), (1, 0.05), (2, 0.1), (3, 0.0), (4, 1.0)])
def test_the_no_loss_goal_walks_down_to_the_first_failure(seed, margin):
    """With the interval of each threshold from a loop over resamples of clips."""
    samples = [Sample(**{**vars(s), "media": f"v{math.isqrt(n)}"}) for n, s in enumerate(make(100, seed, skill=0.5))]
    found = calibrate(samples, CalibrationPlan("no_loss", margin=margin, bootstrap=200, seed=5))
    drawn = np.random.default_rng(5).multinomial(10, np.full(10, 1 / 10), size=200)
    best = None
    for threshold in reversed(every_threshold(samples)):
        differences = [
            float(decision(sample, threshold).text == "A") - float(sample.second == "A") for sample in samples
        ]
        means = []
        for counts in drawn:
            rows = [n for clip, times in enumerate(counts) for n in [*range(clip**2, (clip + 1) ** 2)] * times]
            means.append(sum(differences[n] for n in rows) / len(rows))
        if np.percentile(means, 2.5) < -margin - 1e-12:
            break
        best = threshold
    assert best is not None
    assert same_decisions(samples, found.threshold, best)
    assert found.in_sample.difference.low >= -margin - 1e-12
    assert found.margin == margin


def test_no_loss_exits_where_it_costs_nothing():
    sure = [Sample(**{**vars(s), "first": "A", "second": "A"}) for s in make(80) if s.confidence is not None]
    assert calibrate(sure, CalibrationPlan("no_loss", margin=0.0)).threshold == 0.0


def test_no_loss_always_thinks_where_nothing_else_is_safe():
    bad = [Sample(**{**vars(s), "first": "B", "second": "A"}) for s in make(80) if s.confidence is not None]
    found = calibrate(bad, CalibrationPlan("no_loss", margin=0.001))
    assert found.in_sample.think_ratio.value == 1
    assert found.threshold == 1.0
    bad[0] = Sample(**{**vars(bad[0]), "confidence": 1.0})
    assert calibrate(bad, CalibrationPlan("no_loss", margin=0.001)).threshold == math.nextafter(1.0, 2.0)


def test_no_loss_keeps_its_promise():
    """On fresh rows of the same kind the loss is within the margin, for nearly all sets that chose a threshold."""
    fresh = make(5000, 99)
    always = figures_at(fresh, 2.0)[2]
    kept = 0
    for seed in range(20):
        threshold = calibrate(
            make(300, seed), CalibrationPlan("no_loss", margin=0.05, bootstrap=200, folds=2)
        ).threshold
        kept += figures_at(fresh, threshold)[2] - always > -0.05
    assert kept >= 19


def test_a_loss_that_few_clips_cannot_rule_out_is_told():
    """The rule of three, exactly: 368 clips without a loss bound it by 1%, 40 by 8.8% (tables of Clopper-Pearson)."""
    few = calibrate(make(40), CalibrationPlan("no_loss"))
    assert few.caution == (
        f"{few.in_sample.clips} clips without a loss cannot rule out a loss of 0.088, more than 0.01: "
        "it takes 368 clips to rule out more than that"
    )
    assert few.in_sample.clips == 40
    assert few.to_dict()["caution"] == few.caution
    assert calibrate(make(40), CalibrationPlan("no_loss", margin=0.09)).caution == ""
    assert calibrate(make(367), CalibrationPlan("no_loss", bootstrap=100)).caution != ""
    assert calibrate(make(368), CalibrationPlan("no_loss", bootstrap=100)).caution == ""
    assert "it takes" not in calibrate(make(40), CalibrationPlan("no_loss", margin=0.0)).caution
    assert calibrate(make(40), CalibrationPlan("accuracy")).caution == ""


def test_held_out_figures_against_a_loop():
    """Each fold by the threshold of the others; a clip is never divided; all rows are held out once."""
    samples = make(150, 3, per_clip=3)
    found = calibrate(samples, CalibrationPlan("accuracy", folds=5, bootstrap=100, seed=7))
    dealt = [0] * 50
    for place, clip in enumerate(np.random.default_rng(7).permutation(50)):
        dealt[clip] = place % 5
    folds = [dealt[number // 3] for number in range(150)]
    made = []
    for fold in range(5):
        training = [sample for sample, own in zip(samples, folds) if own != fold]
        tried = [
            (figures_at(training, threshold)[2], -figures_at(training, threshold)[0], threshold)
            for threshold in every_threshold(training)
        ]
        assert same_decisions(training, found.fold_thresholds[fold], max(tried)[2])
        test = [sample for sample, own in zip(samples, folds) if own == fold]
        assert len(test) == 30
        made += [(sample, decision(sample, found.fold_thresholds[fold])) for sample in test]
    outcome = found.held_out
    assert (outcome.count, outcome.clips) == (150, 50)
    assert outcome.auto.value == pytest.approx(sum(one.text == "A" for _, one in made) / 150)
    assert outcome.think.value == pytest.approx(sum(sample.second == "A" for sample in samples) / 150)
    assert outcome.direct.value == pytest.approx(sum(sample.first == "A" for sample in samples) / 150)
    assert outcome.difference.value == pytest.approx(outcome.auto.value - outcome.think.value)
    assert outcome.think_ratio.value == pytest.approx(sum(one.reasoned for _, one in made) / 150)
    assert outcome.tokens.value == pytest.approx(sum(one.tokens for _, one in made) / 150)
    assert outcome.always_tokens == pytest.approx(sum(sample.total_tokens for sample in samples) / 150)
    assert outcome.difference.low < outcome.difference.value < outcome.difference.high


def test_a_fold_chooses_as_if_its_rows_were_all():
    samples = make(120, 4, per_clip=2)
    found = calibrate(samples, CalibrationPlan("no_loss", margin=0.1, folds=4, bootstrap=200, seed=1))
    dealt = dict(zip(np.random.default_rng(1).permutation(60), [0, 1, 2, 3] * 15))
    for fold in range(4):
        training = [sample for number, sample in enumerate(samples) if dealt[number // 2] != fold]
        alone = calibrate(training, CalibrationPlan("no_loss", margin=0.1, folds=4, bootstrap=200, seed=1))
        assert found.fold_thresholds[fold] == alone.threshold
    assert len({*found.fold_thresholds}) > 1


def test_held_out_figures_do_not_flatter():
    """Where the confidence says nothing, the best threshold of a sample is luck, and only there."""
    gaps, flattered = [], []
    for seed in range(12):
        samples = make(60, seed, skill=0.0001, think=1.0, levels=None)
        noise = random.Random(seed)
        samples = [
            Sample(**{**vars(s), "first": noise.choice("AB"), "second": noise.choice("AB")})
            for s in samples
            if s.confidence is not None
        ]
        found = calibrate(samples, CalibrationPlan("accuracy", bootstrap=0))
        flattered.append(found.in_sample.auto.value)
        gaps.append(found.held_out.auto.value)
    assert np.mean(flattered) > 0.55
    assert abs(np.mean(gaps) - 0.5) < 0.05


@pytest.mark.parametrize("goal", ["no_loss", "accuracy"])
def test_the_order_of_samples_changes_nothing(goal):
    samples = make(100, 4, per_clip=2, task=lambda n: "ab"[n % 2])
    shuffled = random.Random(0).sample(samples, len(samples))
    options = {"bootstrap": 100, "per_task": True, "least_per_task": 30, "temperature": True, "seed": 2}
    assert calibrate(samples, CalibrationPlan(goal, **options)) == calibrate(shuffled, CalibrationPlan(goal, **options))
    assert (
        calibrate(samples, CalibrationPlan(goal, **options | {"seed": 3})).fold_thresholds
        != calibrate(samples, CalibrationPlan(goal, **options)).fold_thresholds
    )


def test_rows_without_a_label_or_with_an_error_are_left_out():
    samples = make(60, 5)
    more = [
        *samples,
        Sample(id="x", kind="math", error="broken"),
        Sample(id="y", kind="math", confidence=0.01, first="1"),
    ]
    assert calibrate(more, CalibrationPlan("accuracy", bootstrap=50)) == calibrate(
        samples, CalibrationPlan("accuracy", bootstrap=50)
    )
    assert calibrate(more, CalibrationPlan("ratio", budget=0.5, bootstrap=50)).in_sample.count == 61


def test_tasks_have_their_own():
    """A task whose first answers are always right, one where they never are, and one of few rows."""
    samples = []
    for sample in make(250, 6, task=lambda n: "easy" if n < 100 else "hard" if n < 200 else "few"):
        first = {"easy": "A", "hard": "B", "few": "A"}[sample.task]
        if sample.confidence is not None:
            samples.append(Sample(**{**vars(sample), "first": first, "second": "A"}))
    found = calibrate(samples, CalibrationPlan("no_loss", per_task=True, least_per_task=50, bootstrap=200))
    assert list(found.per_task) == ["easy", "few", "hard"]
    assert found.per_task["easy"].threshold == 0.0
    assert found.per_task["easy"].held_out.think_ratio.value == 0
    assert found.per_task["hard"].threshold == 1.0
    assert found.per_task["hard"].held_out.difference.value == 0
    assert (found.per_task["few"].threshold, found.per_task["few"].held_out) == (found.threshold, None)
    assert found.per_task["few"].count == sum(sample.task == "few" for sample in samples)
    assert calibrate(samples, CalibrationPlan("no_loss", bootstrap=100)).per_task == {}


def test_temperature_scaling_is_reported_beside_the_raw():
    samples = make(600, 7, skill=3.0)
    plain = calibrate(samples, CalibrationPlan("accuracy", bootstrap=50))
    found = calibrate(samples, CalibrationPlan("accuracy", bootstrap=50, temperature=True))
    assert plain.temperature is None
    assert found.threshold == plain.threshold
    assert found.held_out == plain.held_out
    fit = found.temperature
    assert fit.count == sum(sample.confidence is not None for sample in samples)
    assert fit.temperature > 1, "right less often than they are sure"
    rows = [(s.confidence, s.first == "A", n) for n, s in enumerate(samples) if s.confidence is not None]
    dealt = dict(zip(np.random.default_rng(0).permutation(600), [0, 1, 2, 3, 4] * 120))
    squares = 0.0
    for fold in range(5):
        training = np.array([(c, right) for c, right, n in rows if dealt[n] != fold])
        temperature = fit_temperature(training[:, 0], training[:, 1] == 1)
        test = [(c, right) for c, right, n in rows if dealt[n] == fold]
        squares += sum((scale(np.array([c]), temperature)[0] - right) ** 2 for c, right in test)
    assert fit.brier_scaled == pytest.approx(squares / len(rows), rel=1e-9), "each by the others' temperature"
    assert fit.ece_scaled < fit.ece
    assert fit.brier_scaled < fit.brier
    with pytest.raises(DataError, match="leave it out"):
        calibrate(
            [Sample(**{**vars(s), "first": "A"}) for s in samples],
            CalibrationPlan("accuracy", bootstrap=0, temperature=True),
        )


@pytest.mark.parametrize(
    ("goal", "options", "message"),
    [
        ("best", {}, "goal 'best' is unknown: use one of no_loss, ratio, tokens, accuracy"),
        ("ratio", {}, "goal ratio needs a budget"),
        ("accuracy", {"budget": 0.5}, "goal accuracy takes no budget"),
        ("ratio", {"budget": 1.5}, "budget 1.5 cannot be used"),
        ("tokens", {"budget": -1}, "budget -1 cannot be used"),
        ("tokens", {"budget": math.nan}, "budget nan cannot be used"),
        ("no_loss", {"margin": -0.1}, "margin -0.1 is outside"),
        ("no_loss", {"bootstrap": 10}, "bootstrap 10 is too few"),
        ("accuracy", {"folds": 1}, "folds 1 holds no rows out"),
        ("ratio", {"budget": 0.0}, r"budget 0 cannot be met: .* so a ratio of 0\.\d+ is the least"),
        ("tokens", {"budget": 3}, r"budget 3 cannot be met: .* so \d+\.\d tokens is the least"),
    ],
)
def test_arguments_that_cannot_be_used(goal, options, message):
    with pytest.raises(ConfigError, match=message):
        calibrate(make(60), CalibrationPlan(goal, **options))


def test_too_little_to_calibrate_on():
    with pytest.raises(DataError, match="too few rows to choose a threshold: 19 rows"):
        calibrate(make(19), CalibrationPlan("accuracy"))
    with pytest.raises(DataError, match="too few rows to choose a threshold: 0 rows"):
        calibrate([], CalibrationPlan("accuracy"))
    with pytest.raises(DataError, match="too few clips for 5 folds: 4 independent clips"):
        calibrate(make(40, per_clip=10), CalibrationPlan("accuracy"))
    with pytest.raises(DataError, match="needs rows with an answer, and none has one"):
        calibrate(make(40, labelled=False), CalibrationPlan("no_loss"))
    live = [*make(40), Sample(id="live", kind="math", answer="1", first="1", confidence=0.99, reasoned=False)]
    with pytest.raises(ConfigError, match="generate without --live"):
        calibrate(live, CalibrationPlan("ratio", budget=0.5))


def test_without_any_confidence():
    samples = [Sample(**{**vars(s), "confidence": None, "first": None}) for s in make(40)]
    found = calibrate(samples, CalibrationPlan("accuracy", bootstrap=0))
    assert (found.threshold, found.in_sample.think_ratio.value) == (1.0, 1.0)


def model_folder(path, settings):
    path.mkdir()
    (path / "config.json").write_text("{}")
    if settings is not None:
        (path / "mlxvr.json").write_text(json.dumps(settings))
    return path


def test_writing_the_threshold(tmp_path):
    folder = model_folder(tmp_path / "model", {"source": "demo", "threshold": 0.97, "family": "qwen3_vl"})
    first = calibrate(
        make(100, 8, task=lambda n: "ab"[n % 2]), CalibrationPlan("accuracy", per_task=True, least_per_task=30)
    )
    assert write_threshold(folder, first) == folder / "mlxvr.json"
    written = json.loads((folder / "mlxvr.json").read_text())
    assert written["threshold"] == first.threshold
    assert (written["source"], written["family"]) == ("demo", "qwen3_vl")
    assert written["previous_thresholds"] == [{"threshold": 0.97}]
    assert written["task_thresholds"] == {name: task.threshold for name, task in first.per_task.items()}
    assert written["calibration"]["goal"] == "accuracy"
    assert written["calibration"]["held_out"]["auto"]["value"] == first.held_out.auto.value

    write_threshold(folder, first)
    assert json.loads((folder / "mlxvr.json").read_text()) == written, "the same once more changes nothing"

    second = calibrate(make(100, 9), CalibrationPlan("ratio", budget=0.3))
    write_threshold(folder, second)
    again = json.loads((folder / "mlxvr.json").read_text())
    assert again["threshold"] == second.threshold
    assert "task_thresholds" not in again
    assert again["previous_thresholds"] == [
        {"threshold": 0.97},
        {key: written[key] for key in ("threshold", "calibration", "task_thresholds")},
    ]
    assert sorted(os.listdir(folder)) == ["config.json", "mlxvr.json"]


def test_the_card_of_a_converted_folder_names_the_new_threshold(tmp_path):
    folder = tmp_path / "model"
    convert(demo_folder() / "checkpoint", folder)
    before = (folder / "README.md").read_text(encoding="utf-8")
    found = calibrate(make(100, 8), CalibrationPlan("accuracy"))
    write_threshold(folder, found)
    after = (folder / "README.md").read_text(encoding="utf-8")
    assert "confidence of 0.97 |" in before
    assert after == before.replace("confidence of 0.97 |", f"confidence of {found.threshold} |")
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_a_card_of_another_make_stays_as_it_is(tmp_path):
    folder = model_folder(tmp_path / "model", None)
    (folder / "README.md").write_text("# Mine\n\nThreshold: high\n")
    write_threshold(folder, calibrate(make(60), CalibrationPlan("accuracy")))
    assert (folder / "README.md").read_text() == "# Mine\n\nThreshold: high\n"


def test_a_folder_without_settings_gets_some(tmp_path):
    folder = model_folder(tmp_path / "model", None)
    found = calibrate(make(60), CalibrationPlan("accuracy"))
    write_threshold(str(folder), found)
    written = json.loads((folder / "mlxvr.json").read_text())
    assert sorted(written) == ["calibration", "threshold"]


def test_a_threshold_in_a_file_of_its_own(tmp_path):
    first, second = (
        calibrate(make(60), CalibrationPlan("accuracy")),
        calibrate(make(100, 9), CalibrationPlan("ratio", budget=0.3)),
    )
    path = save_threshold(tmp_path / "thresholds" / "mine.json", first)
    assert path == tmp_path / "thresholds" / "mine.json"
    assert json.loads(path.read_text())["threshold"] == first.threshold
    save_threshold(path, second)
    written = json.loads(path.read_text())
    assert (written["threshold"], written["calibration"]["goal"]) == (second.threshold, "ratio")
    assert [old["threshold"] for old in written["previous_thresholds"]] == [first.threshold]
    assert os.listdir(path.parent) == ["mine.json"]


def test_a_full_disk_is_told_as_such(tmp_path, monkeypatch):
    path = save_threshold(tmp_path / "mine.json", calibrate(make(60), CalibrationPlan("accuracy")))
    before = path.read_text()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(threshold_file.os, "fsync", fail)
    with pytest.raises(ConfigError, match=r"^the disk of .*mine\.json is full; free some space and run again$"):
        save_threshold(path, calibrate(make(100, 9), CalibrationPlan("ratio", budget=0.3)))
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["mine.json"]


def test_a_write_that_fails_leaves_the_old(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "model", {"threshold": 0.97})

    def fail(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(threshold_file.os, "replace", fail)
    with pytest.raises(ConfigError, match=r"mlxvr\.json cannot be written \(Read-only file system\)"):
        write_threshold(folder, calibrate(make(60), CalibrationPlan("accuracy")))
    assert json.loads((folder / "mlxvr.json").read_text()) == {"threshold": 0.97}
    assert sorted(os.listdir(folder)) == ["config.json", "mlxvr.json"]


def test_what_is_not_written(tmp_path):
    found = calibrate(make(60), CalibrationPlan("accuracy"))
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        write_threshold(tmp_path, found)
    folder = model_folder(tmp_path / "model", None)
    for content in ("{", "[]", '{"previous_thresholds": 1}'):
        (folder / "mlxvr.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"mlxvr\.json .*correct or remove it"):
            write_threshold(folder, found)
        assert (folder / "mlxvr.json").read_text() == content
    bad = [Sample(**{**vars(s), "confidence": 1.0, "first": "B", "second": "A"}) for s in make(80)]
    with pytest.raises(ConfigError, match="ask with mode think"):
        write_threshold(folder, calibrate(bad, CalibrationPlan("no_loss")))


def test_the_calibration_is_plain_data():
    found = calibrate(
        make(100, task=lambda n: "a"), CalibrationPlan("no_loss", per_task=True, temperature=True)
    ).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
