r"""The decision loop on scripted tokens: what it reads, when it stops, what it reports.

Each script is a list of (piece of text, probability); the confidences below are worked by hand from the probabilities.
"""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest

from mlxvr.answering.events import FirstAnswer, Option, ReasoningDelta, Usage
from mlxvr.answering.loop import AskRequest, Outcome, make_answer, run_answer_loop
from mlxvr.errors import ConfigError
from mlxvr.model.prompt import question_text

END = "<|im_end|>"
FULL = [
    ("\\", 1.0),
    ("boxed", 1.0),
    ("{", 0.5),
    ("B", 0.9),
    ("}<", 0.8),
    ("think", 1.0),
    (">", 1.0),
    ("It", 0.7),
    (" moves", 0.6),
    (".", 1.0),
    ("</", 1.0),
    ("think", 1.0),
    (">", 1.0),
    ("\\", 1.0),
    ("boxed", 1.0),
    ("{", 1.0),
    ("C", 0.99),
    ("}", 1.0),
    (END, 1.0),
]
FALLBACK = [("\\boxed{", 1.0), ("Let's", 0.9), (" analyze", 0.9), (" the problem step by step.", 1.0), ("}", 1.0)]


class Scripted:
    """A model that says what it was told to; counts how far it was read."""

    def __init__(self, script):
        self.script = script
        self.read = 0

    def __iter__(self):
        for number, (_, probability) in enumerate(self.script):
            self.read = number + 1
            yield type("Token", (), {"id": number, "logprob": math.log(probability)})()

    def detokenize(self, ids):
        return "".join(self.script[number][0] for number in ids)

    def run(self, *, mode="auto", threshold=0.97, max_tokens=100):
        outcome = Outcome()
        ends = frozenset(number for number, (text, _) in enumerate(self.script) if text == END)
        events = list(
            run_answer_loop(
                self,
                self.detokenize,
                outcome,
                mode=mode,
                threshold=threshold,
                max_tokens=max_tokens,
                stop_ids=ends,
            )
        )
        return events, outcome, make_answer(outcome, threshold, Usage())


def test_an_unsure_first_answer_is_reasoned_about():
    model = Scripted(FULL)
    events, outcome, answer = model.run(threshold=0.97)
    first = events[0]
    assert isinstance(first, FirstAnswer)
    assert (first.text, first.threshold, first.reasons) == ("B", 0.97, True)
    assert first.confidence == pytest.approx(0.9, abs=1e-12)
    assert all(isinstance(event, ReasoningDelta) for event in events[1:])
    assert (answer.text, answer.first, answer.second) == ("C", "B", "C")
    assert answer.reasoning.strip() == "It moves."
    assert answer.reasoned
    assert answer.problems == ()
    assert answer.confidence == pytest.approx(0.9, abs=1e-12)
    assert answer.token_ids == tuple(range(19))
    assert answer.token_logprobs[3] == pytest.approx(math.log(0.9))
    assert (outcome.first_answer_tokens, len(outcome.token_ids)) == (5, 19)


@pytest.mark.parametrize("mode", ["auto", "direct", "think"])
def test_a_confidence_that_is_no_number_is_no_doubt(mode):
    model = Scripted(FULL)
    model.script = [(text, math.nan if text == "B" else probability) for text, probability in FULL]
    with pytest.raises(ConfigError, match="confidence is not a number"):
        model.run(mode=mode)
    assert model.read == 5


def test_a_sure_first_answer_ends_it_at_the_closing_brace():
    model = Scripted(FULL)
    events, outcome, answer = model.run(threshold=0.9 - 1e-9)
    assert [type(event) for event in events] == [FirstAnswer]
    assert not events[0].reasons
    assert model.read == 5, "no token is taken after the one that closes the box"
    assert (answer.text, answer.first, answer.second, answer.reasoning) == ("B", "B", None, None)
    assert not answer.reasoned
    assert answer.problems == ()
    assert outcome.first_answer_tokens == 5


def test_early_exit_is_a_prefix_of_thinking():
    _, _, short = Scripted(FULL).run(mode="direct")
    _, _, long = Scripted(FULL).run(mode="think", threshold=0.0)
    assert long.token_ids[: len(short.token_ids)] == short.token_ids
    assert long.text == "C"
    assert long.reasoned


