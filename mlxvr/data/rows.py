"""A dataset: JSONL, one question a line, read by evaluation and by training alike.

    {"id": "a1", "video": "clips/a.mp4", "question": "Which cup?", "options": ["left", "right"], "answer": "B"}
    {"id": "a2", "video": "clips/a.mp4", "question": "the ball is seen.", "answer": [0.3, 4.5], "kind": "iou"}
    {"id": "a3", "video": "clips/a.mp4", "question": "Which color?", "options": ["red", "blue"], "kind": "gqa",
     "answer": {"answer": "A", "segments": [[0.3, 4.5]]}}
    {"id": "m1", "question": "What is 2 + 2?", "answer": "4", "kind": "math"}

Fields. `id`, `question` and `answer` are needed; `video` or `image` names a file (neither: a text-only question);
`kind` says how an answer is judged and so which prompt is used:

    exact_match   a word, a number as text, or with options one of them: its letter, its text or both (the kind of a
                  row that names none)
    math          an expression, compared symbolically; with options as exact_match
    iou           `[start, end]` or a list of such, in seconds
    gqa           both: `{"answer": .., "segments": [[start, end], ..]}`, `["B", [[start, end], ..]]`, or as text
                  `B <> [0.3, 4.5]`

The names that `Clip.ask` has for them (`qa`, `grounding`, `grounded_qa`) are understood too. `start` and `end` cut a
video, in seconds. `task` and `category` group rows in a report (`about` and `group`, as the bundled clips say, stand in
for them), `pair` joins the rows of a minimal pair, `subtitles` is text that goes before the question, `frames_fps` says
that `video` is a folder of frames taken at that rate, `response_prefix` is text that the answer is begun with. Other
keys are ignored.

A row is refused, with file and line, when it could only be misread. Media paths are relative to the file and may not
leave its folder, symlinks followed; a media root moves that border: paths are then relative to it, may be absolute
inside it, and links in it are the user's own and are followed.

Pure Python: neither media nor models are touched, so a missing video is found only when it is opened.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, TypeAlias, get_args

from mlxvr.errors import DataError, MediaError
from mlxvr.storage.paths import list_frames, local_path, parse_location

__all__ = [
    "Answer",
    "Kind",
    "Row",
    "load_rows",
    "make_locator",
    "make_row",
    "parse_line",
    "read_lines",
    "scan_rows",
    "strip_letters",
    "to_record",
]

Kind = Literal["exact_match", "math", "iou", "gqa"]
Answer: TypeAlias = str | list[Any]

_ASK_KINDS = {"exact_match": "qa", "math": "qa", "iou": "grounding", "gqa": "grounded_qa"}
_ALIASES = {"qa": "exact_match", "grounding": "iou", "grounded_qa": "gqa"}
_OPTIONAL = (
    "options",
    "start",
    "end",
    "frames_fps",
    "task",
    "category",
    "pair",
    "subtitles",
    "response_prefix",
)
_LETTER = re.compile(r"\(?([A-Z])(?:\)|[.:)]\s.*|[.:]|$)", re.DOTALL)
_SUBTITLES = "This video's subtitles are listed below:"  # Video-MME's own words


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question of a dataset; `load_rows` makes valid ones.

    Attributes:
        id: unique in its dataset.
        question: without options and without the words that ask for a box.
        answer: what is right: a text, of options the letter; for "iou" a list of [start, end]; for "gqa"
            [text, list of [start, end]]; None: the row has no label.
        kind: how an answer is judged.
        video: a file, or a folder of frames (`frames_fps`).
        image: a file; with neither video nor image the question is text alone.
        options: the choices, without letters.
        start, end: the part of the video that is shown, in seconds; None: from the beginning, to the end.
        frames_fps: of a folder of frames; None: `video` is a file.
        task, category: what a report groups by.
        pair: rows of one minimal pair share it; "" is no pair.
        subtitles: what is said in the video; "" adds nothing.
        response_prefix: how the answer is begun for the model, before it writes; "" leaves that to the model.
        media: the video's or image's path as the file gives it; "" without one.
        line: "file:line", for messages.
    """

    id: str
    question: str
    answer: Answer | None
    kind: Kind = "exact_match"
    video: Path | None = None
    image: Path | None = None
    options: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None
    frames_fps: float | None = None
    task: str = ""
    category: str = ""
    pair: str = ""
    subtitles: str = ""
    response_prefix: str = ""
    media: str = ""
    line: str = ""

    @property
    def ask_kind(self) -> Literal["qa", "grounding", "grounded_qa"]:
        """The kind of question that the row is for `Clip.ask`."""
        return _ASK_KINDS[self.kind]  # type: ignore[return-value]

    @property
    def text(self) -> str:
        """The question as it is asked: after the subtitles, if there are any."""
        return f"{_SUBTITLES}\n{self.subtitles}\n{self.question}" if self.subtitles else self.question

    def source(self) -> Path | list[Path] | None:
        """What to open: a file, the frames of a folder in natural order (1, 2, .., 10), or None for text alone.

        Raises `DataError` if a folder of frames holds none.
        """
        if self.video is None or self.frames_fps is None:
            if self.video is not None and self.video.is_dir():
                raise DataError(f"{self.line}: {self.video} is a folder: say its frames' rate with 'frames_fps'")
            return self.video or self.image
        frames = list_frames(self.video) if self.video.is_dir() else []
        if not frames:
            raise DataError(f"{self.line}: {self.video} is no folder of jpg or png frames: unpack it again")
        return frames


