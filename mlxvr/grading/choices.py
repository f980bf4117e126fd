"""Find which of the choices an answer names. Evaluation and apps read leniently; the training reward does not.

The forms, in order of precedence: a letter alone, in brackets, with a full stop, or followed by a text; the text of a
choice; a declared letter ("the answer is B"); the first single capital that is not a word.
"""

import re
import unicodedata
from collections.abc import Sequence
from string import ascii_uppercase

from mlxvr.answering.confidence import answer_span
from mlxvr.answering.transcript import is_fallback

__all__ = ["find_choice", "find_letter", "named_letter", "normalize", "unwrap"]

_WRAPPED = re.compile(r"\\(?:text|math)[a-z]*\s*\{(.*)\}|\$(.*)\$|\*\*(.*)\*\*|\{(.*)\}|\[(.*)\]", re.DOTALL)
# The words after a letter that is the subject of a sentence, so neither the article A nor the pronoun I.
_SUBJECT = r"\s+(?:is|because|since|seems|fits|matches|looks|appears|and|or)\b"
_PRONOUN = rf"I(?=['\u2019])|I(?=\s+[a-z])(?!{_SUBJECT})"
_ARTICLE = rf"A(?=\s+[a-z])(?!{_SUBJECT}|\s+(?:was|as|but|so|would|could|should|must|may|might|can|then|if)\b)"
_DECLARED = re.compile(
    rf"\b(?i:answer|option|choice)\s*(?:is\b)?\s*[:=]?\s*(?:option\s+)?[(*]*(?!{_PRONOUN})([A-Z])\b(?!['\u2019])"
)
_LABEL = re.compile(r"\s*\(?([A-Za-z])[.):]\s*")
_TWO_PARTS = "<>"


def find_choice(text: str | None, options: Sequence[str]) -> int | None:
    """Return the index of the choice that an answer names; None if it names none, or declines to answer.

    Args:
        text: the content of a box. Of a grounded answer, the part before `<>` counts.
        options: the choices, with or without their letters.
    """
    if text is None or not options:
        return None
    text = text.partition(_TWO_PARTS)[0].strip()
    letter = None if is_fallback(text) else find_letter(text, ascii_uppercase[: len(options)], options)
    return None if letter is None else ascii_uppercase.index(letter)


def find_letter(text: str, letters: str, options: Sequence[str]) -> str | None:
    """Return the letter that an answer chooses, in any of the forms; None if it chooses none.

    Args:
        text: the answer.
        letters: the letters that may be chosen.
        options: the text of each letter's choice; empty if it is not known.
    """
    named = named_letter(text, letters, options)
    if named is not None:
        return named
    declared = [letter for letter in _DECLARED.findall(text) if letter in letters]
    if declared:
        return declared[-1]
    alone = re.search(rf"(?<!\w)(?!{_PRONOUN}|{_ARTICLE})[{letters}](?!\w|-[a-z])", text)
    return alone.group() if alone else None


def named_letter(text: str, letters: str, options: Sequence[str]) -> str | None:
    """Return the letter of an answer that is nothing but a choice: its letter, its text, or both."""
    text = unwrap(text)
    letter = _letter(text, letters)
    if letter is not None and len(normalize(text)) == 1:
        return letter
    matching = [index for index, option in enumerate(options) if normalize(text) in _spellings(option, index)]
    return ascii_uppercase[matching[0]] if len(matching) == 1 else letter


def unwrap(text: str) -> str:
    """Remove LaTeX, Markdown and brackets that enclose the whole text."""
    text = text.strip()
    while wrapped := _WRAPPED.fullmatch(text):
        text = next(group for group in wrapped.groups() if group is not None).strip()
    return text


def normalize(text: str) -> str:
    """Apply NFKC, fold case, make spaces single, and strip round brackets, quotes and `.!?` from the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .!?\"'`()")


def _letter(text: str, letters: str) -> str | None:
    """Return the letter of `A`, `(A)`, `A.`, `A) text` and similar forms."""
    start, end = answer_span(text)
    letter = text[start:end].upper()
    return letter if end - start == 1 and letter in letters else None


def _spellings(option: str, index: int) -> set[str]:
    """Return an option as it is, and without its letter if it has one."""
    label = _LABEL.match(option)
    if label and label[1].upper() == ascii_uppercase[index]:
        return {normalize(option), normalize(option[label.end() :])}
    return {normalize(option)}
