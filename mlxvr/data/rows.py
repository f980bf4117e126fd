"""Datasets as JSONL files with one question per line, for evaluation and training alike.

    {"id": "a1", "video": "clips/a.mp4", "question": "Which cup?", "options": ["left", "right"], "answer": "B"}
    {"id": "a2", "video": "clips/a.mp4", "question": "the ball is seen.", "answer": [0.3, 4.5], "kind": "iou"}
    {"id": "a3", "video": "clips/a.mp4", "question": "Which color?", "options": ["red", "blue"], "kind": "gqa",
     "answer": {"answer": "A", "segments": [[0.3, 4.5]]}}
    {"id": "m1", "question": "What is 2 + 2?", "answer": "4", "kind": "math"}

Fields. `id`, `question` and `answer` are required. `video` or `image` names a file; without either, the question is
text alone. `kind` decides how an answer is judged, and so which prompt is used:

    exact_match   a word, a number as text, or with options one of them: its letter, its text or both. This is the kind
                  of rows without `kind`
    math          an expression, compared symbolically; with options the same as exact_match
    iou           `[start, end]` or a list of such, in seconds
    gqa           both: `{"answer": .., "segments": [[start, end], ..]}`, `["B", [[start, end], ..]]`, or as text
                  `B <> [0.3, 4.5]`

`Clip.ask`'s names of the kinds (`qa`, `grounding`, `grounded_qa`) are accepted too. `start` and `end` cut a video, in
seconds. `task` and `category` group rows in a report (without them `about` and `group`, the names in the bundled
clips' file, are used). `pair` joins the rows of a minimal pair. `subtitles` is text to put before the question.
`frames_fps` means that `video` is a folder of frames, taken at that rate. `response_prefix` is the text that the
response starts with. Other keys are ignored.

A row that could be misread is refused, with its file and line. Media paths are relative to the file and may not leave
its folder, with symlinks followed. A media root replaces that folder: paths are then relative to the root and may be
absolute inside it, and symlinks in it are followed wherever they lead, since the user chose the root.

This module is pure Python and opens no media, so a missing video is found only when it is opened.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlxvr.data.jsonl import parse_line, read_lines
from mlxvr.data.row_fields import GradingKind, GroundTruth, RowFields
from mlxvr.errors import DataError, MediaError
from mlxvr.storage.paths import list_frames, local_path, parse_location

__all__ = ["Row", "load_rows", "make_locator", "make_row", "scan_rows", "to_record"]

_ASK_KINDS = {"exact_match": "qa", "math": "qa", "iou": "grounding", "gqa": "grounded_qa"}
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
_SUBTITLES = "This video's subtitles are listed below:"  # Video-MME's own words


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question of a dataset; `load_rows` makes valid ones.

    Attributes:
        id: unique in its dataset.
        question: the question without its options and without the words that ask for a box.
        answer: the ground truth: a text, or with options the letter; for "iou" a list of [start, end]; for "gqa"
            [text, list of [start, end]]; None: the row has no label.
        kind: how an answer is judged.
        video: a file, or a folder of frames (with `frames_fps`).
        image: a file; with neither video nor image the question is text alone.
        options: the choices, with or without their letters.
        start, end: the part of the video to show, in seconds; None: from the beginning, or to the end.
        frames_fps: the rate of a folder of frames; None: `video` is a file.
        task, category: the groups of a report that the row belongs to.
        pair: a name that the rows of a minimal pair share; "": the row has no pair.
        subtitles: the words spoken in the video; "" adds nothing.
        response_prefix: the text that the model's response is made to start with; "": none.
        media: the video's or image's path as the file writes it; "" without one.
        line: "file:line", for messages.
    """

    id: str
    question: str
    answer: GroundTruth | None
    kind: GradingKind = "exact_match"
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
        """`Clip.ask`'s name of the row's kind."""
        return _ASK_KINDS[self.kind]  # type: ignore[return-value]

    @property
    def text(self) -> str:
        """The question as the model gets it: after the subtitles, if there are any."""
        return f"{_SUBTITLES}\n{self.subtitles}\n{self.question}" if self.subtitles else self.question

    def source(self) -> Path | list[Path] | None:
        """Return what to open: a file, a folder's frames in natural order (1, 2, .., 10), or None for text alone.

        Raises `DataError` if the folder holds no frames, or if `video` is a folder without `frames_fps`.
        """
        if self.video is None or self.frames_fps is None:
            if self.video is not None and self.video.is_dir():
                raise DataError(f"{self.line}: {self.video} is a folder: give the rate of its frames as 'frames_fps'")
            return self.video or self.image
        frames = list_frames(self.video) if self.video.is_dir() else []
        if not frames:
            raise DataError(f"{self.line}: {self.video} is not a folder of jpg or png frames: unpack it again")
        return frames


