"""Figures, worked by hand on a small table and by naive loops on random ones."""

import itertools
import json
import math
import random

import numpy as np
import pytest

from mlxvr.errors import ConfigError, DataError
from mlxvr.evaluation.analysis.bootstrap import Bootstrap, Estimate, clusters_of, wilson
from mlxvr.evaluation.analysis.compare import compare
from mlxvr.evaluation.analysis.metrics import summarise
from mlxvr.evaluation.analysis.reliability import (
    auroc,
    brier,
    expected_calibration_error,
    fit_temperature,
    reliability,
    scale,
)
from mlxvr.evaluation.analysis.run_summary import Distribution
from mlxvr.evaluation.analysis.sweep import sweep
from mlxvr.evaluation.samples import Sample
from tests.decisions import decision

FALLBACK = "Let's analyze the problem step by step."


def row(name, first, second, confidence, *, answer="A", **others):
    defaults = {"kind": "exact_match", "options": ("x", "y"), "media": name, "text": second or first or ""}
    costs = {"first_tokens": 5, "total_tokens": 105, "first_seconds": 0.5, "total_seconds": 4.5}
    return Sample(
        id=name, first=first, second=second, confidence=confidence, answer=answer, **{**defaults, **costs, **others}
    )


#           first second confidence     at 0.9: direct think auto
HAND = [
    row("1", "A", "A", 0.99),  # right right right
    row("2", "A", "B", 0.95, task="count"),  # right wrong right
    row("3", "B", "A", 0.80, task="count", total_tokens=205),  # wrong right right
    row("4", "B", "A", 0.92, task="count", category="hard"),  # wrong right wrong
    row("5", FALLBACK, "A", None, total_tokens=305),  # wrong right right
    row("6", None, None, None, text="B", problems=("no_box", "token_limit")),  # wrong wrong wrong
    row("7", "A", "A", 0.60, problems=("token_limit",)),  # right right right
    row("8", "A", "A", 1.0, error="no such file"),
]


def test_by_hand():
    summary = summarise(HAND, threshold=0.9, bootstrap=200)
    whole = summary.overall
    assert (summary.count, summary.errors, summary.live, whole.count, whole.clips) == (
        8,
        {"8": "no such file"},
        False,
        7,
        7,
    )
    modes = (whole.direct, whole.think, whole.auto)
    assert [mode.accuracy.value for mode in modes] == pytest.approx([3 / 7, 5 / 7, 5 / 7])
    assert [mode.score.value for mode in modes] == [mode.accuracy.value for mode in modes]
    assert [mode.labelled for mode in modes] == [7, 7, 7]
    assert [mode.miou for mode in modes] == [None] * 3
    assert [mode.recall for mode in modes] == [{}] * 3
    assert [mode.pair_accuracy for mode in modes] == [None] * 3
    assert whole.think_ratio.value == pytest.approx(4 / 7)
    assert whole.gain.value == pytest.approx(2 / 7)
    assert whole.auto_vs_think.value == pytest.approx(0, abs=1e-12)
    assert whole.direct.tokens == Distribution(mean=5, p50=5, p90=5, p95=5)
    # reasoned: 205, 305, 105, 105; not: 5, 5, 5
    assert whole.auto.tokens.mean == pytest.approx(735 / 7)
    assert whole.auto.tokens.p50 == 105
    assert whole.auto.tokens.p90 == pytest.approx(245)  # 5.4 of the way from the first to the seventh
    assert whole.auto.seconds.mean == pytest.approx((3 * 0.5 + 4 * 4.5) / 7)
    assert whole.think.tokens.mean == pytest.approx((105 * 5 + 205 + 305) / 7)
    assert (whole.fallbacks, whole.missing_boxes) == (1, 1)
    assert whole.problems == {"no_box": 1, "token_limit": 2}
    # confidences 0.99 0.95 0.80 0.92 0.60 of right right wrong wrong right
    assert whole.confidence.count == 5
    assert whole.confidence.accuracy.value == pytest.approx(3 / 5)
    assert whole.confidence.auroc.value == pytest.approx(4 / 6)
    assert whole.confidence.brier.value == pytest.approx((0.01**2 + 0.05**2 + 0.8**2 + 0.92**2 + 0.4**2) / 5)
    # bins: 0.6 (1, right), 0.8 (1, wrong), 0.9.. (3, two right, mean 0.95333)
    assert whole.confidence.ece == pytest.approx((0.4 + 0.8 + 3 * abs(2 / 3 - 2.86 / 3)) / 5)
    assert [(one.count, one.accuracy) for one in whole.confidence.bins[6:]] == [
        (1, 1.0),
        (0, None),
        (1, 0.0),
        (3, pytest.approx(2 / 3)),
    ]
    assert list(summary.per_task) == ["count"]
    assert list(summary.per_category) == ["hard"]
    count = summary.per_task["count"]
    assert (count.count, count.auto.accuracy.value, count.think.accuracy.value) == (3, pytest.approx(2 / 3), 2 / 3)
    assert summary.per_category["hard"].auto.accuracy == Estimate(value=0.0), "a single clip has no interval"


