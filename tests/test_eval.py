"""The eval verb: flags from the configuration, tables and JSON, calibration and comparison, one line for a mistake.

Where only figures matter, the samples of a run are written by hand, and the verb finds nothing left to generate.
"""

import dataclasses
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlxvr
from mlxvr import eval as verb
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.data.rows import load_rows, make_row
from mlxvr.errors import ConfigError
from mlxvr.evaluation import generation, runner
from mlxvr.evaluation.eval_config import EvalConfig
from mlxvr.evaluation.generation import digest
from mlxvr.evaluation.report import plots
from mlxvr.evaluation.runner import read_questions
from mlxvr.evaluation.samples import Sample, read_samples, write_samples
from mlxvr.grading import math_equality
from mlxvr.model.families.base import family_of

ROWS = 40


@pytest.fixture(scope="module", autouse=True)
def no_plots():
    """They take seconds, and are the report's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "have_matplotlib", lambda: False)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A copy of the bundled checkpoint, which may be written to."""
    return shutil.copytree(demo_folder() / "checkpoint", tmp_path_factory.mktemp("model") / "demo")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "made.jsonl"
    rows = [
        {"id": f"r{n}", "video": f"{n}.mp4", "question": f"Number {n}?", "options": ["x", "y"], "answer": "A"}
        | {"task": "even" if n % 2 == 0 else "odd"}
        for n in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def header(model):
    """What the runs below begin with."""
    with mlxvr.load(model) as loaded:
        return runner._run(EvalConfig(model=model, data=Path("made.jsonl"), output=Path("run")), loaded)


def made(data, output, header, *, sure, right=lambda n: True):
    """A finished run: rows below `sure` are sure and right at once, the others guess wrong; thinking is `right`."""
    samples = [
        Sample(
            id=row.id,
            kind=row.kind,
            question=row.question,
            options=row.options,
            answer=row.answer,
            media=row.media,
            first="A" if n < sure else "B",
            confidence=0.9 + n / 1000 if n < sure else 0.4 + n / 1000,
            second="A" if right(n) else "B",
            text="A" if right(n) else "B",
            first_tokens=5,
            total_tokens=105,
            asked=digest(row),
        )
        for n, row in enumerate(load_rows(data))
    ]
    output.mkdir()
    write_samples(output / "samples.jsonl", header, samples)
    return output


def call(capfd, *arguments):
    """Exit code, stdout, stderr."""
    capfd.readouterr()
    code = verb.main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return code, out, err


def test_every_field_is_a_flag_with_its_default():
    flags = vars(verb.make_parser().parse_args(["--output", "o"]))
    for name in ("debug", "json"):
        assert flags.pop(name) is False
    expected = EvalConfig(output=Path("o"))
    assert flags == {field.name: getattr(expected, field.name) for field in dataclasses.fields(EvalConfig)}
    arguments = ["--kv-bits", "4", "--fps", "1.5", "--live", "--data", "a.jsonl", "--model", "m", "--retry-errors"]
    told = vars(verb.make_parser().parse_args(["--output", "o", *arguments]))
    assert (told["kv_bits"], told["fps"], told["live"], told["data"]) == (4, 1.5, True, Path("a.jsonl"))
    assert (told["model"], told["retry_errors"]) == ("m", True)


def test_a_real_row_from_the_command_line(capfd, tmp_path):
    code, out, err = call(capfd, "--output", tmp_path / "run", "--limit", 1, "--dtype", "float32", "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    found = json.loads(out)
    assert (found["generated"], found["summary"]["count"]) == (1, 1)
    assert found["summary"]["threshold"] == found["settings"]["threshold"] == 0.97
    [sample] = read_samples(found["samples"])
    assert (sample.id, sample.first, sample.answer) == ("clip00-0", "B", "B")
    assert sample.reasoning
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"report.html", "report.json", "samples.jsonl"}
    assert json.loads((tmp_path / "run" / "report.json").read_text())["summary"] == found["summary"]
    assert found["page"] == str(tmp_path / "run" / "report.html")


def test_the_table_says_what_the_modes_are_worth(capfd, tmp_path, model, data, header):
    output = made(data, tmp_path / "run", header, sure=30)
    code, out, err = call(capfd, "--model", model, "--data", data, "--output", output, "--threshold", 0.8)
    assert code == 0, err
    lines = {line.split()[0]: re.sub(r"\s+", " ", line) for line in reversed(out.splitlines()) if line.strip()}
    number, interval = r"(\d\.\d{3})", r" \[\d\.\d{3}, \d\.\d{3}\]"
    assert lines["direct"] == " direct think auto"
    scores = re.fullmatch("accuracy" + f" {number}{interval}" * 3, lines["accuracy"])
    assert scores.groups() == ("0.750", "1.000", "1.000")
    assert lines["accuracy"].endswith(2 * " 1.000 [0.912, 1.000]"), "Wilson's interval of 40 of 40: 40 / (40 + 1.96^2)"
    assert lines["thinks"] == "thinks 0.00 1.00 0.25"
    assert lines["tokens"].startswith("tokens (p50, p95) 5.0 (5.0, 5.0) 105.0 (105.0, 105.0) 30.0 (5.0, 105.0)")
    assert "40 questions about 40 clips" in out
    assert re.search(r"gain from thinking +\+0\.250 \[", out)
    assert re.search(r"confidence +AUROC 1\.000, ECE", out), "no interval: no resample is anything else"
    assert "in every row" not in out
    assert re.match(r"even 0\.750 / 1\.000 / 1\.000, thinks 0\.25, 20 questions", lines["even"])


def test_calibration_is_told_and_written(capfd, tmp_path, model, data, header):
    output = made(data, tmp_path / "run", header, sure=30)
    own = shutil.copytree(model, tmp_path / "model")
    before = json.loads((own / "mlxvr.json").read_text())["threshold"]
    asked = ("--model", own, "--data", data, "--output", output)
    code, out, err = call(capfd, *asked, "--calibrate", "ratio=0.25", "--write-threshold", "--temperature-scaling")
    assert code == 0, err
    settings = json.loads((own / "mlxvr.json").read_text())
    # a quarter of the rows may reason: exactly those between the two crowds
    assert 0.439 < settings["threshold"] < 0.9
    assert settings["previous_thresholds"][0]["threshold"] == before
    assert f"threshold {settings['threshold']:.4f}" in out
    assert re.search(r"held out: thinks 0\.\d+", out)
    assert "temperature" in out
    assert str(own / "mlxvr.json") in out
    code, out, _ = call(capfd, *asked, "--json", "--calibrate", "no_loss", "--per-task")
    found = json.loads(out)
    assert found["summary"]["threshold"] == settings["threshold"], "the next run takes it from the folder"
    assert found["calibration"]["goal"] == "no_loss"
    assert found["summary"]["overall"]["auto"]["accuracy"]["value"] == 1.0
    assert found["generated"] == 0


def test_a_calibration_is_written_into_a_file_of_its_own(capfd, tmp_path, model, data, header):
    output = made(data, tmp_path / "run", header, sure=30)
    before = (model / "mlxvr.json").read_bytes()
    asked = ("--model", model, "--data", data, "--output", output, "--calibrate", "ratio=0.25")
    code, out, err = call(capfd, *asked, "--threshold-file", tmp_path / "mine.json", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["threshold_file"] == str(tmp_path / "mine.json")
    assert json.loads((tmp_path / "mine.json").read_text())["threshold"] == found["calibration"]["threshold"]
    assert 0.439 < found["calibration"]["threshold"] < 0.9
    assert (model / "mlxvr.json").read_bytes() == before


def test_a_calibration_that_fails_leaves_the_report(capfd, tmp_path, model, data, header):
    output = made(data, tmp_path / "run", header, sure=ROWS)  # all right: no temperature can be fitted
    asked = ("--model", model, "--data", data, "--output", output)
    code, out, err = call(capfd, *asked, "--calibrate", "no_loss", "--temperature-scaling")
    assert (code, out) == (2, "")
    assert "error: a temperature needs right and wrong first answers" in err
    assert (output / "report.html").is_file()
    assert json.loads((output / "report.json").read_text())["summary"]["count"] == ROWS


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--calibrate", "no_loss", "--limit", "3"], "too few rows to choose a threshold: 3 rows; at least 20"),
        (["--calibrate", "ratio=0.5", "--limit", "19"], "too few rows to choose a threshold: 19 rows"),
        (["--calibrate", "no_loss", "--folds", "41"], "too few clips for 41 folds: 40 independent clips"),
        (["--calibrate", "no_loss", "--threshold-file", "no.json"], "no.json cannot be read"),
        (["--calibrate", "no_loss", "--threshold-file", "file/in/it.json"], "it.json cannot be read"),
        (["--compare", "other"], "the two runs have no row in common"),
        (["--compare", "changed"], "row 'r0' is another question"),
        (["--output", "M"], "is the folder of a model or an adapter, for it has config.json: give --output a folder"),
        (["--output", "adapter"], "for it has adapter_config.json"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_before_the_beginning(
    capfd, tmp_path, model, data, monkeypatch, arguments, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "_load", lambda *_: pytest.fail("a model was loaded"))
    Path("no.json").write_text("{")
    Path("file").touch()
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    for name, row in (("other", {"id": "elsewhere"}), ("changed", {"id": "r0", "question": "What else?"})):
        Path(name).mkdir()
        write_samples(Path(name) / "samples.jsonl", {}, [Sample(kind="exact_match", answer="A", first="A", **row)])
    before = sorted(path.name for path in model.iterdir())
    typed = ["--model", model, "--data", data, "--output", "run", *(model if a == "M" else a for a in arguments)]
    code, out, err = call(capfd, *typed)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: .*{re.escape(says)}.*\n", err)
    assert not Path("run").exists()
    assert sorted(path.name for path in model.iterdir()) == before


def test_every_setting_of_the_model_reaches_it(monkeypatch, tmp_path, data):
    given = {}

    class Loaded(Exception):
        pass

    def load_with(options, progress=None):
        given.update(vars(options))
        raise Loaded

    monkeypatch.setattr("mlxvr.reasoner.reasoner.load_with", load_with)
    settings = {"adapter": tmp_path / "a", "revision": "r", "dtype": "float16", "kv_bits": 6, "prefill_step_size": 99}
    settings["memory_limit"] = 7.5
    with pytest.raises(Loaded):
        runner.evaluate(EvalConfig(model="org/m", data=data, output=tmp_path / "run", **settings))
    assert {name: given[name] for name in settings} == settings
    assert given["model"] == "org/m"


@pytest.mark.parametrize("subtitles", [False, True])
def test_subtitles_are_asked_for(monkeypatch, tmp_path, subtitles):
    asked = {}
    monkeypatch.setattr(runner, "read_benchmark", lambda name, root, **options: asked.update(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_questions(EvalConfig(task="videomme", data_root=tmp_path, subtitles=subtitles, output=tmp_path / "run"))
    assert asked == {"subtitles": subtitles}


def test_resamples_and_seed_reach_the_figures(capfd, tmp_path, model, data, header):
    output = made(data, tmp_path / "run", header, sure=30)
    asked = ("--model", model, "--data", data, "--output", output, "--threshold", 0.8, "--json")
    found = [
        json.loads(call(capfd, *asked, "--resamples", count, "--seed", seed)[1])["summary"]
        for count, seed in ((50, 1), (50, 2), (0, 1))
    ]
    assert [(one["bootstrap"], one["seed"]) for one in found] == [(50, 1), (50, 2), (0, 1)]
    intervals = [one["overall"]["gain"] for one in found]
    assert intervals[0] != intervals[1]
    assert intervals[2]["low"] is None


def test_how_an_answer_is_begun_reaches_the_question():
    """MVP begins the answer itself; without that the model is asked something else than the public evaluator asks."""
    asked = {}

    class Clip:
        def stream(self, text, **options):
            asked.update(options, text=text)
            yield mlxvr.Answer("B", 0.9, False, "B", None, "B", 0.97)

    row = make_row(
        {"id": "1", "question": "Which?", "options": ["x", "y"], "answer": "B", "response_prefix": "\\boxed{Answer:"},
        line="f:1",
        locate=Path,
    )
    asking = generation.Asking(mode="auto", threshold=0.5, max_tokens=7)
    sample = generation._ask(None, Clip(), row, asking, 0.0)
    assert (sample.first, sample.error) == ("B", None)
    expected = {
        "text": "Which?",
        "options": ("x", "y"),
        "kind": "qa",
        "mode": "auto",
        "threshold": 0.5,
        "max_tokens": 7,
    }
    assert {name: asked[name] for name in expected} == expected
    assert asked["response_prefix"] == "\\boxed{Answer:"


def test_what_was_made_from_the_demo_has_its_clips(model, tmp_path):
    """A folder whose mlxvr.json names the demo's recipe, by name or in full as a conversion writes it; no other."""
    bundled = read_questions(EvalConfig(output=tmp_path / "run"))
    assert len(bundled.rows) == len((demo_folder() / "clips.jsonl").read_text().splitlines())
    assert read_questions(EvalConfig(model=model, output=tmp_path / "run")) == bundled
    converted = tmp_path / "converted"
    converted.mkdir()
    for recipe, is_demo in (
        ({"name": "shellgame", "bits": 4}, True),
        ({"name": "qwen3_vl"}, False),
        (3, False),
    ):
        (converted / "mlxvr.json").write_text(json.dumps({"recipe": recipe}))
        if is_demo:
            assert read_questions(EvalConfig(model=converted, output=tmp_path / "run")) == bundled
        else:
            with pytest.raises(ConfigError, match="no questions for this model"):
                EvalConfig(model=converted, output=tmp_path / "run")


def test_the_demo_model_is_said_to_know_no_real_clips(monkeypatch, caplog, tmp_path, data):
    class Loaded(Exception):
        pass

    def load(*_):
        raise Loaded

    monkeypatch.setattr(runner, "_load", load)
    for config, warns in (
        (EvalConfig(data=data, output=tmp_path / "run"), True),
        (EvalConfig(output=tmp_path / "run"), False),
        (EvalConfig(model=tmp_path, data=data, output=tmp_path / "run"), False),
    ):
        caplog.clear()
        with pytest.raises(Loaded):
            runner.evaluate(config)
        assert ["demo model" in message for message in caplog.messages] == [True] * warns


def test_a_run_is_held_against_an_earlier_one(capfd, tmp_path, model, data, header):
    before = made(data, tmp_path / "before", header, sure=20, right=lambda n: n < 36)
    after = made(data, tmp_path / "after", header, sure=30)
    asked = ("--model", model, "--data", data, "--threshold", 0.8)
    assert call(capfd, *asked[:-1], 0.7, "--output", before)[0] == 0
    code, out, err = call(capfd, *asked, "--output", after, "--compare", before, "--json")
    assert code == 0, err
    found = json.loads(out)["comparison"]
    assert found["thresholds"] == [0.7, 0.8], "each run has its own"
    assert found["direct"]["difference"]["value"] == pytest.approx(10 / 40)
    assert found["think"]["difference"]["value"] == pytest.approx(4 / 40)
    assert sorted(found["stopped_thinking"]) == [f"r{n}" for n in range(20, 30)]
    code, out, err = call(capfd, *asked, "--output", after, "--compare", before)
    assert re.search(r"direct +0\.500 -> 0\.750, \+0\.250 \[.*\], 10 became right, 0 wrong", out)
    assert "25.0% of the decisions flipped" in out
    assert call(capfd, *asked, "--output", after, "--compare", tmp_path / "nothing")[0] == 2

    # Both are finished now: the same comparison comes from their folders alone.
    both = ("--compare", before, after, "--output", tmp_path / "both")
    code, out, err = call(capfd, *both, "--json")
    assert code == 0, err
    assert json.loads(out)["comparison"] == found
    assert json.loads(out)["samples"] == str(after / "samples.jsonl")
    assert "10 became right" in call(capfd, *both)[1]
    assert (tmp_path / "both" / "report.html").is_file()
    (after / "report.json").unlink()
    code, out, err = call(capfd, *both)
    assert (code, out) == (2, "")
    assert "holds no finished run: its report.json is missing" in err


@pytest.mark.parametrize(("there", "says"), [(True, "math-verify"), (False, "text and numbers: pip install")])
def test_the_report_says_how_formulas_were_compared(capfd, tmp_path, model, data, header, monkeypatch, there, says):
    monkeypatch.setattr(math_equality, "is_available", lambda: there)
    output = made(data, tmp_path / "run", header, sure=30)
    asked = ("--model", model, "--data", data, "--output", output, "--json")
    assert "formulas_compared_by" not in json.loads(call(capfd, *asked)[1])["settings"], "no row has one"
    text = (output / "samples.jsonl").read_text()
    (output / "samples.jsonl").write_text(text.replace('"kind": "exact_match"', '"kind": "math"', 1))
    assert json.loads(call(capfd, *asked)[1])["settings"]["formulas_compared_by"].startswith(says)


def test_rows_that_are_left_out_are_named(capfd, tmp_path, model, data, header):
    output = made(data, tmp_path / "run", header, sure=30)
    bad = data.with_name("made_bad.jsonl")
    bad.write_text(data.read_text() + '{"id": "r0", "question": "?", "answer": "A"}\n')
    asked = ("--model", model, "--data", bad, "--output", output, "--threshold", 0.8)
    code, out, err = call(capfd, *asked)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "made_bad.jsonl:1 has the id 'r0' too" in err
    code, out, err = call(capfd, *asked, "--skip-bad-rows")
    assert code == 0
    assert re.search(r"^left out: .*made_bad.jsonl:41", err, re.MULTILINE)
    assert "40 questions" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: --output"),
        (["--output", "O", "--model", "some/model"], "no questions for this model"),
        (["--output", "O", "--data", "no/such.jsonl"], "no/such.jsonl does not exist"),
        (["--output", "O", "--data", "D", "--task", "mvbench", "--data-root", "x"], "choose --data or --task"),
        (["--output", "O", "--task", "mvbench"], "--data-root go together"),
        (["--output", "O", "--task", "poems", "--data-root", "."], "'poems' is unknown: choose from activitynet"),
        (["--output", "O", "--subtitles"], "--subtitles is for benchmarks"),
        (["--output", "O", "--media-root", "."], "--media-root is for a data file"),
        (["--output", "O", "--limit", "0"], "limit 0"),
        (["--output", "O", "--workers", "0"], "workers 0"),
        (["--output", "O", "--max-tokens", "0"], "max_tokens 0"),
        (["--output", "O", "--threshold", "2"], "threshold 2.0 is outside"),
        (["--output", "O", "--calibrate", "luck"], "'luck' is unknown: use no_loss"),
        (["--output", "O", "--calibrate", "ratio"], "'ratio' is unknown"),
        (["--output", "O", "--calibrate", "no_loss=3"], "'no_loss=3' is unknown"),
        (["--output", "O", "--calibrate", "ratio=much"], "'much' is not a number"),
        (["--output", "O", "--calibrate", "no_loss", "--live"], "without --live"),
        (["--output", "O", "--write-threshold"], "add --calibrate"),
        (["--output", "O", "--calibrate", "no_loss", "--write-threshold"], "give --model the folder"),
        (["--output", "O", "--threshold-file", "t.json"], "--threshold-file is for a calibration: add --calibrate"),
        (["--output", "O", "--calibrate", "no_loss", "--threshold-file", "."], ". is a folder: give --threshold-file"),
        (
            ["--output", "O", "--calibrate", "no_loss", "--threshold-file", "t", "--write-threshold"],
            "leave it or --threshold-file out",
        ),
        (["--output", "O", "--calibrate", "no_loss", "--margin", "2"], "margin 2.0"),
        (["--output", "O", "--calibrate", "no_loss", "--folds", "1"], "folds 1"),
        (["--output", "O", "--fps", "0"], "fps"),
        (["--output", "O", "--kv-bits", "5"], "kv_bits 5"),
        (["--output", "O", "--dtype", "int8"], "int8"),
        (["--output", "O", "--compare", "no/such/run"], "no/such/run"),
        (["--output", "O", "--compare", "a", "b", "--model", "M"], "asks no model: leave --model out"),
        (["--output", "O", "--compare", "a", "b", "c"], "3 runs are to be compared"),
        (["--output", "O", "--media-root", "."], "add --data FILE"),
        (["--output", "O", "--model", "./no/such/model", "--data", "D"], "no such folder"),
        (["--output", "F", "--limit", "1"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(capfd, tmp_path, model, data, arguments, says):
    (tmp_path / "file").touch()
    places = {"O": tmp_path / "run", "D": data, "M": model, "F": tmp_path / "file"}
    code, out, err = call(capfd, *(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert says in err
    assert not list((tmp_path / "run").glob("*.html"))


def test_a_full_disk_is_one_line(tmp_path, data):
    """A limit on the size of files stands for the disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200))

    arguments = ["--output", str(tmp_path / "run"), "--limit", "2", "--dtype", "float32", "--max-tokens", "8"]
    done = subprocess.run(
        [sys.executable, "-B", "-m", "mlxvr", "eval", *arguments], capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: the disk of .*samples.jsonl is full; .*resumes where it stopped\n", done.stderr)
    assert len(read_samples(tmp_path / "run" / "samples.jsonl")) < 2


def test_evaluate_is_the_modules_own():
    assert verb.evaluate is runner.evaluate
    with pytest.raises(ConfigError):
        verb.EvalConfig(output=Path("o"), limit=0)


def test_what_is_asked_of_frames_has_the_names_of_the_spec():
    config = EvalConfig(output=Path("o"), fps=1.0, max_frames=8, video_tokens=500, image_tokens=300)
    spec = config.applied_to(family_of({"model_type": "qwen3_vl"}).vision_spec({"model_type": "qwen3_vl"}))
    assert (spec.fps, spec.max_frames, spec.video_tokens, spec.image_max_tokens) == (1.0, 8, 500, 300)
