"""The table that the command line prints, against figures worked by hand."""

from types import SimpleNamespace

from mlxvr.evaluation import console
from mlxvr.evaluation.analysis.compare import compare
from mlxvr.evaluation.analysis.metrics import summarise
from mlxvr.evaluation.samples import Sample


def row(name, first="A", confidence=0.99, **fields):
    costs = {"first_tokens": 5, "total_tokens": 105, "first_seconds": 0.5, "total_seconds": 4.5}
    answers = {"text": "A", "first": first, "second": "A", "confidence": confidence, "answer": "A"}
    return Sample(id=name, kind="exact_match", options=("x", "y"), **{"media": "", **costs, **answers, **fields})


def lines_of(samples, before=None):
    """The printed lines by their titles."""
    report = SimpleNamespace(
        summary=summarise(samples, threshold=0.9, bootstrap=50),
        settings={"model": "m", "data": "d"},
        calibration=None,
        comparison=None if before is None else compare(before, samples, threshold=0.9, bootstrap=50),
        threshold_file=None,
        page="out/report.html",
        output="out",
    )
    return console.table(report).splitlines()


def test_modes_side_by_side():
    """Rows 0 to 7 exit right, 8 exits wrong, 9 reasons and is put right; Wilson: 10 / (10 + 1.96^2) = 0.722."""
    samples = [row(str(n), "A" if n < 8 else "B", 0.99 if n < 9 else 0.1) for n in range(10)]
    lines = lines_of(samples)
    assert lines[:2] == [
        "m on d, threshold 0.9",
        "10 questions about 10 clips; in brackets 95% intervals over clips",
    ]
    table = {line[:20].rstrip(): line[20:] for line in lines}
    assert table["accuracy"].startswith("0.800 [")
    assert "1.000 [0.722, 1.000]" in table["accuracy"]
    assert table["thinks"].split() == ["0.00", "1.00", "0.10"]
    tokens = "5.0 (5.0, 5.0)  105.0 (105.0, 105.0)  15.0 (5.0, 60.0)"
    assert " ".join(table["tokens (p50, p95)"].split()) == " ".join(tokens.split())
    seconds = "0.50 (0.50, 0.50) 4.50 (4.50, 4.50) 0.90 (0.50, 2.70)"
    assert " ".join(table["seconds (p50, p95)"].split()) == seconds
    assert table["gain from thinking"].startswith("+0.200 [+")
    assert table["auto against think"].startswith("-0.100 [-")
    assert table["confidence"].startswith("AUROC 0.750 [")  # the wrong ones: 0.99, which ties with all, and 0.1
    assert table["first answers"] == "0 declined, 0 without a box"
    assert lines[-1] == "written to out/report.html"


def test_one_clip_has_no_interval():
    table = {line[:20].rstrip(): line[20:] for line in lines_of([row("1", media="a"), row("2", media="a")])}
    assert table["accuracy"].split() == ["1.000"] * 3
    assert table["gain from thinking"] == "+0.000"


def test_another_run():
    """One of two rows became right; both exited and still do."""
    before = [row("1", "B"), row("2")]
    lines = lines_of([row("1"), row("2")], before)
    start = lines.index("against the other run: 2 rows in both, thresholds 0.9 -> 0.9")
    assert lines[start + 1].startswith("  direct   0.500 -> 1.000, +0.500 [")
    assert lines[start + 1].endswith("1 became right, 0 wrong")
    assert lines[start + 4] == "  thinks +0.000, tokens +0.0, 0.0% of the decisions flipped"


def test_no_rows():
    assert lines_of([]) == ["m on d, threshold 0.9"]
