"""Prompts are measured from headers: as long as decoded frames make them, and the longest whatever comes first."""

import time

import numpy as np
import pytest
from clips import write_clip
from groups import tiny_model
from PIL import Image

from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.data.media_size import outline_row
from mlxvr.data.prefetch import load_row
from mlxvr.data.rows import Row, load_rows
from mlxvr.errors import DataError
from mlxvr.grpo import prompt_lengths
from mlxvr.grpo.prompt_lengths import measure_prompts
from mlxvr.grpo.setup import check_lengths, estimate_memory
from mlxvr.grpo.step.prompts import write_prompt
from mlxvr.grpo.train_config import TrainConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("lengths") / "m", "qwen3_vl")


def text_row(number, words=3):
    return Row(id=f"t{number}", question="why " * words, answer="A", line=f"rows.jsonl:{number + 1}")


def clip_row(path, **options):
    return Row(id=path.stem, question="What?", answer="A", video=path, line="rows.jsonl:9", **options)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Rows of every kind of medium, short and long, upright and turned, whole and cut."""
    folder = tmp_path_factory.mktemp("media")
    rows = [
        clip_row(write_clip(folder / "short.mp4", frames=20)),
        clip_row(write_clip(folder / "long.mp4", frames=150, size=(160, 96), fps=10)),
        clip_row(write_clip(folder / "turned.mp4", frames=60, size=(192, 96), rotation=90)),
        clip_row(write_clip(folder / "cut.mkv", frames=150, fps=10), start=2.0, end=9.5),
    ]
    times = np.cumsum(np.tile([1, 1, 4], 30)).tolist()
    rows.append(clip_row(write_clip(folder / "varied.mkv", frames=90, times=times)))
    frames = folder / "frames"
    frames.mkdir()
    for number in range(7):
        Image.new("RGB", (128, 96)).save(frames / f"{number}.jpg")
    rows.append(clip_row(frames, frames_fps=2.0))
    Image.new("RGB", (300, 100)).save(folder / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (300, 100)).save(folder / "turned.jpg", exif=exif)
    moving = [Image.new("RGB", (64, 64), color) for color in ("red", "green", "blue", "white")]
    moving[0].save(folder / "moving.gif", save_all=True, append_images=moving[1:], duration=500)
    for name in ("wide.png", "turned.jpg"):
        rows.append(Row(id=name, question="What?", answer="A", image=folder / name, line="rows.jsonl:9"))
    rows.append(clip_row(folder / "moving.gif"))
    return rows


def test_headers_give_the_grid_that_decoding_gives(model, media):
    for row in media:
        outlined, decoded = outline_row(row, model.spec), load_row(row, model.spec)
        assert (outlined.kind, outlined.grid) == (decoded.kind, decoded.grid), row.id
        assert len(outlined.seconds) == len(decoded.seconds)
        assert outlined.second_per_grid == pytest.approx(decoded.second_per_grid, rel=1e-3), row.id
        same = write_prompt(model, row, outlined), write_prompt(model, row, decoded)
        assert len(same[0].ids) == len(same[1].ids), row.id
    assert outline_row(text_row(0), model.spec) is None


def test_headers_are_enough_for_a_clip(model, media, monkeypatch):
    """Nothing but an animation is decoded."""
    read = []
    monkeypatch.setattr("mlxvr.data.media_size.load_row", lambda row, spec: read.append(row.id) or load_row(row, spec))
    for row in media:
        outline_row(row, model.spec)
    assert read == ["moving"]


def test_the_longest_prompt_counts_wherever_it_stands(model, media):
    """A mix that begins with text alone is not taken for text alone."""
    rows = [*map(text_row, range(12)), media[0], text_row(12), media[1]]
    found = measure_prompts(model, rows, model.spec, max_prompt_tokens=8192)
    expected = max(len(write_prompt(model, row, load_row(row, model.spec)).ids) for row in rows)
    visual = load_row(media[1], model.spec).token_count(2)
    assert (found.longest, found.visual) == (expected, visual)
    assert found.frame == visual // load_row(media[1], model.spec).grid[0]
    assert (found.measured, found.total, found.too_long) == (15, 15, ())
    assert found.describe() == f"prompts of up to {expected} tokens, {visual} visual, in all 15 rows"
    config = TrainConfig(data="d.jsonl", output="o")
    need, allowed = estimate_memory(config, model, found, len(rows))
    assert (need.workload.prompt_tokens, need.workload.visual_tokens) == (expected, visual)
    assert allowed > 0


def test_little_time_goes_to_the_likely_longest(model, media):
    rows = [*map(text_row, range(20)), media[0], text_row(20, words=90), *map(text_row, range(21, 40)), media[1]]
    largest = max(media[:2], key=lambda row: row.video.stat().st_size)
    one = measure_prompts(model, rows, model.spec, max_prompt_tokens=8192, seconds=0.0)
    assert (one.measured, one.longest) == (1, len(write_prompt(model, largest, load_row(largest, model.spec)).ids))
    assert one.describe().endswith("in 1 of 42 rows")
    assert [rows[index].id for index in list(prompt_lengths._likely_longest(rows))[:3]] == [largest.id, "t20", "short"]
    assert sorted(prompt_lengths._likely_longest(rows)) == list(range(42))


def test_the_time_is_kept_with_many_rows(model):
    rows = load_rows(demo_folder() / "clips.jsonl")
    started = time.monotonic()
    found = measure_prompts(model, rows * 200, model.spec, max_prompt_tokens=8192, seconds=0.2)
    assert time.monotonic() - started < 20  # a part of a second, and one row more; all rows would take minutes
    assert 0 < found.measured < found.total
    assert found.visual > 0


def test_prompts_that_are_too_long(model, media, tmp_path):
    rows = [text_row(0), media[0], media[1]]
    exact = [len(write_prompt(model, row, load_row(row, model.spec)).ids) for row in rows]
    limit = exact[0] + 1
    found = measure_prompts(model, rows, model.spec, max_prompt_tokens=limit)
    assert [row.id for row, _ in found.too_long] == ["short", "long"]
    assert found.longest == limit
    config = TrainConfig(data="d.jsonl", output=tmp_path / "run", max_prompt_tokens=limit)
    told = f"the prompt has {exact[1]} tokens, .* the limit is {limit}: raise --max-prompt-tokens, or lower --video"
    with pytest.raises(DataError, match=told + r".*\(2 rows have such a prompt\); --skip-bad-rows leaves"):
        check_lengths(config, model, found, model.spec)
    skipping = TrainConfig(data="d.jsonl", output=tmp_path / "run", max_prompt_tokens=limit, skip_bad_rows=True)
    assert check_lengths(skipping, model, found, model.spec).startswith("2 of 3 rows have prompts that are too long")
    all_long = measure_prompts(model, rows[1:], model.spec, max_prompt_tokens=limit)
    with pytest.raises(DataError, match=r"all 2 rows have prompts that are too long; the first: rows\.jsonl:9"):
        check_lengths(skipping, model, all_long, model.spec)
