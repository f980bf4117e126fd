r"""Turn a prompt back into the question and its options, where that is certain.

- The placeholders `<image>` and `<video>` are removed: mlxvr's prompt puts the media in front of the question.
- Instructions in the exact words of a known prompt are removed: DAPO's two sentences, MathVista's hints (ThinkLite),
  requests for `\boxed{}` or for the letter at the end, and the grounding prompts of VideoAuto-R1.
- Options are split off if they end the question, one per line (`A. red`, `A) red`, `(A) red`, `A: red`) or on one line
  after `Options:` or `Choices:`, are lettered from A without a gap and in one style, and the answer is one of their
  letters. Any other text could be part of the question and stays in it.
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase

from mlxvr.data.option_letters import letter_of

__all__ = ["boxed", "choice", "is_formula", "letter", "plain_question", "split_options"]

_PLACEHOLDER = re.compile(r"<(?:image|video)>")
_BEFORE = (
    re.compile(
        r"Solve the following math problem step by step\. The last line of your response should be of the form "
        r"Answer: \$?Answer\$? \(without quotes\) where \$?Answer\$? is the answer to the problem\."
    ),
    re.compile(r"Hint: Please answer the question [^\n]*? at the end\."),
    re.compile(
        r"Locate the start and end timestamps of the video segment corresponding to the description:", re.IGNORECASE
    ),
    re.compile(r"Question:"),
)
_AFTER = (
    re.compile(r'Remember to put your answer on its own line after "?Answer:"?\.?$'),
    re.compile(r"(?:Please )?(?:put|output|give|write) (?:your|the) final answer (?:in|within) \\boxed\{\}\.?$", re.I),
    re.compile(r"Answer with the option(?:'s|’s)? letter from the given choices directly\.?$", re.I),
    re.compile(r"Please select the correct answer from the options above\.?$", re.I),
    re.compile(
        r"Please provide the start and end timestamps \(in seconds, precise to (?:one|two) decimal places?\) in the "
        r"format \\boxed\{\[start, end\]\}\.?$"
    ),
    re.compile(r"Please answer the question, and then provide the video segment that best supports .*$", re.DOTALL),
)
_LINE = {
    style: re.compile(rf"{pattern}\s+(\S.*)")
    for style, pattern in (("A.", r"([A-Z])\."), ("A)", r"([A-Z])\)"), ("(A)", r"\(([A-Z])\)"), ("A:", r"([A-Z]):"))
}
_INLINE = (re.compile(r"\(([A-Z])\)"), re.compile(r"(?<!\S)([A-Z])\.(?=\s)"), re.compile(r"(?<!\S)([A-Z])\)(?=\s)"))
_HEADER = re.compile(r"(?:answer )?(?:options|choices)(?: are)?\s*:", re.IGNORECASE)
_LETTER = re.compile(r"\(?([A-Z])\)?[.:]?")
_OPTION = re.compile(r"\(?([A-Z])[.:)]\)?\s*(.+)", re.DOTALL)
_FORMULA = re.compile(
    r"(?<!\\)\$\$?[^$\n]+\$|\\\(.+?\\\)|\\\[.+?\\\]|\\frac\{-?\d+(?:[.,]\d+)?\}\{-?\d+(?:[.,]\d+)?\}"
    r"|(?:^|[\s=])[$€£¥₩₹]?-?\.?\d"
    r"|(?:^|[\s=])-?\(-?\d[\d.\s+*×/^()÷-]*[+*×/^÷-][\d.\s+*×/^()÷-]*\)?(?:[.,:\s)$]|$)",
    re.DOTALL,
)


def plain_question(question: str) -> str:
    """Return a question without placeholders and without the instructions of known prompts."""
    plain = _PLACEHOLDER.sub("", question).strip()
    while True:
        shorter = plain
        for pattern in _BEFORE:
            if match := pattern.match(shorter):
                shorter = shorter[match.end() :].lstrip()
        for pattern in _AFTER:
            if match := pattern.search(shorter):
                shorter = shorter[: match.start()].rstrip()
        if shorter == plain or not shorter:
            return plain
        plain = shorter


def split_options(question: str) -> tuple[str, list[str]]:
    """Return a question and the options that end it; if none do, the question as it is and no options."""
    for head, listed in (_listed(question), _inline(question)):
        if head and len(listed) > 1 and all(listed):
            return head, listed
    return question, []


def letter(answer: str) -> str:
    """Return the letter of an answer that is `A`, `(A)`, `A.`, `A:` or `A)` and nothing else; "" for any other."""
    match = _LETTER.fullmatch(answer.strip())
    return match.group(1) if match else ""


def choice(answer: str, options: Sequence[str]) -> str:
    """Return the letter of the option that an answer names by its letter, its text or both; else the answer itself."""
    known = ascii_uppercase[: len(options)]
    if (bare := letter(answer)) and bare in known:
        return bare
    if (by_text := letter_of(answer, options)) != answer:
        return by_text
    match = _OPTION.fullmatch(answer.strip())
    if match and match.group(1) in known and letter_of(match.group(2), options) == match.group(1):
        return match.group(1)
    return answer


def boxed(answer: str) -> str:
    r"""Return the content of the last `\boxed{}` of an answer; the answer itself if it has none that is closed."""
    start = answer.rfind(r"\boxed{")
    if start < 0:
        return answer.strip()
    begin = start + len(r"\boxed{")
    depth = 1
    for place in range(begin, len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[place], 0)
        if not depth:
            return answer[begin:place].strip()
    return answer.strip()


def is_formula(answer: str) -> bool:
    r"""Return whether the symbolic grader should judge an answer: it holds marked LaTeX, a fraction or a number.

    The public code checks whether `math-verify` finds anything to parse in the bare answer; this function gives the
    same result without that package. So `x+1` and `\sqrt{3}`, which are not marked as LaTeX, are texts there and here.
    """
    return _FORMULA.search(answer) is not None


def _listed(question: str) -> tuple[str, list[str]]:
    """Split off options that are the last lines, one per line."""
    lines = [line.strip() for line in question.split("\n")]
    for pattern in _LINE.values():
        options: list[tuple[str, str]] = []
        rest = len(lines)
        while rest and (not lines[rest - 1] or (match := pattern.fullmatch(lines[rest - 1]))):
            rest -= 1
            if lines[rest]:
                options.insert(0, (match[1], match[2]))  # type: ignore[index]
                if match[1] == "A":  # type: ignore[index]
                    break
        if _in_order([letter for letter, _ in options]):
            if rest and _HEADER.fullmatch(lines[rest - 1]):
                rest -= 1
            return "\n".join(question.split("\n")[:rest]).strip(), [option.strip() for _, option in options]
    return "", []


def _inline(question: str) -> tuple[str, list[str]]:
    """Split off options on one line, after a header such as `Options:`."""
    headers = list(_HEADER.finditer(question))
    if not headers:
        return "", []
    listed = question[headers[-1].end() :].strip()
    if "\n" in listed:
        return "", []
    for pattern in _INLINE:
        marks = list(pattern.finditer(listed))
        if marks and marks[0].start() == 0 and _in_order([mark[1] for mark in marks]):
            ends = [*(mark.start() for mark in marks[1:]), len(listed)]
            options = [listed[mark.end() : end].strip().rstrip(",;").strip() for mark, end in zip(marks, ends)]
            return question[: headers[-1].start()].strip(), options
    return "", []


def _in_order(letters: Sequence[str]) -> bool:
    return len(letters) > 1 and list(letters) == list(ascii_uppercase[: len(letters)])