@pytest.mark.parametrize(("mode", "reasoned"), [("direct", False), ("think", True)])
def test_modes_override_the_threshold(mode, reasoned):
    for threshold in (0.0, 1.0):
        _, _, answer = Scripted(FULL).run(mode=mode, threshold=threshold)
        assert answer.reasoned is reasoned


def test_the_fallback_has_no_confidence_and_always_reasons():
    events, _, answer = Scripted([*FALLBACK, *FULL[5:]]).run(threshold=0.0)
    assert events[0].confidence is None
    assert events[0].reasons
    assert answer.confidence is None
    assert answer.text == "C"


def test_a_fallback_in_direct_mode_is_no_answer():
    _, _, answer = Scripted(FALLBACK).run(mode="direct")
    assert answer.text == ""
    assert answer.first == "Let's analyze the problem step by step."
    assert answer.confidence is None
    assert not answer.reasoned


def test_reasoning_deltas_add_up_to_the_reasoning_without_its_marks():
    script = [*FULL[:7], ("\n", 1.0), ("a <", 1.0), (" b", 1.0), ("</", 1.0), ("i>", 1.0), (" c\n", 1.0), *FULL[10:]]
    events, _, answer = Scripted(script).run(mode="think")
    pieces = [event.text for event in events[1:]]
    assert "".join(pieces) == answer.reasoning == "a < b</i> c"
    assert len(pieces) > 2, "it comes in pieces, as it is written"


@pytest.mark.parametrize(
    ("script", "text", "problem"),
    [
        ([("It is red", 0.9), (".", 1.0), (END, 1.0)], "It is red.", "no_box"),
        ([("\\boxed{", 1.0), ("B", 0.9)], "B", "unterminated_box"),
        ([*FULL[:9]], "B", "unterminated_think"),
        ([*FULL[:13], (END, 1.0)], "B", "no_second_box"),
    ],
)
def test_broken_output_gives_an_honest_answer(script, text, problem):
    _, _, answer = Scripted(script).run(mode="think")
    assert problem in answer.problems
    assert answer.text == text


@pytest.mark.parametrize(
    ("script", "reasoned", "reasoning", "second"),
    [
        ([*FULL[:4], ("}", 0.8), (END, 1.0)], False, None, None),  # it stopped by itself
        ([*FULL[:4], ("}", 0.8), ("\\boxed{C}", 0.9), (END, 1.0)], True, None, "C"),  # a second answer alone
        ([*FULL[:9], (END, 1.0)], True, "It moves", None),  # and reasoning alone
        (FULL, True, "It moves.", "C"),
    ],
)
def test_it_has_reasoned_when_there_is_reasoning_or_a_second_answer(script, reasoned, reasoning, second):
    _, outcome, answer = Scripted(script).run(mode="think")
    assert not outcome.exited
    assert (answer.reasoned, answer.reasoning, answer.second) == (reasoned, reasoning, second)


@pytest.mark.parametrize(
    ("script", "mode", "first_seconds", "reasoning_seconds", "first_tokens"),
    [
        (FULL, "think", 5, 14, 5),  # a second a token; the fifth closes the box, the end of the turn is the 19th
        (FULL, "direct", 5, 0, 5),
        ([("It is red", 0.9), (".", 1.0), (END, 1.0)], "think", 3, 0, 3),  # no box: all of it is the first answer
    ],
)
def test_time_and_tokens_before_and_after_the_first_box(
    monkeypatch, script, mode, first_seconds, reasoning_seconds, first_tokens
):
    model = Scripted(script)
    monkeypatch.setattr("mlxvr.answering.loop.time", SimpleNamespace(perf_counter=lambda: float(model.read)))
    _, outcome, _ = model.run(mode=mode)
    assert (outcome.first_answer_seconds, outcome.reasoning_seconds) == (first_seconds, reasoning_seconds)
    assert outcome.first_answer_tokens == first_tokens


def test_an_exit_with_the_last_token_is_no_limit():
    _, outcome, answer = Scripted(FULL).run(mode="direct", max_tokens=5)
    assert outcome.exited
    assert answer.problems == ()
    _, _, longer = Scripted(FULL).run(mode="think", max_tokens=5)
    assert "token_limit" in longer.problems


