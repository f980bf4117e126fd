"""The plugin for lmms-eval: against the installed package where there is one, and its own parts without it."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import mlxvr
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.errors import ConfigError
from mlxvr.evaluation.lmms.answering import LmmsRequest, answer_all, open_log, read_context, read_visuals
from mlxvr.evaluation.lmms.options import LmmsOptions
from mlxvr.evaluation.samples import read_run, read_samples
from mlxvr.model.prompt import KINDS, question_text

ROWS = [json.loads(line) for line in (demo_folder() / "clips.jsonl").read_text(encoding="utf-8").splitlines()]
BOX = "Put your final answer in \\boxed{}."


def prompt_of(row):
    """A multiple-choice prompt as a task writes it, without our words."""
    options = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDEF", row["options"]))
    return f"{row['question']}\nOptions:\n{options}"


def path_of(row):
    return str(demo_folder() / row["video"])


def asked(context, visuals, doc_id=0, **generation):
    return LmmsRequest(
        task="t", split="test", doc_id=doc_id, context=context, visuals=lambda: visuals, generation=generation
    )


@pytest.fixture(scope="module")
def reasoner():
    with mlxvr.load(dtype="float32") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def truth(reasoner):
    """What the first three bundled questions are answered, each asked on its own."""
    return [reasoner.ask(path_of(row), row["question"], options=row["options"]) for row in ROWS[:3]]


# The parts that need no lmms-eval.


def test_importing_the_plugin_imports_neither_lmms_eval_nor_torch():
    code = (
        "import sys, mlxvr.evaluation.lmms, mlxvr.evaluation.lmms.models, mlxvr.evaluation.lmms.answering\n"
        "sys.stdout.write(' '.join(sorted({'torch', 'lmms_eval', 'mlx', 'transformers'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == ""


def test_arguments_are_read_as_lmms_eval_makes_them_of_the_command_line():
    read = LmmsOptions.from_arguments(
        {"pretrained": "None", "mode": "think", "threshold": 1, "fps": 2, "max_frames": 8.0, "adapter": None}
    )
    assert (read.model, read.adapter, read.mode) == (None, None, "think")
    assert (read.threshold, read.fps, read.max_frames, read.max_tokens) == (1.0, 2.0, 8, 4096)
    assert isinstance(read.max_frames, int)
    assert isinstance(read.fps, float)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"max_pixels": 12845056}, r"no model argument 'max_pixels': did you mean 'max_frames'"),
        ({"model": "m"}, r"no model argument 'model': did you mean 'mode'"),
        ({"xyz": 1}, r"no model argument 'xyz': use some of pretrained, adapter"),
        ({"max_frames": 8.5}, r"max_frames = 8.5: expected a whole number"),
        ({"max_frames": float("inf")}, r"max_frames = inf: expected a whole number"),
        ({"kv_bits": True}, r"kv_bits = True: expected a whole number"),
        ({"fps": "fast"}, r"fps = 'fast': expected a number"),
        ({"mode": "sometimes"}, r"mode = 'sometimes': use one of auto, direct, think"),
        ({"threshold": 97}, r"threshold 97.0 is outside \[0, 1\]"),
        ({"max_new_tokens": 0}, r"max_tokens 0 leaves no room"),
        ({"response_prefix": r"\boxed{A}"}, r"close no box"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, told):
    with pytest.raises(ConfigError, match=told) as caught:
        LmmsOptions.from_arguments(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("question", ["A dog runs.", "Why?\nOptions:\nA. one\nB. two"])
def test_a_context_in_our_words_is_said_once(kind, question):
    context = question_text(question, kind=kind)
    assert read_context(f"  {context}\n") == (question, kind)
    assert question_text(*read_context(context)[:1], kind=read_context(context)[1]) == context


@pytest.mark.parametrize(
    ("context", "question"),
    [
        ("What is it?\nAnswer with the option's letter.", "What is it?\nAnswer with the option's letter."),
        (f"What is it? {BOX}", "What is it?"),
        (f"{BOX} What is it?", f"{BOX} What is it?"),
        ("<video>\n<image>What is it?", "What is it?"),
        ("Compare <image 1> and <image 2>.", "Compare <image 1> and <image 2>."),
        (BOX, BOX),
    ],
)
def test_any_other_context_stays_what_it_is(context, question):
    assert read_context(context) == (question, "qa")


def test_visuals_are_paths_and_pictures():
    picture = Image.new("RGB", (8, 8))
    assert read_visuals(None) == read_visuals([]) == read_visuals([None]) == []
    assert read_visuals("a.mp4") == read_visuals(["a.mp4"]) == read_visuals([["a.mp4"]]) == ["a.mp4"]
    assert read_visuals([picture, "b.PNG"]) == [picture, "b.PNG"]


@pytest.mark.parametrize(
    ("visuals", "told"),
    [
        (["a.mp4", "b.mp4"], "2 videos for one question"),
        (["https://example.org/a.mp4"], "an address"),
        ([{"array": np.zeros(4), "sampling_rate": 16000}], "a dict"),
    ],
)
def test_other_visuals_are_refused(visuals, told):
    with pytest.raises(ConfigError, match=told):
        read_visuals(visuals)


def test_questions_in_a_row_share_the_clip_and_are_answered_as_on_their_own(reasoner, truth, monkeypatch):
    opened = []
    genuine = type(reasoner).open_with

    def spy(self, source, options):
        opened.append(source)
        return genuine(self, source, options)

    monkeypatch.setattr(type(reasoner), "open_with", spy)
    rows = [*ROWS[:3], ROWS[0]]
    requests = [asked(prompt_of(row), [path_of(row)], number) for number, row in enumerate(rows)]
    responses = list(answer_all(reasoner, requests, LmmsOptions()))
    assert opened == [path_of(ROWS[0]), path_of(ROWS[2]), path_of(ROWS[0])]
    assert [response.text for response in responses] == [answer.text for answer in [*truth, truth[0]]]
    assert {answer.reasoned for answer in truth} == {True, False}, "both ways to an answer are taken"
    for response, answer in zip(responses, truth):
        assert response.answer.first == answer.first
        assert response.answer.reasoning == answer.reasoning
        assert response.answer.confidence == pytest.approx(answer.confidence, abs=1e-4)
    assert [response.answer.usage.cached_tokens > 0 for response in responses] == [False, True, False, False]


def test_a_question_that_fails_costs_itself(reasoner, truth, tmp_path, caplog):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    requests = [
        asked("What is it?", [str(tmp_path / "broken.mp4")], 0),
        asked("What is it?", [path_of(ROWS[0]), path_of(ROWS[2])], 1),
        asked(prompt_of(ROWS[0]), [path_of(ROWS[0])], 2),
        asked("   ", [path_of(ROWS[0])], 3),
        asked(prompt_of(ROWS[0]), [path_of(ROWS[0])], 4),
    ]
    options = LmmsOptions(log_file=str(tmp_path / "log.jsonl"))
    with open_log(options.log_file, reasoner, options) as log:
        responses = list(answer_all(reasoner, requests, options, log=log))
    assert [response.text for response in responses] == ["", "", truth[0].text, "", truth[0].text]
    assert responses[4].answer.usage.cached_tokens > 0, "a refused question costs its clip nothing"
    assert "broken.mp4" in responses[0].error
    assert "2 videos" in responses[1].error
    assert "the question is empty" in responses[3].error
    assert "3 of 5 questions could not be answered" in caplog.text
    assert [sample.error for sample in read_samples(tmp_path / "log.jsonl")] == [one.error for one in responses]


@pytest.mark.slow
def test_the_log_holds_what_led_to_the_answers(reasoner, truth, tmp_path):
    options = LmmsOptions(log_file=str(tmp_path / "log.jsonl"))
    requests = [asked(prompt_of(row), [path_of(row)], number) for number, row in enumerate(ROWS[:3])]
    for _ in range(2):  # a second run goes on with the file
        with open_log(options.log_file, reasoner, options) as log:
            list(answer_all(reasoner, requests[: 2 + len(log.done)], options, log=log))
    samples = read_samples(tmp_path / "log.jsonl")
    assert [sample.id for sample in samples] == ["t-0", "t-1", "t-2"]
    assert read_run(tmp_path / "log.jsonl")["threshold"] == reasoner.threshold
    for sample, answer, row in zip(samples, truth, ROWS):
        assert (sample.first, sample.second, sample.text) == (answer.first, answer.second, answer.text)
        assert (sample.reasoning, sample.reasoned) == (answer.reasoning, answer.reasoned)
        assert sample.total_tokens == len(answer.token_ids)
        assert sample.first_tokens == answer.usage.first_answer_tokens
        assert (sample.media, sample.question) == (path_of(row), prompt_of(row))
    with pytest.raises(ConfigError, match="other settings"):
        open_log(options.log_file, reasoner, LmmsOptions(mode="think"))


def test_the_log_holds_what_the_checkpoint_gave_where_options_give_nothing(reasoner, tmp_path):
    path, spec = tmp_path / "log.jsonl", reasoner.spec
    open_log(path, reasoner, LmmsOptions()).close()
    run = read_run(path)
    assert (run["fps"], run["max_frames"], run["video_tokens"]) == (spec.fps, spec.max_frames, spec.video_tokens)
    open_log(path, reasoner, LmmsOptions(fps=spec.fps, max_frames=spec.max_frames)).close()  # the same run
    with pytest.raises(ConfigError, match="other settings"):
        open_log(path, reasoner, LmmsOptions(max_frames=spec.max_frames - 2))


def test_several_pictures_are_the_frames_of_a_video_and_no_visuals_are_none(reasoner, monkeypatch):
    rates = []
    genuine = type(reasoner).open_with

    def spy(self, source, options):
        rates.append(options.fps)
        return genuine(self, source, options)

    frames = [Image.new("RGB", (64, 64), (40 * step, 0, 0)) for step in range(6)]
    options = LmmsOptions(mode="direct", frames_fps=3, max_tokens=8)
    requests = [asked("Which color?", frames), asked("Which color?", frames[0], 1), asked("Which color?", None, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(type(reasoner), "open_with", spy)
        video, image, nothing = answer_all(reasoner, requests, options)
    assert rates == [3.0, None, None]
    with reasoner.open(frames, fps=3.0) as clip:
        own = clip.ask("Which color?", mode="direct", max_tokens=8)
    assert video.answer.token_ids == own.token_ids
    assert video.answer.usage.video_tokens == own.usage.video_tokens > image.answer.usage.video_tokens > 0
    assert nothing.answer.usage.video_tokens == 0


def test_a_task_that_samples_is_sampled(reasoner, monkeypatch):
    said = []

    class Recorder:
        def ask(self, question, **options):
            said.append((options.get("temperature", 0.0), options.get("top_p", 1.0), options["max_tokens"]))
            return SimpleNamespace(text="A")

        def close(self):
            pass

    monkeypatch.setattr(type(reasoner), "open_with", lambda self, source, options: Recorder())
    greedy = {"temperature": 0, "max_new_tokens": 16, "top_p": None}
    sampled = {"temperature": 0.7, "top_p": 0.9, "do_sample": True}
    refused = {"temperature": 0.7, "do_sample": False}
    requests = [asked("Q?", "a.mp4", **generation) for generation in ({}, greedy, sampled, refused)]
    list(answer_all(reasoner, requests, LmmsOptions()))
    assert said == [(0.0, 1.0, 4096), (0.0, 1.0, 4096), (0.7, 0.9, 4096), (0.0, 1.0, 4096)]


# Against lmms-eval itself.

needs_lmms_eval = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")


@pytest.fixture(scope="module")
def lmms():
    """The class of our model, as lmms-eval's registry gives it out, and the modules of lmms-eval that tests use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        from lmms_eval.api import instance
        from lmms_eval.caching import response_cache
        from lmms_eval.models import registry_v2

        from mlxvr.evaluation.lmms import manifest

        registry = registry_v2.ModelRegistryV2()
        for one in registry._coerce_payload_to_manifests(manifest):
            registry.register_manifest(one)
        return SimpleNamespace(
            Model=registry.get_model_class("mlxvr"),
            Instance=instance.Instance,
            unwrap=instance.unwrap_generation_output,
            ResponseCache=response_cache.ResponseCache,
        )