def test_what_every_mode_pays_is_a_mean_over_rows():
    costs = [
        {"media_seconds": 1.0, "prefill_seconds": 0.5, "prompt_tokens": 100, "video_tokens": 60},
        {"media_seconds": 0.0, "prefill_seconds": 1.5, "prompt_tokens": 300, "video_tokens": 60},
        {"media_seconds": 9.0, "prefill_seconds": 9.0, "prompt_tokens": 999, "video_tokens": 999, "error": "gone"},
    ]
    summary = summarise(
        [row(str(n), "A", "A", 0.99, **cost) for n, cost in enumerate(costs)], threshold=0.9, bootstrap=0
    )
    assert summary.shared == {"media_seconds": 0.5, "prefill_seconds": 1.0, "prompt_tokens": 200, "video_tokens": 60}


@pytest.mark.parametrize(
    ("predicted", "grounded"),
    [
        ("A <> [0, 10]", 1),  # half of it lies in the segment
        ("A <> [0, 10.1]", 0),
        ("A <> [4, 5]", 1),  # all of it, though it is short
        ("A <> [5, 9]", 0),
        ("B <> [0, 5]", 0),  # where, but not what
        ("A", 0),
    ],
)
def test_an_answer_is_grounded_from_half_of_its_interval_on(predicted, grounded):
    """NExT-GQA's Acc@GQA, by hand: intersection over prediction with the segment 0 to 5 s, at least 0.5."""
    sample = row("1", predicted, predicted, 0.99, answer=["A", [[0.0, 5.0]]], kind="gqa")
    assert summarise([sample], threshold=0.9, bootstrap=0).overall.direct.grounded_accuracy.value == grounded


def test_the_summary_is_plain_data():
    plain = summarise(HAND, threshold=0.9, bootstrap=50).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["overall"]["auto"]["accuracy"]["value"] == pytest.approx(5 / 7)


def test_intervals_and_pairs():
    def ground(name, said, answer, kind="iou", **others):
        return row(name, said, said, 0.5, answer=answer, kind=kind, options=("x", "y"), **others)

    samples = [
        ground("1", "[0, 10]", [0, 10], pair="p"),
        ground("2", "[0, 10]", [[5, 15], [40, 50]], pair="q"),  # 1/3
        ground("3", "[0, 10]", [0, 6], pair="p"),  # 0.6
        ground("4", "A <> [0, 10]", "A <> [4, 20]", "gqa", pair="q"),  # right, IoU 0.3, IoP 0.6
        ground("5", "B <> [0, 10]", "A <> [0, 10]", "gqa", pair="r"),  # wrong, IoU 1
        row("6", "A", "B", 0.5, pair="r", task="t"),
        row("7", "A", "A", 0.5, pair="s"),
        row("8", "A", "A", 0.5, pair="s"),
        row("9", "A", "A", 0.5, pair="alone"),
    ]
    whole = summarise(samples, threshold=0.0, bootstrap=100).overall
    assert whole.auto.miou.value == pytest.approx((1 + 1 / 3 + 0.6 + 0.3 + 1) / 5)
    assert {name: figure.value for name, figure in whole.auto.recall.items()} == {
        "0.3": pytest.approx(5 / 5),
        "0.5": pytest.approx(3 / 5),
        "0.7": pytest.approx(2 / 5),
    }
    assert whole.auto.accuracy.value == pytest.approx(5 / 6)
    assert whole.auto.grounded_accuracy.value == pytest.approx(1 / 2)
    assert whole.auto.score.value == pytest.approx((1 + 1 / 3 + 0.6 + (1 + 0.3) / 2 + 0.5 + 4) / 9)
    # pairs: p both from 0.5 on, q neither, r wrong and right, s both; one row is no pair
    assert whole.direct.pair_accuracy.value == pytest.approx(2 / 4)
    assert whole.think.pair_accuracy.value == pytest.approx(2 / 4)
    assert whole.clips == 5