def test_the_token_limit_is_reported():
    model = Scripted(FULL)
    _, outcome, answer = model.run(mode="think", max_tokens=8)
    assert "token_limit" in answer.problems
    assert len(outcome.token_ids) == model.read == 8
    assert answer.text == "B"
    _, _, whole = Scripted(FULL).run(mode="think", max_tokens=len(FULL))
    assert "token_limit" not in whole.problems, "the last token that fits was the end of the turn"


def test_direct_mode_does_not_wait_for_a_box_that_reasoning_has_replaced():
    script = [("<think>", 1.0), *[("hm ", 1.0)] * 50, ("</think>", 1.0), ("\\boxed{A}", 0.9), (END, 1.0)]
    model = Scripted(script)
    _, _, answer = model.run(mode="direct")
    assert model.read < 5
    assert answer.text == ""
    assert answer.confidence is None


def test_numbers_that_are_not_finite_are_null_in_json():
    _, _, answer = Scripted(FULL).run(mode="think")
    broken = dataclasses.replace(answer, confidence=math.nan, token_logprobs=(-math.inf, -0.5))
    fields = json.loads(json.dumps(broken.to_dict(), allow_nan=False))
    assert fields["confidence"] is None
    assert fields["token_logprobs"] == [None, -0.5]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"text": "  "}, "empty"),
        ({"text": "x", "kind": "poem"}, "use one of qa, grounding, grounded_qa"),
        ({"text": "x", "mode": "maybe"}, "use one of auto, direct, think"),
        ({"text": "x", "threshold": 1.5}, r"outside \[0, 1\]"),
        ({"text": "x", "threshold": math.nan}, r"outside \[0, 1\]"),
        ({"text": "x", "max_tokens": 0}, "at least 1"),
        ({"text": "x", "temperature": -1.0}, "temperature"),
        ({"text": "x", "temperature": math.nan}, "temperature"),
        ({"text": "x", "top_p": 0.0}, "top_p"),
    ],
)
def test_a_question_refuses_what_it_cannot_use(wrong, says):
    with pytest.raises(ConfigError, match=says):
        AskRequest(**wrong)


class Opened(Scripted):
    """A model whose answer is begun for it; `opening` is the text of the tokens that were put into its mouth."""

    def __init__(self, opening, script):
        super().__init__(script)
        self.opening = opening

    def detokenize(self, ids):
        return "".join(self.opening[n - 1000] if n >= 1000 else self.script[n][0] for n in ids)

    def run(self, **options):
        outcome = Outcome()
        ids = range(1000, 1000 + len(self.opening))
        asked = {"mode": "auto", "threshold": 0.97, "max_tokens": 100, **options}
        events = list(run_answer_loop(self, self.detokenize, outcome, response_prefix_ids=list(ids), **asked))
        return events, outcome, make_answer(outcome, asked["threshold"], Usage())


BOX = ["\\", "boxed", "{", "Answer", ":"]
REST = FULL[5:18]


@pytest.mark.parametrize(
    ("opening", "written", "first", "confidence"),
    [
        (BOX, [(" B", 0.9), ("}<", 0.5)], "B", 0.9),
        (BOX, [(" left", 0.2), (" cup", 0.6), ("}<", 0.5)], "left cup", 0.6),  # the last token alone
        (BOX, [(" B", 0.9), (".", 0.3), (" left", 0.2), ("}<", 0.5)], "B. left", 0.9),  # of the answer: a letter
        (BOX, [("}<", 0.5)], "", None),
        (BOX, [(" Let's", 0.9), (" analyze", 0.9), (" it.", 0.9), ("}<", 0.5)], "Let's analyze it.", None),
        (["Sure", ": "], [("\\boxed{", 0.9), ("4", 0.7), ("2", 0.6), ("}<", 0.5)], "42", 0.6),
        (["I say "], [("\\boxed{", 0.9), ("}<", 0.99)], "", None),
        (
            ["I say "],
            [("\\boxed{", 1.0), ("Let's analyze", 0.99), (" it", 0.99), ("}<", 0.9)],
            "Let's analyze it",
            None,
        ),
    ],
)
def test_an_answer_that_is_begun_for_the_model(opening, written, first, confidence):
    model = Opened(opening, [*written, *REST])
    events, outcome, answer = model.run()
    assert (events[0].text, answer.first) == (first, first)
    for told in (events[0].confidence, answer.confidence):
        assert told == (None if confidence is None else pytest.approx(confidence, abs=1e-12))
    assert outcome.first_answer_tokens == len(written)
    assert answer.token_ids == tuple(range(len(written) + len(REST))), "what was put into its mouth is not counted"
    assert (answer.second, answer.reasoning) == ("C", "It moves.")
    if confidence is not None:
        _, _, short = model.run(threshold=confidence - 1e-9)
        assert (short.text, len(short.token_ids)) == (first, len(written))


