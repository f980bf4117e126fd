"""Readers of multiple-choice questions about videos: TVBench, STI-Bench and MMR-VBench."""

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from mlxvr.data.option_letters import letter_of
from mlxvr.data.tables import as_list, as_text
from mlxvr.data.training_sets.columns import Fields, Source, media_path, options, text
from mlxvr.data.training_sets.wording import choice, letter, plain_question
from mlxvr.errors import DataError

__all__ = ["read_mmr_vbench", "read_sti_bench", "read_tvbench"]


def read_tvbench(record: Mapping[str, Any], source: Source) -> Fields:
    """TVBench, a folder with one JSON file per task: `question`, `candidates`, `answer` (a candidate), `video`.

    The video is in a folder named after the task or, if it is not there, in the media root itself. `start` and `end`
    cut
    it if a record has them: those of action_sequence and action_localization do.
    """
    choices = options(record.get("candidates"))
    answer = as_text(record.get("answer"))
    name = media_path(record.get("video"), "video")
    video = f"{source.stem}/{name}"
    if not source.holds(video) and source.holds(name):
        video = name
    letter_by_text = letter_of(answer, choices)
    return {
        "question": plain_question(text(record, "question")),
        "options": choices,
        "answer": (choice(answer, choices) if letter_by_text == answer else letter_by_text) or None,
        "video": video,
        "start": record.get("start"),
        "end": record.get("end"),
        "category": source.stem,
    }


def read_sti_bench(record: Mapping[str, Any], source: Source) -> Fields:
    """STI-Bench: `Question`, `Candidates` (by letter), `Answer` (a letter), `Video`, `time_start`, `time_end`.

    The whole video is shown, and the question names the part that it is about, as in the public code.
    """
    question = plain_question(text(record, "Question"))
    times = [record.get(key) for key in ("time_start", "time_end")]
    if None not in times:
        question = f"From {times[0]} s to {times[1]} s. {question}"
    choices = options(record.get("Candidates"))
    return {
        "question": question,
        "options": choices,
        "answer": choice(as_text(record.get("Answer")), choices) or None,
        "video": media_path(record.get("Video"), "Video"),
        "category": as_text(record.get("Task")),
    }


def read_mmr_vbench(record: Mapping[str, Any], source: Source) -> Fields:
    """MMR-VBench: `question`, `options` (`(A) ..`; empty ones are dropped), `correctAnswer` (`(K)`), `video`."""
    listed = [option for option in as_list(record.get("options")) if not isinstance(option, str) or option.strip()]
    letters = [letter(option[:3]) if isinstance(option, str) else "" for option in listed]
    answer = as_text(record.get("correctAnswer"))
    if len(listed) > 1 and all(letters) and len(set(letters)) == len(letters) <= len(ascii_uppercase):
        if letter(answer) in letters:  # options are lettered anew, without gaps
            answer = ascii_uppercase[letters.index(letter(answer))]
        else:
            raise DataError(f"correctAnswer is {answer!r}: expected the letter of an option")
        listed = [f"({new}) {option[3:].strip()}" for new, option in zip(ascii_uppercase, listed)]
    choices = options(listed)
    return {
        "question": plain_question(text(record, "question")),
        "options": choices,
        "answer": choice(answer, choices) or None,
        "video": media_path(record.get("video"), "video"),
        "category": as_text(record.get("abilityType_L2")),
    }
