"""How far the answers of a group agree: the part of label-free rewards and of the collapse guard that compares texts.

The majority is that of the reviewed answers (a2), compared by the equality or the IoU of the labelled reward
(`reward.compare_answers`):

    exact_match, math   the largest class of equal answers; an answer agrees with it to 1 or 0. If several classes are
                        the largest, an answer in one of them agrees to one over their number. A class of one answer is
                        no majority
    iou, gqa            an answer agrees to its mean agreement with the reviewed answers of the other completions, so
                        the answer in the middle is the majority

Empty answers and answers that decline have no vote and agree with nothing.
"""

from collections.abc import Sequence

import numpy as np

from mlxvr.grading.reward import answers, compare_answers

__all__ = [
    "agree",
    "both_answers",
    "declines",
    "is_answer",
    "is_same",
    "majority_agreement",
    "most_common",
    "text_kind",
]

_GRADED = ("iou", "gqa")  # kinds whose answers can agree in part
_SAME = 0.95  # graded answers that agree at least this far count as the same


def both_answers(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """First and reviewed answers of completions, as the reward reads them."""
    pairs = [answers(text) for text in texts]
    return [first for first, _ in pairs], [second for _, second in pairs]


def declines(answer: str) -> bool:
    """Whether an answer is the sentence that declines: the reward finds that it does not even agree with itself."""
    return bool(answer) and compare_answers(answer, answer) == 0.0


def is_answer(text: str) -> bool:
    """Whether a text is neither empty nor the sentence that declines."""
    return bool(text) and not declines(text)


def agree(left: str, right: str, kind: str) -> float:
    """How far two answers agree, in either order: `compare_answers` reads only from its second that it is a formula."""
    answer, truth = sorted((left, right), key=lambda text: ("$" in text, text))
    return compare_answers(answer, truth, kind)


def is_same(left: str, right: str, kind: str) -> bool:
    """Whether two answers, or two missing answers, count as the same."""
    return left == right or agree(left, right, kind) >= _SAME


def text_kind(kind: str) -> str:
    """The kind by which answers are compared quickly: formulas by their text, which cannot take long."""
    return "exact_match" if kind == "math" else kind


def majority_agreement(compared: Sequence[str], reviewed: Sequence[str], kind: str) -> np.ndarray:
    """How far answers agree with the majority of the reviewed answers.

    Args:
        compared: an answer of each of the G completions, first or reviewed.
        reviewed: their reviewed answers, which vote.
        kind: of the row: "exact_match", "math", "iou" or "gqa".

    Returns:
        float64 (G,), in [0, 1]; zeros where fewer than two completions vote.

    Raises:
        DataError: answers have to be compared, and the kind is unknown.
        ConfigError: the kind is "math", and `math-verify` is not installed.
    """
    voters = [index for index, answer in enumerate(reviewed) if is_answer(answer)]
    if len(voters) < 2:
        return np.zeros(len(compared))
    if kind in _GRADED:
        return np.array(
            [
                np.mean([agree(answer, reviewed[voter], kind) for voter in voters if voter != index])
                for index, answer in enumerate(compared)
            ]
        )
    classes = _equal_classes([reviewed[voter] for voter in voters], kind)
    most = max(classes.values())
    if most < 2:
        return np.zeros(len(compared))
    largest = [name for name, count in classes.items() if count == most]
    return np.array([np.mean([agree(answer, name, kind) for name in largest]) for answer in compared])


def most_common(texts: Sequence[str], kind: str) -> tuple[str, int]:
    """The answer that is the same as most of them, and how many those are, itself included."""
    counts = [sum(is_same(text, compared, kind) for compared in texts) if text else 0 for text in texts]
    best = int(np.argmax(counts))
    return texts[best], counts[best]


def _equal_classes(texts: Sequence[str], kind: str) -> dict[str, int]:
    """Sizes of the classes of equal answers, by the first answer of each class."""
    sizes: dict[str, int] = {}
    for text in texts:
        name = text if text in sizes else next((name for name in sizes if agree(text, name, kind) == 1.0), text)
        sizes[name] = sizes.get(name, 0) + 1
    return sizes