def random_samples(count, seed, **others):
    rng = random.Random(seed)

    def one(number):
        confidence = rng.choice([None, rng.random(), rng.choice([0.5, 0.9, 1.0])])
        said = rng.choice(["A", "B"]) if confidence is not None else rng.choice([None, FALLBACK])
        return Sample(
            id=f"r{number:03}",
            kind="exact_match",
            options=("x", "y"),
            answer=rng.choice(["A", "A", "B", None]),
            media=f"v{rng.randrange(max(1, count // 2))}",
            pair=rng.choice(["", "", f"p{rng.randrange(max(1, count // 4))}"]),
            task=rng.choice(["", "count", "order"]),
            first=said,
            confidence=confidence,
            second=rng.choice(["A", "B", None]),
            text=rng.choice(["A", "B", ""]),
            first_tokens=rng.randrange(1, 9),
            total_tokens=rng.randrange(9, 300),
            first_seconds=rng.random(),
            total_seconds=1 + rng.random(),
            error=rng.choice([None, None, None, None, "broken"]),
            **others,
        )

    return [one(number) for number in range(count)]


@pytest.mark.parametrize("seed", range(8))
def test_against_loops(seed):
    """The same figures counted row by row from the decisions."""
    samples = random_samples(60, seed)
    threshold = random.Random(seed).choice([0.0, 0.5, 0.7, 1.0])
    whole = summarise(samples, threshold=threshold, bootstrap=20).overall
    kept = [sample for sample in samples if sample.error is None]
    decisions = [decision(sample, threshold) for sample in kept]
    scores = [float(made.text == s.answer) for s, made in zip(kept, decisions) if s.answer]
    first = [float(s.first == s.answer) for s in kept if s.answer]
    last = [float((s.second or s.text) == s.answer) for s in kept if s.answer]
    assert whole.auto.accuracy.value == pytest.approx(sum(scores) / len(scores))
    assert whole.direct.accuracy.value == pytest.approx(sum(first) / len(first))
    assert whole.think.accuracy.value == pytest.approx(sum(last) / len(last))
    assert whole.gain.value == pytest.approx((sum(last) - sum(first)) / len(first))
    assert whole.auto_vs_think.value == pytest.approx((sum(scores) - sum(last)) / len(first))
    assert whole.think_ratio.value == pytest.approx(sum(made.reasoned for made in decisions) / len(kept))
    assert whole.auto.tokens.mean == pytest.approx(sum(made.tokens for made in decisions) / len(kept))
    assert whole.auto.tokens.p95 == pytest.approx(np.percentile([made.tokens for made in decisions], 95))
    assert whole.auto.seconds.mean == pytest.approx(sum(made.seconds for made in decisions) / len(kept))
    pairs = {}
    for sample, made in zip(kept, decisions):
        if sample.pair:
            pairs.setdefault(sample.pair, []).append(made.text == sample.answer if sample.answer else None)
    both = [all(rows) for rows in pairs.values() if len(rows) > 1 and None not in rows]
    assert (whole.auto.pair_accuracy.value if both else None) == (
        pytest.approx(sum(both) / len(both)) if both else None
    )
    (swept,) = sweep(samples, [threshold])
    assert (swept.accuracy, swept.score) == pytest.approx((whole.auto.accuracy.value, whole.auto.score.value))
    assert (swept.think_ratio, swept.mean_tokens, swept.mean_seconds) == pytest.approx(
        (whole.think_ratio.value, whole.auto.tokens.mean, whole.auto.seconds.mean)
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_samples_changes_no_digit(seed):
    samples = random_samples(80, seed)
    other = random.Random(seed).sample(samples, len(samples))
    assert summarise(samples, threshold=0.7, bootstrap=50, seed=1) == summarise(
        other, threshold=0.7, bootstrap=50, seed=1
    )
    assert sweep(samples, [0.3, 0.9]) == sweep(other, [0.3, 0.9])
    assert compare(samples, other, threshold=0.7, bootstrap=50) == compare(other, samples, threshold=0.7, bootstrap=50)


def test_other_seeds_give_other_intervals_of_the_same_figures():
    samples = random_samples(80, 0)
    one, other = (summarise(samples, threshold=0.7, seed=seed).overall.auto.accuracy for seed in (0, 1))
    assert one.value == other.value
    assert (one.low, one.high) != (other.low, other.high)
    assert one.low == pytest.approx(other.low, abs=0.05)


def test_unlabelled_rows_cost_but_are_not_graded():
    samples = [row(str(number), "A", "B", number / 10, answer=None) for number in range(10)]
    summary = summarise(samples, threshold=0.5, bootstrap=50)
    assert summary.overall.auto.accuracy is None
    assert summary.overall.gain is None
    assert summary.overall.confidence is None
    assert summary.overall.think_ratio.value == 0.5
    assert sweep(samples, [0.5])[0].score is None
    json.dumps(summary.to_dict(), allow_nan=False)


def test_without_rows():
    assert summarise([], threshold=0.5).overall is None
    assert summarise([HAND[-1]], threshold=0.5).errors == {"8": "no such file"}
    with pytest.raises(ConfigError, match="no sample without an error"):
        sweep([HAND[-1]], [0.5])


def test_duplicate_ids():
    with pytest.raises(DataError, match="two samples have the id '1'"):
        summarise([HAND[0], HAND[0]], threshold=0.5)


def test_a_live_run_has_what_it_did():
    samples = [
        row("1", "A", None, 0.99, reasoned=False, total_tokens=5, total_seconds=0.5),
        row("2", "B", "A", 0.5),
        row("3", "B", None, 0.97, reasoned=False, total_tokens=5, total_seconds=0.5),
    ]
    summary = summarise(samples, threshold=0.9, bootstrap=50)
    whole = summary.overall
    assert (summary.live, whole.think, whole.gain, whole.auto_vs_think) == (True, None, None, None)
    assert whole.auto.accuracy.value == pytest.approx(2 / 3)
    assert whole.direct.accuracy.value == pytest.approx(1 / 3)
    assert whole.auto.tokens.mean == pytest.approx(115 / 3)
    assert whole.think_ratio.value == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match="generate without --live"):
        sweep(samples, [0.5])