def load_rows(
    path: str | Path, *, media_root: Path | None = None, labelled: bool = True, bad_rows: list[DataError] | None = None
) -> list[Row]:
    """Read a dataset.

    Args:
        path: a JSONL file, UTF-8; empty lines are skipped.
        media_root: the folder that holds the media (see above); None: the file's own.
        labelled: whether every row needs an answer.
        bad_rows: gets the error of every row that cannot be used, instead of the first being raised; its length is
            their count.

    Raises `DataError`: the file cannot be read or holds no row; or, without `bad_rows`, a row cannot be used.
    """
    rows = []
    for found in scan_rows(path, media_root=media_root, labelled=labelled):
        if isinstance(found, Row):
            rows.append(found)
        elif bad_rows is None:
            raise found
        else:
            bad_rows.append(found)
    if not rows:
        raise DataError(f"{path} holds no {'usable ' if bad_rows else ''}row: give a JSONL file, one question a line")
    return rows


def scan_rows(path: str | Path, *, media_root: Path | None = None, labelled: bool = True) -> Iterator[Row | DataError]:
    """Yield each row of a dataset, or what is wrong with it; arguments and errors of the file are `load_rows`'."""
    path = Path(path)
    locate = make_locator(path.parent, media_root)
    seen: dict[str, str] = {}
    for number, raw in enumerate(read_lines(path), start=1):
        if not raw.strip():
            continue
        line = f"{path}:{number}"
        try:
            row = make_row(parse_line(raw, line), line=line, locate=locate, labelled=labelled)
            if row.id in seen:
                raise DataError(f"{line}: the id {row.id!r} is that of {seen[row.id]} already: give every row its own")
        except DataError as error:
            yield error
        else:
            seen[row.id] = line
            yield row


def make_row(record: Mapping[str, Any], *, line: str, locate: Callable[[str], Path], labelled: bool = True) -> Row:
    """Check one row and build it.

    Args:
        record: the fields, see above.
        line: "file:line", for messages.
        locate: from a media path as written to the file; raises `DataError` (without the line) if it may not be used.
        labelled: whether an answer is needed.

    Raises `DataError`: a field is missing or cannot be used; the message begins with the line.
    """
    try:
        return _Checker(record).row(line, locate, labelled)
    except DataError as error:
        raise DataError(f"{line}: {error}") from None


def to_record(row: Row, *, media: str) -> dict[str, Any]:
    """The fields of a row as a line of a dataset has them; `make_row` builds the same row from it.

    Args:
        row: to be written.
        media: the path of its video or image, as the new file is to give it.
    """
    record: dict[str, Any] = {"id": row.id}
    if row.video is not None or row.image is not None:
        record["image" if row.video is None else "video"] = media
    record["question"] = row.question
    if row.answer is not None:
        record["answer"] = row.answer
    record["kind"] = row.kind
    for name in _OPTIONAL:
        value = getattr(row, name)
        if value not in (None, "", ()):
            record[name] = list(value) if name == "options" else value
    return record


