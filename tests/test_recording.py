"""README's picture shows what the demo prints; the script beside it draws it."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
SVG = "{http://www.w3.org/2000/svg}"
CONFIDENCE = re.compile(r"^(confidence +)(\d\.\d+) ([█░]+)", re.MULTILINE)


@pytest.fixture(scope="module")
def picture():
    return ElementTree.fromstring((ROOT / "examples" / "demo.svg").read_text(encoding="utf-8"))


def without_measurements(transcript):
    """The printed text without seconds, memory, and confidence, which differ between machines; and the confidences."""
    text = re.sub(r"in [\d.]+ s;|peak memory [\d,]+ MiB", "", CONFIDENCE.sub(r"\1", transcript))
    return text, [float(number) for _, number, _ in CONFIDENCE.findall(transcript)]


def test_the_picture_shows_what_the_demo_prints(picture, capsys):
    from mlxvr import generate

    assert generate.main([]) == 0
    text, confidences = without_measurements(capsys.readouterr().out)
    shown_text, shown_confidences = without_measurements(picture.find(f"{SVG}desc").text)
    assert shown_text == text
    assert "answer      C" in text
    assert shown_confidences == pytest.approx(confidences, abs=0.05)
    assert len(confidences) == 2


def test_what_is_drawn_is_the_transcript(picture):
    drawn = "".join(text.text for text in picture.iter(f"{SVG}text") if text.get("class") != "time")
    transcript = picture.find(f"{SVG}desc").text
    assert re.sub(r"\s", "", drawn) == re.sub(r"\s", "", f"$ python -m mlxvr.generate {transcript}")


def test_nothing_is_drawn_beyond_the_edge(picture):
    width, height = (float(picture.get(name)) for name in ("width", "height"))
    for text in picture.iter(f"{SVG}text"):
        assert 0 <= float(text.get("x")) + float(text.get("textLength", 0)) <= width
        assert 0 < float(text.get("y")) < height


def test_the_script_draws_it(picture):
    """But for the frames, which need the clip's pixels."""
    import make_recording

    transcript = picture.find(f"{SVG}desc").text
    times = [text.text for text in picture.iter(f"{SVG}text") if text.get("class") == "time"]
    assert times == [f"{seconds} s" for seconds in re.findall(r"At ([\d.]+) seconds", transcript)]
    assert len(list(picture.iter(f"{SVG}image"))) == len(times)
    redrawn = ElementTree.fromstring(make_recording.draw(transcript, []))
    shown = [text.text for text in picture.iter(f"{SVG}text") if text.get("class") != "time"]
    assert [text.text for text in redrawn.iter(f"{SVG}text")] == shown


def test_a_long_line_is_wrapped_as_a_terminal_does():
    import make_recording

    drawn, _ = make_recording.draw_line("reasoning   " + "a" * (make_recording.COLUMNS - 12) + "b", 0.0)
    texts = [ElementTree.fromstring(text) for text in drawn]
    assert [text.text for text in texts] == ["reasoning", "a" * (make_recording.COLUMNS - 12), "b"]
    assert [float(text.get("y")) for text in texts] == [0.0, 0.0, make_recording.LINE]