def test_rows_of_a_clip_or_a_pair_are_one_cluster():
    """Against the connected components found by spreading until nothing changes."""
    for seed in range(10):
        samples = random_samples(30, seed)
        labels = list(range(30))
        for _ in range(30):
            for i, j in itertools.combinations(range(30), 2):
                one, other = samples[i], samples[j]
                if one.media == other.media or (one.pair and one.pair == other.pair):
                    labels[i] = labels[j] = min(labels[i], labels[j])
        found = clusters_of(samples)
        assert [[a == b for b in labels] for a in labels] == [[a == b for b in found] for a in found]
        assert set(found) == set(range(len(set(labels))))
    assert len(set(clusters_of([Sample(id=name, kind="math") for name in "abc"]))) == 3, "no clip is no common clip"


def test_the_bootstrap_against_a_loop():
    """The same clusters drawn, rows collected and averaged one resample at a time."""
    rng = np.random.default_rng(0)
    clusters = np.array([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])
    values, among = rng.random(10), rng.random(10) < 0.7
    estimate = Bootstrap(clusters, count=300, seed=3).mean(values, among)
    drawn = np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=300)
    means = []
    for counts in drawn:
        rows = [i for cluster, times in enumerate(counts) for i in [*np.flatnonzero(clusters == cluster)] * times]
        chosen = [values[i] for i in rows if among[i]]
        if chosen:
            means.append(sum(chosen) / len(chosen))
    assert estimate.value == pytest.approx(values[among].mean())
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))))


def test_intervals_cover_the_truth():
    """95% intervals of a rate of 0.7 over 80 clips of 3 rows that are right together hold it about as often."""
    rng = np.random.default_rng(0)
    held = {"clips": 0, "rows": 0}
    for _ in range(200):
        values = np.repeat((rng.random(80) < 0.7).astype(float), 3)
        for name, clusters in (("clips", np.repeat(np.arange(80), 3)), ("rows", np.arange(240))):
            estimate = Bootstrap(clusters, count=200, seed=int(rng.integers(1 << 30))).mean(values)
            held[name] += estimate.low <= 0.7 <= estimate.high
    assert 0.90 <= held["clips"] / 200 <= 0.98
    assert held["rows"] / 200 < 0.85, "rows of a clip are not independent"


