"""Multiple choice about videos: TVBench, STI-Bench and MMR-VBench."""

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from mlxvr.data.tables import as_list, as_text, letter_of
from mlxvr.data.training_sets.columns import Fields, Source, media_path, options, text
from mlxvr.data.training_sets.wording import choice, letter, plain_question
from mlxvr.errors import DataError

__all__ = ["read_mmr_vbench", "read_sti_bench", "read_tvbench"]


def read_tvbench(record: Mapping[str, Any], source: Source) -> Fields:
    """TVBench, a folder of one JSON file a task: `question`, `candidates`, `answer` (a candidate), `video`.

    The video lies in a folder of the task's name, or, if it is not there, beside the other tasks'. `start` and `end`
    cut it where a record has them: of action_sequence and action_localization.
    """
    given = options(record.get("candidates"))
    answer = as_text(record.get("answer"))
    name = media_path(record.get("video"), "video")
    video = f"{source.stem}/{name}"
    if not source.holds(video) and source.holds(name):
        video = name
    named = letter_of(answer, given)
    return {
        "question": plain_question(text(record, "question")),
        "options": given,
        "answer": (choice(answer, given) if named == answer else named) or None,
        "video": video,
        "start": record.get("start"),
        "end": record.get("end"),
        "category": source.stem,
    }


def read_sti_bench(record: Mapping[str, Any], source: Source) -> Fields:
    """STI-Bench: `Question`, `Candidates` (by letter), `Answer` (a letter), `Video`, `time_start`, `time_end`.

    The video is shown whole and the question says which part is meant, as in the public code.
    """
    question = plain_question(text(record, "Question"))
    times = [record.get(key) for key in ("time_start", "time_end")]
    if None not in times:
        question = f"From {times[0]} s to {times[1]} s. {question}"
    given = options(record.get("Candidates"))
    return {
        "question": question,
        "options": given,
        "answer": choice(as_text(record.get("Answer")), given) or None,
        "video": media_path(record.get("Video"), "Video"),
        "category": as_text(record.get("Task")),
    }


def read_mmr_vbench(record: Mapping[str, Any], source: Source) -> Fields:
    """MMR-VBench: `question`, `options` (`(A) ..`; empty ones are none), `correctAnswer` (`(K)`), `video`."""
    listed = [one for one in as_list(record.get("options")) if not isinstance(one, str) or one.strip()]
    letters = [letter(one[:3]) if isinstance(one, str) else "" for one in listed]
    answer = as_text(record.get("correctAnswer"))
    if len(listed) > 1 and all(letters) and len(set(letters)) == len(letters) <= len(ascii_uppercase):
        if letter(answer) in letters:  # letters close up where options are left out
            answer = ascii_uppercase[letters.index(letter(answer))]
        else:
            raise DataError(f"correctAnswer is {answer!r}: expected the letter of an option")
        listed = [f"({new}) {one[3:].strip()}" for new, one in zip(ascii_uppercase, listed)]
    given = options(listed)
    return {
        "question": plain_question(text(record, "question")),
        "options": given,
        "answer": choice(answer, given) or None,
        "video": media_path(record.get("video"), "video"),
        "category": as_text(record.get("abilityType_L2")),
    }