@pytest.fixture(scope="module")
def model(lmms):
    """Made by lmms-eval's own hands, from the text of a command line."""
    made = lmms.Model.create_from_arg_string(
        "mode=auto,dtype=float32,threshold=0.97", {"batch_size": "1", "max_batch_size": None, "device": None}
    )
    made.task_dict["demo"] = {"test": ROWS}
    yield made
    made.clean()


def requests_of(lmms, numbers, task="demo"):
    generation = {"max_new_tokens": 16, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    return [
        lmms.Instance(
            request_type="generate_until",
            arguments=(prompt_of(ROWS[n]), dict(generation), lambda doc: [path_of(doc)], n, task, "test"),
            idx=0,
            metadata={"task": task, "doc_id": n, "repeats": 1},
        )
        for n in numbers
    ]


@needs_lmms_eval
def test_lmms_eval_gets_our_answers_and_what_they_cost(lmms, model, truth):
    told = []
    model.set_cache_hook(SimpleNamespace(add_partial=lambda *args: told.append(args)))
    requests = requests_of(lmms, range(3))
    results = [lmms.unwrap(result) for result in model.generate_until(requests)]
    assert [text for text, _ in results] == [answer.text for answer in truth]
    for (_, counts), answer in zip(results, truth):
        assert counts.output_tokens == len(answer.token_ids)
        assert counts.reasoning_tokens == len(answer.token_ids) - answer.usage.first_answer_tokens
        assert counts.input_tokens == answer.usage.prompt_tokens + 1  # the newline of the evaluator's system prompt
    assert told == [("generate_until", one.args[:2], answer.text) for one, answer in zip(requests, truth)]


@needs_lmms_eval
def test_lmms_evals_cache_keeps_answers_but_not_failures(lmms, model, truth, tmp_path):
    cache = lmms.ResponseCache(str(tmp_path / "cache.db"), str(tmp_path / "audit.jsonl"), model_fingerprint="m")
    asked_for = []
    genuine = model.generate_until

    class Spy:
        def generate_until(self, requests):
            asked_for.append([one.doc_id for one in requests])
            return genuine(requests)

    broken = [{**ROWS[0], "video": "no-such-clip.mp4"}, *ROWS[1:]]
    model.task_dict["broken"] = {"test": broken}
    for _ in range(2):
        results = cache.execute(Spy(), "generate_until", requests_of(lmms, range(3), task="broken"))
        assert [lmms.unwrap(one)[0] for one in results] == ["", truth[1].text, truth[2].text]
    cache.close()
    assert asked_for == [[0, 1, 2], [0]]


@needs_lmms_eval
def test_what_cannot_be_run_is_refused_in_one_line(lmms, model, monkeypatch):
    with pytest.raises(ConfigError, match="demo cannot be run with mlxvr: it compares"):
        model.loglikelihood(requests_of(lmms, [0]))
    with pytest.raises(ConfigError, match="in several rounds"):
        model.generate_until_multi_round(requests_of(lmms, [0]))
    with pytest.raises(ConfigError, match="batch_size 8"):
        lmms.Model.create_from_arg_string("", {"batch_size": 8})
    with pytest.raises(ConfigError, match="video_tokens"):
        lmms.Model.create_from_arg_string("video_tokens=0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes"):
        lmms.Model.create_from_arg_string("")


@needs_lmms_eval
def test_a_cleaned_model_loads_again(lmms, model, truth):
    model.clean()
    assert model.generate_until(requests_of(lmms, [0]))[0].text == truth[0].text


@needs_lmms_eval
def test_an_entry_point_is_enough_to_be_found(tmp_path):
    """As an installed distribution names it; no variable is set."""
    found = tmp_path / "other-1.0.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (found / "entry_points.txt").write_text("[lmms_eval.models]\nmlxvr = mlxvr.evaluation.lmms:manifest\n")
    code = "from lmms_eval.models import get_model_manifest; print(get_model_manifest('mlxvr').simple_class_path)"
    environment = {name: value for name, value in os.environ.items() if name != "LMMS_EVAL_PLUGINS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(Path(mlxvr.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    assert done.stdout.split()[-1] == "mlxvr.evaluation.lmms.models.mlxvr.Mlxvr"


TASK = """\
task: mlxvr_demo
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, temperature: 0, do_sample: false}}
process_results: !function utils.score
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
lmms_eval_specific_kwargs:
  default: {{post_prompt: "Reply with a word."}}
  mlxvr: {{post_prompt: ""}}
"""

UTILS = """\
def visual(doc):
    return [doc["video"]]

def text(doc, lmms_eval_specific_kwargs):
    options = "\\n".join(f"{letter}. {option}" for letter, option in zip("ABCDEF", doc["options"]))
    return doc["question"] + "\\nOptions:\\n" + options + lmms_eval_specific_kwargs["post_prompt"]

def score(doc, results):
    return {"acc": float(results[0] == doc["answer"])}
"""


@needs_lmms_eval
@pytest.mark.slow
def test_the_command_line_of_lmms_eval_selects_the_model_by_name(truth, tmp_path):
    """Registry, task, requests, grading and report are all lmms-eval's, in a process of its own."""
    rows = [{key: row[key] for key in ("id", "question", "options", "answer")} for row in ROWS[:3]]
    rows[2]["answer"] = "E"  # one is graded wrong
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f"{json.dumps({**row, 'video': path_of(full)})}\n" for row, full in zip(rows, ROWS)))
    (tmp_path / "mlxvr_demo.yaml").write_text(TASK.format(data=data))
    (tmp_path / "utils.py").write_text(UTILS)
    command = f"""-m lmms_eval --model mlxvr --tasks mlxvr_demo --include_path {tmp_path} --log_samples
        --model_args mode=auto,dtype=float32,log_file={tmp_path}/log.jsonl --output_path {tmp_path}/out"""
    environment = os.environ | {
        "LMMS_EVAL_PLUGINS": "mlxvr.evaluation.lmms",
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": str(Path(mlxvr.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["mlxvr_demo"]["acc,none"] == pytest.approx(2 / 3)
    (kept,) = (tmp_path / "out").rglob("*_samples_*.jsonl")
    responses = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [one["filtered_resps"][0] for one in responses] == [answer.text for answer in truth]
    samples = read_samples(tmp_path / "log.jsonl")
    assert [sample.question for sample in samples] == [prompt_of(row) for row in ROWS[:3]]
    assert [(sample.first, sample.second) for sample in samples] == [(one.first, one.second) for one in truth]
