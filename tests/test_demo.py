"""What is bundled with the package: a complete checkpoint, clips that play, and figures that hold."""

import json
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

import mlxvr
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.media import load_vision

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

ROWS = [json.loads(line) for line in (demo_folder() / "clips.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def reasoner():
    with mlxvr.load(dtype=faster_dtype()) as loaded:
        yield loaded


def faster_dtype():
    """float32 where the BLAS is good, else the checkpoint's own bfloat16: the answers are the same, the minutes not."""
    import mlx.core as mx

    seconds = {}
    for dtype in (mx.float32, mx.bfloat16):
        a, b = mx.zeros((512, 192), dtype), mx.zeros((192, 512), dtype)
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            mx.eval(a @ b)
            seconds[dtype] = time.perf_counter() - started
    return "float32" if seconds[mx.float32] < seconds[mx.bfloat16] else None


def test_the_bundle_is_complete_and_small():
    files = [path for path in demo_folder().rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files) <= 10e6
    assert len({row["video"] for row in ROWS}) >= 12
    assert {path.relative_to(demo_folder()).as_posix() for path in files if path.suffix == ".mp4"} == {
        row["video"] for row in ROWS
    }
    assert {"perception", "tracking"} == {row["group"] for row in ROWS[:2]}
    assert ROWS[0]["video"] == ROWS[1]["video"], "the demo asks two questions about one clip"


def test_transformers_reads_the_tokenizer():
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    folder = demo_folder() / "checkpoint"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for row in ROWS:
        text = f"<|im_start|>user\n{row['question']} \\boxed{{{row['answer']}}}<think>\n{row['trace']}\n</think>"
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False).ids
    assert theirs.eos_token == "<|im_end|>"
    assert "<think>" not in theirs.all_special_tokens
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    assert rendered == f"<|im_start|>user\n{video}What?<|im_end|>\n<|im_start|>assistant\n"


def test_bundled_clips_come_to_trained_sizes():
    """The processor files bring clips of any size to frames of 15 to 20 tokens, two a second."""
    folder = ModelFolder.open(demo_folder() / "checkpoint")
    spec = folder.family.vision_spec(folder.config, folder.image_processor, folder.video_processor)
    for row in {row["video"]: row for row in ROWS}.values():
        time, height, width = load_vision(demo_folder() / row["video"], spec).grid
        assert (height * 16, width * 16) in {(128, 128), (128, 160), (160, 128), (96, 160)}
        assert time == int(row["frames"] / Fraction(row["fps"]) * 2) // 2


def test_it_thinks_only_when_it_must(reasoner):
    clip = reasoner.open(demo_folder() / ROWS[0]["video"])
    answers = [clip.ask(row["question"], options=row["options"], kind=row["kind"]) for row in ROWS[:2]]
    assert [a.text for a in answers] == [row["answer"] for row in ROWS[:2]]
    assert [a.reasoned for a in answers] == [False, True]
    assert answers[0].confidence >= 0.97
    assert answers[1].confidence < 0.7
    assert answers[1].reasoning.strip() == ROWS[1]["trace"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_figures_of_the_readme_hold(tmp_path):
    """The claims of examples/shellgame/README.md on 300 fresh clips; the seed is not the one of the published table.

    Each bound is that table's figure less what one or two questions of a group of this size are worth.
    """
    from shellgame import evaluate

    rows = evaluate.load_rows(tmp_path, seed=1, count=300)
    config = evaluate.EvalConfig(
        data=tmp_path / "clips.jsonl", output=tmp_path / "report", threshold=0.97, dtype=faster_dtype(), workers=2
    )
    table = evaluate.summarise(evaluate.measure(config, rows))
    perception, tracking = table["perception"], table["tracking"]
    assert perception["first_right"] >= 0.98
    assert perception["confidence"] >= 0.97
    assert perception["thinks"] <= 0.06
    assert tracking["first_right"] <= 0.5, "near the chance of one in three"
    assert tracking["confidence"] <= 0.4
    assert tracking["second_right"] >= 0.97
    assert tracking["thinks"] >= 0.97
    assert abs(table["even mix"]["auto_right"] - table["even mix"]["second_right"]) <= 0.01
    assert table["3:1 mix"]["think_tokens"] >= 2 * table["3:1 mix"]["auto_tokens"]
    assert table["held-out sequences"]["second_right"] >= 0.97
    assert table["longer games"]["second_right"] >= 0.92