def test_an_opening_that_leaves_nothing_to_answer_is_refused():
    for opening in (r"\boxed{A}", "<think>", r"\boxed{A}<think>x</think>"):
        with pytest.raises(ConfigError, match="response_prefix"):
            AskRequest("What?", response_prefix=opening)
    assert AskRequest("What?", response_prefix=r"\boxed{Answer:").response_prefix == r"\boxed{Answer:"


COLORS = ("red", "blue", "a green cup")


@pytest.mark.parametrize(
    ("content", "index"),
    [
        ("B", 1),
        ("(B)", 1),
        ("B.", 1),
        ("B. blue", 1),
        ("blue", 1),
        ("Blue.", 1),
        ("\\text{C}", 2),
        ("a green cup", 2),
        ("A green cup", 2),
        ("I'd say A", 0),
        ("B <> [1.0, 2.5]", 1),
        ("D", None),
        ("yellow", None),
        ("", None),
        ("Let's analyze the problem step by step.", None),
    ],
)
def test_the_option_that_an_answer_names(content, index):
    """However the box spells it; each of both answers has its own, and the event of the first too."""
    option = None if index is None else Option(index, COLORS[index], "ABC"[index])
    script = [("\\boxed{", 1.0), (content, 0.9), ("}", 1.0), (END, 1.0)]
    scripted, outcome = Scripted(script), Outcome()
    ends = frozenset({3})
    options = {"mode": "think", "threshold": 0.5, "max_tokens": 9, "stop_ids": ends, "options": COLORS}
    (first,) = run_answer_loop(scripted, scripted.detokenize, outcome, **options)
    assert first.option == option
    answer = make_answer(outcome, 0.5, Usage(), COLORS)
    assert (answer.option, answer.first_option, answer.second_option) == (option, option, None)
    told = answer.to_dict()["option"]
    assert told == (None if index is None else {"index": index, "text": COLORS[index], "letter": "ABC"[index]})
    assert make_answer(outcome, 0.5, Usage()).option is None


def test_both_answers_have_an_option_of_their_own():
    scripted, outcome = Scripted(FULL), Outcome()
    list(run_answer_loop(scripted, scripted.detokenize, outcome, mode="think", threshold=0.5, max_tokens=99))
    answer = make_answer(outcome, 0.5, Usage(), COLORS)
    assert (answer.first_option.text, answer.second_option.text, answer.option.letter) == ("blue", "a green cup", "C")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["A. red", "B. blue"], ("red", "blue")),
        (["(A) red", "(B) blue"], ("red", "blue")),
        (["A) red", "B) blue"], ("red", "blue")),
        (["red", "B. blue"], ("red", "B. blue")),  # not each has one
        (["B. red", "A. blue"], ("B. red", "A. blue")),  # nor its own
        (["A.", "B."], ("A.", "B.")),
        (["A red ball", "Blue"], ("A red ball", "Blue")),
        ([], None),
    ],
)
def test_options_are_lettered_once(options, expected):
    assert AskRequest("Which?", options).options == expected
    if expected:
        lettered = "\n".join(f"{letter}. {text}" for letter, text in zip("ABC", expected))
        assert (
            question_text("Which?", options) == f"Which?\nOptions:\n{lettered}\nPut your final answer in \\boxed{{}}."
        )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["a", "b", "a"], "options 1 and 3 are both 'a': give every choice once"),
        (["A. red", "B. red "], "options 1 and 2 are both 'red'"),
        ([1, 2], "option 1 is 1, no text: give every choice as a text"),
        (["a", None], "option 2 is None, no text"),
    ],
)
def test_options_that_cannot_be_told_apart_or_are_no_texts(options, told):
    with pytest.raises(ConfigError, match=told):
        AskRequest("Which?", options)
    if "are both" in told:
        assert len(AskRequest("Which?", options, options_may_repeat=True).options) == len(options)
    else:
        with pytest.raises(ConfigError, match="no text: give every choice as a text"):
            question_text("Which?", options)
