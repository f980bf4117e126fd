"""Draw `examples/demo.svg`, the picture in README: a real run of `python -m mlxvr.generate`, and frames of its clip.

    python examples/make_recording.py

The text is what the command printed, character for character; it is also the picture's `desc`, for those who do not see
it. The frames are those that the model was given, at the times that its reasoning names.
"""

import base64
import io
import json
import re
import subprocess
import sys
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

import mlxvr
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.media import read_video

COMMAND = "python -m mlxvr.generate"
PICTURE = Path(__file__).with_name("demo.svg")

COLUMNS, CHARACTER, LINE = 116, 8.0, 19.0  # characters of a row; pixels of a character and of a line
MARGIN, TITLE_BAR, FRAME = 20.0, 34.0, 118.0  # pixels; a frame is square
COLORS = {"text": "#d8dee9", "label": "#7d8899", "sure": "#8fc97a", "unsure": "#e5b567", "answer": "#ffffff"}
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def run_demo() -> str:
    """What the command prints."""
    done = subprocess.run([sys.executable, *COMMAND.split()[1:]], capture_output=True, text=True, check=True)
    return done.stdout


def demo_frames(transcript: str) -> list[tuple[float, Image.Image]]:
    """The sampled frames at the times that the reasoning names, with their seconds."""
    row = json.loads((demo_folder() / "clips.jsonl").read_text(encoding="utf-8").splitlines()[0])
    with mlxvr.load() as reasoner:
        frames = read_video(demo_folder() / row["video"], reasoner.spec)
    times = [float(seconds) for seconds in re.findall(r"At ([\d.]+) seconds", transcript)]
    nearest = [int(np.abs(np.asarray(frames.seconds) - seconds).argmin()) for seconds in times]
    return [(seconds, Image.fromarray(frames.pixels[index])) for seconds, index in zip(times, nearest)]


def colored_parts(line: str) -> list[tuple[str, str]]:
    """A printed line as (text, name of its color)."""
    label, rest = (line[:12], line[12:]) if re.match(r"\w+ +", line[:12]) else ("", line)
    color = "text"
    if label.startswith("confidence"):
        color = "unsure" if "not sure" in rest else "sure"
    elif label.startswith(("answer", "first", "question")):
        color = "answer"
    elif not label:
        color = "label" if "tokens in" in rest else "text"
    return [(label, "label"), (rest, color)]


def draw_line(line: str, y: float) -> tuple[list[str], float]:
    """A printed line as SVG, wrapped as a terminal wraps it, and where the next line begins."""
    cells = [(character, color) for text, color in colored_parts(line) for character in text]
    drawn = []
    for start in range(0, max(1, len(cells)), COLUMNS):
        row, x = cells[start : start + COLUMNS], 0
        while x < len(row):
            end = next((place for place in range(x, len(row)) if row[place][1] != row[x][1]), len(row))
            text = "".join(character for character, _ in row[x:end])
            begin = len(text) - len(text.lstrip())
            if text.strip():
                left, width = MARGIN + (x + begin) * CHARACTER, len(text.strip()) * CHARACTER
                drawn.append(
                    f'<text x="{left:g}" y="{y:g}" textLength="{width:g}" fill="{COLORS[row[x][1]]}">'
                    f"{escape(text.strip())}</text>"
                )
            x = end
        y += LINE
    return drawn, y


def draw(transcript: str, frames: list[tuple[float, Image.Image]]) -> str:
    """The picture: a terminal window with the frames above the text."""
    width = 2 * MARGIN + COLUMNS * CHARACTER
    body, y = [], TITLE_BAR + 16.0
    for number, (seconds, frame) in enumerate(frames):
        x = MARGIN + number * (FRAME + 22.0)
        data = io.BytesIO()
        frame.save(data, "JPEG", quality=88)
        encoded = base64.b64encode(data.getvalue()).decode()
        body.append(
            f'<image x="{x:g}" y="{y:g}" width="{FRAME:g}" height="{FRAME:g}" href="data:image/jpeg;base64,{encoded}"/>'
        )
        body.append(
            f'<text class="time" x="{x:g}" y="{y + FRAME + 17:g}" fill="{COLORS["label"]}">{seconds:g} s</text>'
        )
    y += FRAME + 46.0 if frames else LINE
    for line in [f"$ {COMMAND}", *transcript.rstrip("\n").split("\n")]:
        drawn, y = draw_line(line, y)
        body += drawn
    height = y + 4.0
    dots = "".join(
        f'<circle cx="{22 + 18 * n}" cy="17" r="5.5" fill="{c}"/>'
        for n, c in enumerate(("#ec6a5e", "#f4bf4f", "#61c554"))
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" font-family="{FONT}" font-size="13" role="img">',
            f"<title>{escape(COMMAND)}</title>",
            f"<desc>{escape(transcript)}</desc>",
            f'<rect width="{width:g}" height="{height:g}" rx="9" fill="#1d2129"/>',
            dots,
            *body,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    printed = run_demo()
    PICTURE.write_text(draw(printed, demo_frames(printed)), encoding="utf-8")