def load_rows(
    path: str | Path, *, media_root: Path | None = None, labelled: bool = True, bad_rows: list[DataError] | None = None
) -> list[Row]:
    """Read a dataset.

    Args:
        path: a JSONL file in UTF-8; empty lines are skipped.
        media_root: the folder that holds the media (see above); None: the folder of the file.
        labelled: whether every row needs an answer.
        bad_rows: a list that the error of every unusable row is added to; None: the first such error is raised.

    Raises `DataError`: the file cannot be read or holds no row; or, without `bad_rows`, a row cannot be used.
    """
    rows = []
    for row in scan_rows(path, media_root=media_root, labelled=labelled):
        if isinstance(row, Row):
            rows.append(row)
        elif bad_rows is None:
            raise row
        else:
            bad_rows.append(row)
    if not rows:
        usable = "usable " if bad_rows else ""
        raise DataError(f"{path} holds no {usable}row: give a JSONL file with one question per line")
    return rows


def scan_rows(path: str | Path, *, media_root: Path | None = None, labelled: bool = True) -> Iterator[Row | DataError]:
    """Yield each row of a dataset, or its error; takes the arguments of `load_rows`, and raises its file errors."""
    path = Path(path)
    locate = make_locator(path.parent, media_root)
    places: dict[str, str] = {}
    for number, raw in enumerate(read_lines(path), start=1):
        if not raw.strip():
            continue
        line = f"{path}:{number}"
        try:
            row = make_row(parse_line(raw, line), line=line, locate=locate, labelled=labelled)
            if row.id in places:
                raise DataError(f"{line}: {places[row.id]} has the id {row.id!r} too: give every row an id of its own")
        except DataError as error:
            yield error
        else:
            places[row.id] = line
            yield row


def make_row(record: Mapping[str, Any], *, line: str, locate: Callable[[str], Path], labelled: bool = True) -> Row:
    """Check the fields of one row and build it.

    Args:
        record: the fields, see above.
        line: "file:line", for messages.
        locate: maps a written media path to the file; raises `DataError` (without the line) for a forbidden path.
        labelled: whether an answer is required.

    Raises `DataError`: a field is missing or cannot be used; the message begins with the line.
    """
    try:
        return _build_row(RowFields(record), line, locate, labelled)
    except DataError as error:
        raise DataError(f"{line}: {error}") from None


def _build_row(fields: RowFields, line: str, locate: Callable[[str], Path], labelled: bool) -> Row:
    identity, question, kind = fields.identity(), fields.text("question", required=True), fields.kind()
    options = fields.options(kind)
    if options and kind == "math":
        kind = "exact_match"  # a letter is not a formula
    video, image = fields.text("video"), fields.text("image")
    if video and image:
        raise DataError("the row has both a video and an image: keep one")
    if kind in ("iou", "gqa") and not video:
        raise DataError(f"a row of kind {kind} is about times in a video, and there is none: add 'video'")
    start, end = fields.seconds("start", video), fields.seconds("end", video)
    if end is not None and end <= (start or 0.0):
        raise DataError(f"end {end:g} is not after start {start or 0.0:g}: give them in seconds and in order")
    frames_fps = fields.seconds("frames_fps", video)
    if frames_fps == 0:
        raise DataError("frames_fps is 0: give the frames per second of the folder")
    return Row(
        id=identity,
        question=question,
        answer=fields.answer(kind, options, labelled),
        kind=kind,
        video=locate(video) if video else None,
        image=locate(image) if image else None,
        options=options,
        start=start,
        end=end,
        frames_fps=frames_fps,
        task=fields.text("task") or fields.text("about"),
        category=fields.text("category") or fields.text("group"),
        pair=fields.text("pair"),
        subtitles=fields.text("subtitles"),
        response_prefix=fields.text("response_prefix"),
        media=video or image,
        line=line,
    )


def to_record(row: Row, *, media: str) -> dict[str, Any]:
    """Return a row as the fields of a dataset's line; `make_row` builds the same row from them.

    Args:
        row: the row to write.
        media: the path of its video or image for the new file.
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
    """Return the function that maps a media path written in a file in `folder` to the media file.

    The function raises `DataError` for a forbidden path.
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
                    f"{text!r} leaves the media root {root}: give a media root (--media-root or media_root=) that "
                    "holds it"
                )
            return local_path(path)
        if path.is_absolute():
            raise DataError(
                f"{text!r} is an absolute path: make it relative to the file, or give a media root (--media-root "
                "or media_root=)"
            )
        file = local_path(folder / path)  # it may be another spelling of the name, and that file a symlink
        if not file.resolve().is_relative_to(folder.resolve()):
            raise DataError(
                f"{text!r} leaves the folder of the file: move the media there, or give a media root (--media-root "
                "or media_root=)"
            )
        return file

    return locate