def test_wilson_against_its_equation():
    for successes, count in ((0, 3), (3, 3), (7, 20), (1, 1)):
        for end in wilson(successes, count):  # an end p solves (share - p)^2 = z^2 p (1 - p) / n
            gap = (successes / count - end) ** 2 - 1.959964**2 * end * (1 - end) / count
            assert gap == pytest.approx(0, abs=1e-9) or end in (0, 1)
    assert wilson(7, 20) == pytest.approx((0.1812, 0.5671), abs=1e-4)  # R: prop.test(7, 20, correct = FALSE)


def test_an_interval_of_a_share_has_a_width_or_is_none():
    """Of nine clips with two rows each, all the same: n / (n + 1.96^2) = 0.701 for nine, whatever the rows."""
    resamples = Bootstrap(np.repeat(np.arange(9), 2), count=100, seed=0)
    ones = np.ones(18)
    end = 9 / (9 + 1.959964**2)
    assert vars(resamples.share(ones)) == pytest.approx({"value": 1.0, "low": end, "high": 1.0})
    assert vars(resamples.share(0 * ones)) == pytest.approx({"value": 0.0, "low": 0.0, "high": 1 - end})
    few = resamples.share(ones, np.arange(18) < 6)
    assert few.low == pytest.approx(3 / (3 + 1.959964**2)), "three clips hold these rows"
    assert resamples.share(0.5 * ones) == Estimate(value=0.5), "all the same, but neither none nor all"
    assert resamples.mean(0 * ones) == Estimate(value=0.0, low=0.0, high=0.0), "a difference of 0 everywhere"
    mixed = np.arange(18) % 4 / 3
    assert resamples.share(mixed) == resamples.mean(mixed)
    assert Bootstrap(np.zeros(4, dtype=int), count=100, seed=0).share(np.ones(4)) == Estimate(value=1.0), "one clip"
    assert resamples.share(ones, np.zeros(18, dtype=bool)) is None


def test_reliability_against_a_loop():
    rng = np.random.default_rng(1)
    confidence = np.concatenate([rng.random(200), [0.0, 0.1, 0.3, 1.0, 1.0]])
    right = rng.random(205) < confidence
    bins = reliability(confidence, right)
    assert sum(one.count for one in bins) == 205
    gap = 0.0
    for index, one in enumerate(bins):
        inside = [i for i, c in enumerate(confidence) if int(min(c * 10, 9)) == index]
        assert (one.low, one.high, one.count) == (index / 10, (index + 1) / 10, len(inside))
        assert one.accuracy == pytest.approx(sum(right[i] for i in inside) / len(inside))
        gap += abs(sum(right[i] - confidence[i] for i in inside))
    assert expected_calibration_error(bins) == pytest.approx(gap / 205)
    assert expected_calibration_error(reliability(np.array([]), np.array([], dtype=bool))) is None


def test_auroc_against_all_pairs():
    rng = np.random.default_rng(2)
    for _ in range(20):
        confidence = rng.choice([0.1, 0.5, 0.7, 0.9, 1.0], 30)
        right = rng.random(30) < 0.6
        weights = rng.integers(0, 3, (4, 30)).astype(float)
        for got, weight in zip(
            [*auroc(confidence, right), *auroc(confidence, right, weights)], [np.ones(30), *weights]
        ):
            pairs = [
                (
                    weight[i] * weight[j],
                    1.0 if confidence[i] > confidence[j] else 0.5 * (confidence[i] == confidence[j]),
                )
                for i in range(30)
                for j in range(30)
                if right[i] and not right[j]
            ]
            assert got == pytest.approx(sum(w * wins for w, wins in pairs) / sum(w for w, _ in pairs))
    assert math.isnan(auroc(np.array([0.5, 0.6]), np.array([True, True]))[0])
    assert math.isnan(auroc(np.array([]), np.array([], dtype=bool))[0])


def test_brier():
    assert list(brier(np.array([0.8, 0.3]), np.array([True, False]))) == pytest.approx([0.04, 0.09])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_a_temperature_is_found_again(temperature):
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.05, 0.999, 6000)
    right = rng.random(6000) < truth
    sure = scale(truth, 1 / temperature)
    fitted = fit_temperature(sure, right)
    assert fitted == pytest.approx(temperature, rel=0.08)
    calibrated = scale(sure, fitted)
    before, after = (expected_calibration_error(reliability(values, right)) for values in (sure, calibrated))
    assert after < 0.02
    assert temperature == 1.0 or after < before

    def loss(value):
        with np.errstate(divide="ignore"):
            p = scale(sure, value)
            return -np.mean(np.where(right, np.log(p), np.log1p(-p)))

    assert loss(fitted) <= min(loss(fitted * factor) for factor in (0.9, 0.99, 1.01, 1.1)), "the least log-loss"
    assert auroc(calibrated, right) == pytest.approx(auroc(sure, right))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_scaling_changes_no_decision(temperature):
    """At the threshold that is mapped as the confidences are."""
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.random(500), [0.0, 0.5, 1.0]])
    for threshold in [0.0, 0.5, 1.0, *rng.random(50), *confidence[:50]]:
        mapped = scale(np.array([threshold]), temperature)[0]
        assert ((scale(confidence, temperature) >= mapped) == (confidence >= threshold)).all()
    assert list(scale(np.array([0.0, 0.5, 1.0]), temperature)) == [0.0, 0.5, 1.0]


