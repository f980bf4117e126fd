"""The command line, as a user types it: results on stdout, progress and mistakes on stderr, exit codes."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import mlxvr
from mlxvr import generate
from mlxvr.answering.events import Answer, FirstAnswer, Usage
from mlxvr.answering.transcript import Transcript
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.cli.parser import clock_time
from tests.checkpoints import write_checkpoint
from tests.clips import write_clip, write_sound

ASK = ["--prompt", "What?", "--max-tokens", "6", "--video-tokens", "64"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "model", "qwen3_vl"))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=60, fps=30, size=(128, 96)))


def run(capfd, *arguments):
    code = generate.main(list(arguments))
    out, err = capfd.readouterr()
    return code, out, err


def assert_one_line(code, out, err, says):
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert re.search(says, err), err
    assert "Traceback" not in err


def test_json_is_one_object_with_the_fields_of_the_answer(capfd, model, video):
    code, out, _ = run(capfd, "--model", model, "--video", video, *ASK, "--json")
    assert code == 0
    answer = json.loads(out)
    assert {"text", "confidence", "reasoned", "first", "second", "threshold", "usage", "token_ids"} <= set(answer)
    assert len(answer["token_ids"]) == 6
    assert answer["usage"]["prompt_tokens"] > 0
    assert (answer["model"], answer["video"], answer["question"]) == (model, video, "What?")
    assert (answer["kind"], answer["options"], answer["hit_limit"]) == ("qa", None, True)
    assert answer["seconds"] == pytest.approx([0.33, 1.65], abs=0.1)  # 4 frames of two seconds, in pairs
    assert len(answer["grid"]) == 3
    assert answer["usage"]["generated_tokens"] == 6


def test_several_questions_share_one_clip(capfd, model, video):
    code, out, _ = run(capfd, "--model", model, "--video", video, *ASK, "--prompt", "Which?", "--json")
    assert code == 0
    first, second = json.loads(out)["answers"]
    assert first["usage"]["cached_tokens"] == 0 < second["usage"]["cached_tokens"]


def test_the_result_is_for_people_without_json(capfd, model, video):
    code, out, _ = run(capfd, "--model", model, "--video", video, *ASK, "--option", "left", "--option", "right")
    assert code == 0
    assert "question    What?" in out
    assert "A. left" in out
    assert "answer" in out


def test_settings_and_where_they_come_from(capfd, model):
    """As a table and as JSON; without a question, and without loading weights."""
    flags = ("--threshold", "0.5", "--image-tokens", "300", "--max-tokens", "9")
    code, out, err = run(capfd, "--model", model, "--show-settings", *flags)
    assert (code, err) == (0, "")
    table = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()}
    assert re.fullmatch(r"0\.5 +flag", table["threshold"])
    assert re.fullmatch(r"300 +flag", table["image_max_tokens"])
    assert re.fullmatch(r"9 +flag", table["max_tokens"])
    assert re.fullmatch(r"2\.0 +processor files", table["fps"])
    assert re.fullmatch(r"You are .* \.\. +built-in", table["system_prompt"])
    assert re.fullmatch(r"2048 +built-in", table["prefill_step_size"])
    code, out, err = run(capfd, "--model", model, "--show-settings", "--json")
    settings = json.loads(out)["settings"]
    assert settings["threshold"] == {"value": 0.98, "source": "recipe qwen3_vl (the family's)"}
    assert settings["system_prompt"]["value"].startswith("You are a helpful assistant.\nFIRST: ")
    assert settings.keys() == table.keys()
    assert_one_line(*run(capfd, "--model", model, "--show-settings", "--max-frames", "1"), "max_frames is 1")


def test_options_without_effect_are_told_once(capfd, model, video, caplog):
    with caplog.at_level("WARNING"):
        idle = ("--seed", "1", "--top-p", "0.5", "--mode", "think", "--threshold", "0.5")
        code, _, err = run(capfd, "--model", model, "--video", video, *ASK, "--prompt", "Why?", *idle)
    assert code == 0
    told = [record.getMessage() for record in caplog.records if "without effect" in record.getMessage()]
    assert told == ["without effect: top_p, seed, as temperature 0 decodes greedily"]
    assert err.count("without effect: --threshold, as --mode think does not ask how sure it is") == 1
    caplog.clear()
    code, _, err = run(capfd, "--model", model, "--video", video, *ASK, "--seed", "1", "--temperature", "1")
    assert code == 0
    assert "without effect" not in err + caplog.text


def test_a_second_video_is_refused(capfd, video):
    """argparse would take the last one, without a word."""
    code, out, err = run(capfd, "--video", video, "--video", "b.mp4", *ASK)
    assert_one_line(code, out, err, "--video is given 2 times: one clip is asked about at a time, keep one")


@pytest.mark.parametrize("name", ["04.23:50.mp4", "-clip.mp4", "50%.mp4", "a\nb.mp4", "🎬 é.mp4", "clip.mp4 "])
def test_names_that_look_like_something_else(capfd, model, video, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copy(video, name)
    code, out, _ = run(capfd, "--model", model, f"--video={name}", *ASK, "--json")
    assert code == 0
    assert json.loads(out)["usage"]["video_tokens"] > 0


def test_urls_and_home_folders(capfd, model, video, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(video, tmp_path / "My Clip.mp4")
    for location in ("~/My Clip.mp4", f"file://{tmp_path}/My%20Clip.mp4"):
        code, *_ = run(capfd, "--model", model, "--video", location, *ASK)
        assert code == 0
    code, out, err = run(capfd, "--model", model, "--video", "https://example.com/a.mp4", *ASK)
    assert_one_line(code, out, err, "https://example.com/a.mp4 is a URL, .* download it first")


def test_a_folder_of_frames(capfd, model, tmp_path):
    for number in range(1, 5):
        Image.new("RGB", (64, 48), (60 * number,) * 3).save(tmp_path / f"{number}.jpg")
    (tmp_path / "._1.jpg").write_bytes(b"\0\5\x16\7")
    code, out, err = run(capfd, "--model", model, "--video", str(tmp_path), "--fps", "1", *ASK, "--json")
    assert code == 0
    assert json.loads(out)["usage"]["video_tokens"] > 0
    assert "--fps says another rate" not in err
    _, _, err = run(capfd, "--model", model, "--video", str(tmp_path), *ASK)
    assert "frames of a folder: read as 2 a second; --fps says another rate" in err


@pytest.mark.parametrize(
    ("confidence", "mode", "reasons", "says"),
    [
        (0.985, "auto", False, "0.985 ████████████████████ ≥ 0.970: sure, no need to think"),
        (0.414, "auto", True, "0.414 ████████░░░░░░░░░░░░ < 0.970: not sure, so it thinks"),
        (None, "auto", True, "none: it would not answer directly, so it thinks"),
        (0.985, "direct", False, "0.985 ████████████████████ ≥ 0.970: sure"),
        (0.414, "direct", False, "0.414 ████████░░░░░░░░░░░░ < 0.970: not sure; --mode direct takes it all the same"),
        (None, "direct", False, "none: it would not answer directly; --mode direct takes it all the same"),
        (0.985, "think", True, "0.985 ████████████████████ ≥ 0.970: sure; --mode think reasons all the same"),
        (0.414, "think", True, "0.414 ████████░░░░░░░░░░░░ < 0.970: not sure, so it thinks"),
    ],
)
def test_the_gauge_says_why_it_thinks_or_not(confidence, mode, reasons, says):
    assert generate._gauge(FirstAnswer("A", confidence, 0.97, reasons), mode) == says


def test_departures_from_the_format_are_told_in_words():
    usage = Usage(prompt_tokens=9, first_answer_tokens=2, reasoning_tokens=3, peak_memory_bytes=3 * 2**20)
    answer = Answer("A", 0.5, False, "A", None, None, 0.97, problems=("no_second_box", "token_limit"), usage=usage)
    told = generate._cost(answer)
    assert told.startswith("directly: 5 tokens in 0.00 s; prompt 9 tokens (0 of video, 0 reused); peak memory 3 MiB; ")
    assert told.endswith("; output format: no second answer, cut off at the limit of tokens (--max-tokens)")
    named = re.findall(r"^        (\w+): ", inspect.getdoc(Transcript), re.MULTILINE)
    assert list(generate._PROBLEMS) == named


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5), ("65.5", 65.5), ("0:05", 5), ("1:05.5", 65.5), ("1:02:03", 3723), ("90:00", 5400), ("0", 0)],
)
def test_times_of_the_command_line(text, seconds):
    assert clock_time(text) == seconds


@pytest.mark.parametrize("text", ["", "one", "1:60", "1:-5", "1:2:3:4", "1.5:00", "1: 5", "inf", "nan", "1:", ":5"])
def test_times_that_are_none(capfd, video, text):
    assert_one_line(*run(capfd, "--video", video, "--prompt", "x", f"--start={text}"), "is no time: give seconds")


def test_the_demo_model_is_said_to_know_no_real_videos(capfd, tmp_path, video, caplog):
    """Once, however many clips; and not about its own."""
    with mlxvr.load() as loaded:
        loaded.open(demo_folder() / "clips" / "clip00.mp4")
        loaded.open(np.zeros((4, 56, 56, 3), np.uint8))
        assert caplog.messages == []
        loaded.open(video)
        loaded.open(video)
        [message] = caplog.messages
        assert re.match("this is the demo model, which knows only its own .*; name another model", message)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--revision", "v1"], "revision 'v1' is of a Hub id, and no model is named"),
        (["--temperature", "1", "--seed", "-1"], "seed -1 cannot be used"),
        (["--max-tokens", "0.5"], "invalid int value"),
        (["--option", "left", "--option", ""], "option 2 is empty"),
    ],
)
def test_mistakes_with_the_demo_model(capfd, video, arguments, says):
    assert_one_line(
        *run(capfd, "--video", str(demo_folder() / "clips" / "clip00.mp4"), "--prompt", "x", *arguments), says
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--video", "V"], "no question"),
        (["--prompt", "What?"], "no clip"),
        (["--model", "M"], "no clip and no question"),
        (["--video", "V", "--prompt", ""], "empty"),
        (["--video", "V", "--prompt", "x", "--mode", "perhaps"], "invalid choice: 'perhaps'"),
        (["--video", "V", "--prompt", "x", "--kind", "poem"], "invalid choice: 'poem'"),
        (["--video", "V", "--prompt", "x", "--threshold", "1.5"], r"outside \[0, 1\]"),
        (["--video", "V", "--prompt", "x", "--max-tokens", "0"], "at least 1"),
        (["--video", "V", "--prompt", "x", "--max-tokens", "many"], "invalid int value: 'many'"),
        (["--video", "V", "--prompt", "x", "--fps", "-1"], "fps"),
        (["--video", "V", "--prompt", "x", "--fps", "0"], "fps"),
        (["--video", "V", "--prompt", "x", "--max-frames", "0"], "max_frames"),
        (["--video", "V", "--prompt", "x", "--start", "9"], "start is 9 s, but the clip ends at 2.00 s"),
        (["--video", "V", "--prompt", "x", "--start", "1", "--end", "0.5"], "backwards"),
        (["--video", "V", "--prompt", "x", "--start", "1", "--end", "1"], "empty"),
        (["--video", "V", "--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--video", "V", "--prompt", "x", "--kv-bits", "5"], "kv_bits 5"),
        (["--video", "V", "--prompt", "x", "--prefill-step-size", "0"], "prefill_step_size"),
        (["--video", "V", "--prompt", "x", "--no-such-flag"], "unrecognized arguments"),
        (["--video", "V", "--prompt", "x", "--model", "./no/such/folder"], "no such folder"),
        (["--video", "V", "--prompt", "x", "--adapter", "./no/such/folder"], "no/such/folder"),
        (["--video", "no/such.mp4", "--prompt", "x"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(capfd, model, video, arguments, says):
    places = {"V": video, "M": model}
    typed = [places.get(argument, argument) for argument in arguments]
    if "--model" not in typed:
        typed += ["--model", model] if "--video" in typed and says != "no question" else []
    assert_one_line(*run(capfd, *typed), says)


def test_files_that_are_no_videos_are_one_line(capfd, model, video, tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("I am not a video. " * 100)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "cut.mp4").write_bytes(Path(video).read_bytes()[:2000])
    write_sound(tmp_path / "sound.mp4")
    for name, says in [
        ("empty.mp4", "empty"),
        ("text.mp4", "text.mp4"),
        ("folder.mp4", "folder"),
        ("cut.mp4", "cut.mp4"),
        ("sound.mp4", "sound|audio"),
    ]:
        assert_one_line(*run(capfd, "--model", model, "--video", str(tmp_path / name), *ASK), says)


def break_folder(folder, how):
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if how == "missing shard":
        next(iter(folder.glob("model-*.safetensors"))).unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "architecture":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    elif how == "shape":
        config["text_config"]["intermediate_size"] *= 2
        (folder / "config.json").write_text(json.dumps(config))
    else:
        (folder / how).unlink()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing shard", r"model-0000\d-of-0000\d\.safetensors"),
        ("truncated", "model.safetensors"),
        ("pickle", "safetensors"),
        ("architecture", "llama"),
        ("shape", "mlp"),
        ("tokenizer.json", "tokenizer.json"),
        ("config.json", "config.json"),
        ("chat_template.jinja", "chat template"),
    ],
)
def test_damaged_models_are_one_line(capfd, tmp_path, video, how, says):
    folder = write_checkpoint(tmp_path / "model", "qwen3_vl", shards=3 if how == "missing shard" else 1)
    break_folder(folder, how)
    before = sorted(path.name for path in folder.iterdir())
    assert_one_line(*run(capfd, "--model", str(folder), "--video", video, *ASK), says)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_prompt_beyond_the_context_is_one_line(capfd, tmp_path, video):
    folder = write_checkpoint(tmp_path / "model", "qwen3_vl", text={"max_position_embeddings": 256})
    code, out, err = run(capfd, "--model", str(folder), "--video", video, "--prompt", "What?", "--json")
    assert_one_line(code, out, err, "context is 256")


def test_a_local_folder_touches_no_network(model, video):
    script = """