def make_locator(folder: Path, media_root: Path | None) -> Callable[[str], Path]:
    """The rule for media paths of a file in `folder`: from a path as written to the file that it names.

    Raises `DataError`, when called, for a path that may not be used.
    """

    def locate(text: str) -> Path:
        try:
            path = parse_location(text)
        except MediaError as error:
            raise DataError(str(error)) from None
        if media_root is not None:
            root = Path(os.path.abspath(media_root))
            path = Path(os.path.normpath(root / path))
            if not path.is_relative_to(root):
                raise DataError(
                    f"{text!r} leaves the media root {root}: give a media root (--media-root) that holds it"
                )
            return local_path(path)
        if path.is_absolute():
            raise DataError(
                f"{text!r} is an absolute path: make it relative to the file, or give a media root (--media-root)"
            )
        found = local_path(folder / path)  # perhaps another spelling, and that one a link
        if not found.resolve().is_relative_to(folder.resolve()):
            raise DataError(
                f"{text!r} leaves the folder of the file: move the media there, or give a media root (--media-root)"
            )
        return found

    return locate


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file as they are on disk; raises `DataError` if it cannot be read."""
    if path.is_dir():
        raise DataError(f"{path} is a folder: give a JSONL file, one question a line")
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def parse_line(raw: bytes, line: str) -> Mapping[str, Any]:
    """A line as a JSON object; raises `DataError` beginning with `line` ("file:line") if it is none."""
    try:
        text = raw.decode("utf-8-sig")
        record = json.loads(text)
        if "\\ud" in text.lower():  # half of a surrogate pair, spelt out, could not be written to any file
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeError:
        raise DataError(f"{line}: the line is not UTF-8: save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is too deep or holds too long a number"
        raise DataError(f"{line}: the line is not JSON ({reason}): write one JSON object a line") from None
    if not isinstance(record, dict):
        raise DataError(f"{line}: the line holds {_show(record)}: expected a JSON object, {{...}}")
    return record


def strip_letters(options: Sequence[str]) -> list[str]:
    """Options without the letters that some files write before them (`A. red`), if each has its own."""
    marks = [re.match(rf"\s*\(?{letter}[.:)]\s*", option) for letter, option in zip(ascii_uppercase, options)]
    if len(marks) < len(options) or not all(mark and mark.end() < len(o) for mark, o in zip(marks, options)):
        return list(options)
    return [option[mark.end() :] for mark, option in zip(marks, options) if mark]


@dataclass(frozen=True)
class _Checker:
    """Reads the fields of one row; every complaint says what was found and what to write."""

    record: Mapping[str, Any]

    def row(self, line: str, locate: Callable[[str], Path], labelled: bool) -> Row:
        number = self.record.get("id")
        name = str(number) if isinstance(number, int) and not isinstance(number, bool) else self.text("id", needed=True)
        question = self.text("question", needed=True)
        kind = self.kind()
        options = self.options(kind)
        if options and kind == "math":
            kind = "exact_match"  # a letter is no formula
        video, image = self.text("video"), self.text("image")
        if video and image:
            raise DataError("the row has both a video and an image: keep one")
        if kind in ("iou", "gqa") and not video:
            raise DataError(f"a row of kind {kind} is about times in a video, and there is none: add 'video'")
        start, end = self.seconds("start", video), self.seconds("end", video)
        if end is not None and end <= (start or 0.0):
            raise DataError(f"end {end:g} is not after start {start or 0.0:g}: give them in seconds and in order")
        frames_fps = self.seconds("frames_fps", video)
        if frames_fps == 0:
            raise DataError("frames_fps is 0: give the frames per second of the folder")
        return Row(
            id=name,
            question=question,
            answer=self.answer(kind, options, labelled),
            kind=kind,
            video=locate(video) if video else None,
            image=locate(image) if image else None,
            options=options,
            start=start,
            end=end,
            frames_fps=frames_fps,
            task=self.text("task") or self.text("about"),
            category=self.text("category") or self.text("group"),
            pair=self.text("pair"),
            subtitles=self.text("subtitles"),
            response_prefix=self.text("response_prefix"),
            media=video or image,
            line=line,
        )

    def text(self, key: str, *, needed: bool = False) -> str:
        value = self.record.get(key)
        if value is None and not needed:
            return ""
        if key not in self.record:
            raise DataError(f"the field {key!r} is missing: every row needs one")
        if not isinstance(value, str):
            raise DataError(f"{key} is {_show(value)}: expected a text")
        if needed and not value.strip():
            raise DataError(f"{key} is empty: expected a text")
        return value

    def kind(self) -> Kind:
        value = self.record.get("kind")
        value = "exact_match" if value is None else value
        value = _ALIASES.get(value, value) if isinstance(value, str) else value
        if value not in get_args(Kind):
            raise DataError(f"kind {_show(value)} is unknown: use one of {', '.join(get_args(Kind))}")
        return value  # type: ignore[return-value]

    def options(self, kind: Kind) -> tuple[str, ...]:
        value = self.record.get("options")
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(isinstance(one, str) and one.strip() for one in value):
            raise DataError(f"options are {_show(value)}: expected a list of texts, none of them empty")
        if len(value) > len(ascii_uppercase):
            raise DataError(f"{len(value)} options are more than there are letters: give at most 26")
        if value and kind == "iou":
            raise DataError("a row of kind iou has no options: leave them out, or use the kind gqa")
        return tuple(value)

    def seconds(self, key: str, video: str) -> float | None:
        value = self.record.get(key)
        if value is None:
            return None
        if not _is_number(value) or value < 0:
            raise DataError(f"{key} is {_show(value)}: expected a number from 0 on")
        if not video:
            raise DataError(f"{key} is for videos, and the row has none: leave it out")
        return float(value)

    def answer(self, kind: Kind, options: tuple[str, ...], labelled: bool) -> Answer | None:
        value = self.record.get("answer")
        if value is None and not labelled:
            return None
        if value is None:
            raise DataError("the field 'answer' is missing: every row needs one")
        if kind == "iou":
            return _segments(value)
        if kind == "gqa":
            return _grounded_answer(value, options)
        return _text_answer(value, options)


def _text_answer(value: Any, options: tuple[str, ...]) -> str:
    text = str(value) if _is_number(value) else value
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"answer is {_show(value)}: expected a text, such as 'B' or '42'")
    text = text.strip()
    letter = _choice(text, options) if options else text
    if not letter:
        last = ascii_uppercase[len(options) - 1]
        raise DataError(f"answer {_show(value)} is none of the {len(options)} options: give a letter from A to {last}")
    return letter


def _choice(text: str, options: tuple[str, ...]) -> str:
    """The letter of the option that an answer names: by its letter alone, by its text, or by both; "" for none."""
    match = _LETTER.match(text)
    letter = match.group(1) if match and match.group(1) in ascii_uppercase[: len(options)] else ""
    plain = [option.strip().casefold() for option in options]
    if text.casefold() in plain and text.strip("(.:)") != letter:
        return ascii_uppercase[plain.index(text.casefold())]
    return letter


def _segments(value: Any) -> list[list[float]]:
    """One interval or several, as lists of numbers or as such written in a text, in one form."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError:
            found = None
    if isinstance(found, list | tuple) and len(found) == 2 and all(_is_number(one) for one in found):
        found = [found]
    if not isinstance(found, list | tuple) or not found or not all(_is_interval(one) for one in found):
        raise DataError(
            f"answer is {_show(value)}: expected [start, end] in seconds, start before end, or a list of such"
        )
    return [[float(start), float(end)] for start, end in found]


def _grounded_answer(value: Any, options: tuple[str, ...]) -> list[Any]:
    """[answer, segments], from any of the forms."""
    if isinstance(value, str) and value.count("<>") == 1:
        text, _, segments = (part.strip() for part in value.partition("<>"))
    elif isinstance(value, Mapping) and {"answer", "segments"} <= value.keys():
        text, segments = value["answer"], value["segments"]
    elif isinstance(value, list | tuple) and len(value) == 2:
        text, segments = value
    else:
        raise DataError(
            f"answer is {_show(value)}: expected {{'answer': .., 'segments': [[start, end]]}} or 'B <> [start, end]'"
        )
    return [_text_answer(text, options), _segments(segments)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_interval(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(_is_number(one) for one in value):
        return False
    return bool(0 <= value[0] < value[1])


def _show(value: Any) -> str:
    """A value for a message: on one line and not too long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
