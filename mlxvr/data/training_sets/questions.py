"""Readers of text and image questions, and of Video-R1: answers are texts, numbers or choices."""

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from mlxvr.data.tables import as_text
from mlxvr.data.training_sets.columns import Fields, LeftOut, Source, media_path, options, text
from mlxvr.data.training_sets.wording import boxed, choice, is_formula, letter, plain_question, split_options
from mlxvr.errors import DataError

__all__ = ["read_dapo_math", "read_thinklite", "read_video_r1", "read_virl"]

_SOLUTION = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_KINDS = {
    "exact_match": "exact_match",
    "math": "math",
    "multiple choice": "exact_match",
    "multiple_choice": "exact_match",
    "numerical": "math",
}
_VIDEO_R1 = ("multiple choice", "numerical")


def read_dapo_math(record: Mapping[str, Any], source: Source) -> Fields:
    """DAPO-Math: `prompt`, `solution`; text alone, graded as a formula.

    The original parquet is read too: it has a list of messages in `prompt`, and the solution in `reward_model`.
    """
    prompt = record.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], Mapping):
        prompt = prompt[0].get("content")
    solution = record.get("solution")
    if solution is None and isinstance(record.get("reward_model"), Mapping):
        solution = record["reward_model"].get("ground_truth")
    return {
        "question": plain_question(text({"prompt": prompt}, "prompt")),
        "answer": boxed(as_text(solution)) or None,
        "kind": "math",
    }


def read_virl(record: Mapping[str, Any], source: Source) -> Fields:
    r"""ViRL: `question`, `answer` (in `\boxed{}`), `image` (a list of one; questions about several are left out)."""
    image = media_path(record.get("image"), "image")
    fields = _asked(text(record, "question"), boxed(as_text(record.get("answer"))))
    return {**fields, "image": image, "category": as_text(record.get("category"))}


def read_thinklite(record: Mapping[str, Any], source: Source) -> Fields:
    """ThinkLite-VL-Hard: `problem`, `ground_truth`, `image`, `problem_type` (exact_match or math)."""
    kind = record.get("problem_type")
    if kind is not None and (not isinstance(kind, str) or kind not in _KINDS):
        raise DataError(f"problem_type is {kind!r}: expected exact_match or math")
    fields = _asked(text(record, "problem"), boxed(as_text(record.get("ground_truth"))))
    if kind is not None and "options" not in fields:
        fields["kind"] = _KINDS[kind]
    return {**fields, "image": media_path(record.get("image"), "image")}


def read_video_r1(record: Mapping[str, Any], source: Source) -> Fields:
    """Video-R1: `problem`, `options`, `solution` (`<answer>B</answer>`), `path`, `data_type`, `problem_type`.

    The mix takes multiple-choice and numerical problems; other types (OCR, free-form, regression) are left out.
    """
    kind, media = text(record, "problem_type"), text(record, "data_type")
    if kind not in _VIDEO_R1:
        raise LeftOut(f"problem_type is {kind!r}: the mix has {' and '.join(_VIDEO_R1)}")
    if media not in ("image", "video"):
        raise DataError(f"data_type is {media!r}: expected image or video")
    solution = _SOLUTION.search(text(record, "solution"))
    if not solution or not solution[1]:
        raise DataError("solution holds no <answer>..</answer>: expected one, such as <answer>B</answer>")
    if kind == "numerical":
        fields: Fields = {"question": plain_question(text(record, "problem")), "answer": solution[1]}
    else:
        choices = options(record["options"]) if record.get("options") else []
        fields = _asked(text(record, "problem"), solution[1], choices)
    return {
        **fields,
        "kind": _KINDS[kind],
        media: media_path(record.get("path"), "path"),
        "category": as_text(record.get("data_source")),
    }


def _asked(question: str, answer: str, choices: Sequence[str] = ()) -> Fields:
    """Return the fields of question, options and answer; `choices` are the options of a column of their own."""
    question = plain_question(question)
    head, listed = split_options(question)
    if listed and (
        listed == choices if choices else letter(answer) in ascii_uppercase[: len(listed)] and letter(answer)
    ):
        question, choices = plain_question(head), listed
    if choices:
        right = choice(answer, choices) or None
        return {"question": question, "options": choices, "answer": right, "kind": "exact_match"}
    answer = letter(answer) or answer
    kind = "math" if is_formula(answer) else "exact_match"
    return {"question": question, "answer": answer or None, "kind": kind}