def test_a_temperature_needs_right_and_wrong():
    with pytest.raises(DataError, match="needs right and wrong first answers"):
        fit_temperature(np.array([0.5, 0.9]), np.array([True, True]))
    assert fit_temperature(np.array([1.0, 1.0, 0.0]), np.array([True, False, False])) <= 100


def test_compare_by_hand():
    first = [*HAND[:7], row("old", "A", "A", 0.5), HAND[7]]
    second = [
        row("1", "B", "A", 0.95),  # direct became wrong, exits
        row("2", "A", "A", 0.85, task="count"),  # reasons now; think became right
        row("3", "A", "A", 0.95, task="count"),  # exits now; direct became right
        row("4", "B", "A", 0.5, task="count"),  # reasons now; auto became right
        row("5", FALLBACK, "B", None, total_tokens=305),  # think became wrong
        row("6", None, None, None, text="B"),
        row("7", "A", "A", 0.60, error="broken"),
        row("8", "A", "A", 1.0),
        row("new", "A", "A", 1.0),
    ]
    found = compare(first, second, threshold=0.9, bootstrap=100)
    assert (found.count, found.clips, found.thresholds) == (6, 6, (0.9, 0.9))
    assert (found.only_first, found.only_second) == (("7", "old"), ("8", "new"))
    assert (found.direct.became_right, found.direct.became_wrong) == (("3",), ("1",))
    assert (found.think.became_right, found.think.became_wrong) == (("2",), ("5",))
    assert (found.auto.became_right, found.auto.became_wrong) == (("4",), ("1", "5"))
    assert (found.auto.first.value, found.auto.second.value) == pytest.approx((4 / 6, 3 / 6))
    assert found.auto.difference.value == pytest.approx(-1 / 6)
    assert (found.began_to_think, found.stopped_thinking) == (("2", "4"), ("3",))
    assert found.flipped == pytest.approx(3 / 6)
    assert found.think_ratio.value == pytest.approx(1 / 6)
    assert found.tokens.value == pytest.approx((100 + 100 - 200) / 6)
    assert found.confidence_drift.value == pytest.approx((0.04 + 0.10 + 0.15 + 0.42) / 4)
    assert found.answers_changed == 2
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["flipped"] == 0.5


def test_a_run_compared_with_itself():
    samples = random_samples(60, 0)
    found = compare(samples, samples, threshold=0.7)
    assert found.auto.difference == Estimate(value=0.0, low=0.0, high=0.0)
    assert (found.flipped, found.answers_changed, found.confidence_drift.value) == (0, 0, 0)
    other = compare(samples, samples, threshold=0.7, second_threshold=0.0)
    assert other.stopped_thinking
    assert not other.began_to_think


def test_pairing_narrows_the_interval():
    """Two runs that agree on most rows differ by less than two runs over other rows would."""
    rng = random.Random(0)
    first = [row(f"{n:03}", rng.choice("AB"), "A", 0.5) for n in range(200)]
    second = [row(s.id, rng.choice([s.first] * 19 + ["A"]), "A", 0.5) for s in first]
    found = compare(first, second, threshold=0.0).auto.difference
    alone = summarise(first, threshold=0.0).overall.auto.accuracy
    assert found.high - found.low < (alone.high - alone.low) / 2


def test_runs_over_other_data_are_not_compared():
    with pytest.raises(DataError, match="no row in common"):
        compare(HAND[:1], HAND[1:2], threshold=0.5)
    with pytest.raises(DataError, match="row '1' is another question"):
        compare(HAND[:1], [row("1", "A", "A", 0.5, answer="B")], threshold=0.5)
    live = [row("1", "A", None, 0.99, reasoned=False)]
    assert compare(HAND[:2], live, threshold=0.9).think is None
