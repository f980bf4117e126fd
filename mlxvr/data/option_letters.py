"""Letters and options: take letters off options, and find the letter of an option."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

__all__ = ["letter_of", "strip_letters"]


def strip_letters(options: Sequence[str]) -> list[str]:
    """Return options without the letters that some files write before them (`A. red`), if each has its own."""
    marks = [re.match(rf"\s*\(?{letter}[.:)]\s*", option) for letter, option in zip(ascii_uppercase, options)]
    if len(marks) < len(options) or not all(mark and mark.end() < len(o) for mark, o in zip(marks, options)):
        return list(options)
    return [option[mark.end() :] for mark, option in zip(marks, options) if mark]


def letter_of(answer: str, options: Sequence[str]) -> str:
    """Return the letter of the option whose text is the answer; the answer itself if there is none."""
    texts = [option.strip().casefold() for option in options]
    wanted = answer.strip().casefold()
    return ascii_uppercase[texts.index(wanted)] if wanted in texts[:26] else answer