import socket, sys

def refuse(*_, **__):
    raise AssertionError("the network was touched")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from mlxvr import generate

sys.exit(generate.main(sys.argv[1:]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    arguments = ["--model", model, "--video", video, *ASK, "--json"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"]


class Recorder:
    """A reasoner and its clip that keep what they were given."""

    spec, grid, seconds = SimpleNamespace(fps=2.0), (0, 0, 0), ()

    def __init__(self):
        self.given = {}

    def load_with(self, options, progress):
        self.given |= vars(options)
        return self

    def open_with(self, source, options, progress):
        self.given |= {"video": source, **vars(options)}
        return self

    def stream_with(self, request):
        self.given |= vars(request)
        yield Answer("A", 0.5, False, "A", None, None, 0.97)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


FLAGS = {
    "--model": ("M", "M"),
    "--adapter": ("A", Path("A")),
    "--revision": ("R", "R"),
    "--kind": ("grounded_qa", "grounded_qa"),
    "--mode": ("direct", "direct"),
    "--threshold": ("0.5", 0.5),
    "--max-tokens": ("7", 7),
    "--temperature": ("0.5", 0.5),
    "--top-p": ("0.25", 0.25),
    "--seed": ("3", 3),
    "--fps": ("1.5", 1.5),
    "--max-frames": ("12", 12),
    "--video-tokens": ("77", 77),
    "--image-tokens": ("88", 88),
    "--sample-by": ("index", "index"),
    "--start": ("0:01", 1.0),
    "--end": ("1.5", 1.5),
    "--dtype": ("float16", "float16"),
    "--kv-bits": ("6", 6),
    "--prefill-step-size": ("99", 99),
    "--memory-limit": ("7.5", 7.5),
    "--frames": ("4", 4),
}
ELSEWHERE = {"--help", "--debug", "--json", "--video", "--prompt", "--option", "--show-settings"}


@pytest.mark.parametrize("way", [[], ["--json"]])
def test_every_flag_reaches_its_consumer(capfd, video, monkeypatch, way):
    recorder = Recorder()
    monkeypatch.setattr(generate, "load_with", recorder.load_with)
    typed = [part for flag, (text, _) in FLAGS.items() for part in (flag, text)]
    code, *_ = run(capfd, "--video", video, "--prompt", "What?", "--option", "x", "--option", "y", *typed, *way)
    assert code == 0
    assert (recorder.given["text"], recorder.given["options"]) == ("What?", ("x", "y"))
    assert str(recorder.given["video"]) == video
    names = {flag: flag.removeprefix("--").replace("-", "_") for flag in FLAGS}
    assert {flag: recorder.given[name] for flag, name in names.items()} == {
        flag: value for flag, (_, value) in FLAGS.items()
    }
    known = {action.option_strings[-1] for action in generate.make_parser()._actions}
    assert known - FLAGS.keys() <= ELSEWHERE, "a flag that is not tried here"


def test_no_arguments_show_both_kinds_of_answer(capfd):
    code, out, _ = run(capfd)
    assert code == 0
    direct, thought = out.split("\n\n")
    assert "no need to think" in direct
    assert "reasoning" not in direct
    assert "so it thinks" in thought
    assert "reasoning" in thought


def test_debug_adds_the_traceback(capfd, model):
    code, _, err = run(capfd, "--debug", "--model", model, "--video", "no/such.mp4", "--prompt", "x")
    assert code == 2
    assert "Traceback" in err


def test_the_verbs_are_reached_both_ways(model, video):
    arguments = ["--model", model, "--video", video, *ASK, "--json"]
    outputs = [
        subprocess.run([sys.executable, "-m", *way, *arguments], capture_output=True, text=True, timeout=120)
        for way in (["mlxvr.generate"], ["mlxvr", "generate"])
    ]
    assert [done.returncode for done in outputs] == [0, 0], outputs[0].stderr
    one, other = (json.loads(done.stdout) for done in outputs)
    assert one["token_ids"] == other["token_ids"]
    wrong = subprocess.run([sys.executable, "-m", "mlxvr", "sing"], capture_output=True, text=True, timeout=300)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: unknown verb 'sing'")
    assert subprocess.run([sys.executable, "-m", "mlxvr", "--help"], capture_output=True, timeout=300).returncode == 0


def test_options_with_their_letters_are_shown_and_asked_once_lettered(capsys):
    """`--option "A. red"` is no "A. A. red"."""
    clip = demo_folder() / json.loads((demo_folder() / "clips.jsonl").read_text().splitlines()[0])["video"]
    argv = [
        "--video",
        str(clip),
        "--prompt",
        "What color?",
        "--option",
        "A. red",
        "--option",
        "B. blue",
        "--max-tokens",
        "4",
    ]
    assert generate.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"] == ["red", "blue"]
    assert generate.main(argv) == 0
    shown = capsys.readouterr().out
    assert "            A. red\n            B. blue\n" in shown
    assert generate.main([*argv, "--option", "blue"]) == 0  # not each has a letter: they are taken as they are
    assert "            A. A. red\n" in capsys.readouterr().out
    assert generate.main([*argv[:4], "--option", "red", "--option", "red"]) == 2
    assert "options 1 and 2 are both 'red': give every choice once" in capsys.readouterr().err
