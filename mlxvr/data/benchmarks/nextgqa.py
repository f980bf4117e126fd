"""NExT-GQA, test: causal and temporal questions, each with the moments of the video that show the answer.

Files, as the authors' repository `doc-doc/NExT-GQA` has them under datasets/nextgqa:

    test.csv                      video_id, question, answer, qid, type (CW, CH, TN, TC, TP), a0 .. a4
                                  (answer: the text of a choice; a number or `a3` is accepted too)
    gsub_test.json                {video_id: {"duration", "location": {qid: [[start, end], ..]}}}
    map_vid_vidorID.json          {video_id: "1164/3238737531"}: the path of the video
    NExTVideo/1164/3238737531.mp4 (or videos/), from NExT-QA

`task` is the type. Points among the moments are left out; a question without a moment is skipped.
"""

from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mlxvr.data.benchmarks.entries import Entry
from mlxvr.data.benchmarks.files import Folder
from mlxvr.data.option_letters import letter_of
from mlxvr.data.tables import as_text, read_records, segments

__all__ = ["read"]

_VIDEOS = ("NExTVideo", "videos", ".")
_PLACES = ("{}", "nextgqa/{}", "datasets/nextgqa/{}")
_CHOICES = ("a0", "a1", "a2", "a3", "a4")


def read(folder: Folder, *, subtitles: bool) -> Iterator[Entry]:
    """Yield the questions."""
    questions, moments, places = (
        _file(folder, name) for name in ("test.csv", "gsub_test.json", "map_vid_vidorID.json")
    )
    grounded = {as_text(record["key"]): record.get("location") or {} for record in read_records(moments)}
    paths = folder.mapping(places)
    for line, record in folder.table(questions):
        video, number = as_text(record.get("video_id")), as_text(record.get("qid"))
        options = [as_text(record.get(choice)) for choice in _CHOICES]
        intervals = segments(grounded.get(video, {}).get(number) or [None])
        row = {
            "id": f"{video}_{number}",
            "question": record.get("question"),
            "options": options,
            "answer": [_answer(as_text(record.get("answer")), options), intervals],
            "kind": "gqa",
            "task": record.get("type"),
        }
        problem = "" if intervals else f"{moments.name} holds no moment of video {video}, question {number}"
        video_name = f"{paths.get(video, video)}.mp4"
        yield Entry(line, row, video_name, folder.find(video_name, _VIDEOS), problem)


def _file(folder: Folder, name: str) -> Path:
    return folder.files(*(place.format(name) for place in _PLACES))[0]


def _answer(answer: str, options: list[str]) -> Any:
    """Return the letter of an answer that is a choice's text, its column or its number; else the answer itself."""
    letter = letter_of(answer, options)
    number = answer.removeprefix("a")
    if letter == answer and number.isdecimal() and int(number) < len(options):
        return ascii_uppercase[int(number)]
    return letter
