"""How rows are validated: one completion says what direct, think and auto would give, and whose reward counts."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from test_answer_loop import END, FULL

from mlxvr.data.rows import Row
from mlxvr.grading.reward import Weights
from mlxvr.grpo.validation import ValidatedRow, summarise, validate_answer

SCRIPT = FULL  # \boxed{B}, sure to 0.9, five tokens; then reasoning, and \boxed{C}


def judged(answer, *, threshold, **options):
    ids = np.arange(len(SCRIPT))
    texts = [text for text, _ in SCRIPT]
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(texts[one] for one in ids), encode=lambda *_, **__: [])
    model = SimpleNamespace(tokenizer=tokenizer, eos_ids=frozenset({texts.index(END)}))
    logprobs = np.log([probability for _, probability in SCRIPT], dtype=np.float32)
    completion = SimpleNamespace(ids=ids, logprobs=logprobs)
    row = Row(id="a", question="Which?", answer=answer, line="rows.jsonl:1")
    group = SimpleNamespace(prompt=SimpleNamespace(row=row), completions=[completion], texts=["".join(texts[:-1])])
    return validate_answer(model, group, threshold=threshold, **{"weights": Weights(), **options})


@pytest.mark.parametrize(
    ("answer", "threshold", "first", "second", "auto", "reasoned", "tokens"),
    [
        ("C", 0.97, 0.0, 1.0, 1.0, 1.0, 19),  # not sure, so it thinks, and is right
        ("C", 0.85, 0.0, 1.0, 0.0, 0.0, 5),  # sure, and wrong
        ("B", 0.97, 1.0, 0.0, 0.0, 1.0, 19),  # talked out of it
        ("B", 0.85, 1.0, 0.0, 1.0, 0.0, 5),
        ("D", 0.85, 0.0, 0.0, 0.0, 0.0, 5),
    ],
)
def test_both_answers_and_what_stands_at_the_threshold(answer, threshold, first, second, auto, reasoned, tokens):
    found = judged(answer, threshold=threshold)
    assert (found.first, found.second, found.auto) == (first, second, auto)
    assert (found.reasoned, found.tokens, found.format) == (reasoned, tokens, 1.0)
    assert found.confidence == pytest.approx(0.9, abs=1e-6)
    assert found.reward == pytest.approx(0.9 * first + 1.1 * second + 1.0)


def test_the_users_own_reward_counts_and_what_is_right_stays():
    asked = []
    found = judged("C", threshold=0.97, own_reward=lambda text, row: asked.append((text, row.id)) or -7.5)
    assert found.reward == -7.5
    assert (found.first, found.second, found.auto, found.format) == (0.0, 1.0, 1.0, 1.0)
    assert asked == [("\\boxed{B}<think>It moves.</think>\\boxed{C}", "a")]


def test_weights_are_those_of_the_settings():
    weights = Weights(first=1.0, second=10.0, format=100.0, fallback=0.0)
    assert judged("C", threshold=0.97, weights=weights).reward == 110.0


def test_means_over_rows():
    row = {"first": 1.0, "second": 0.0, "auto": 1.0, "reasoned": 0.0, "tokens": 4, "format": 1.0, "reward": 2.0}
    other = {"first": 0.0, "second": 1.0, "auto": 1.0, "reasoned": 1.0, "tokens": 8, "format": 0.0, "reward": 3.0}
    found = summarise([ValidatedRow(**row, confidence=0.8), ValidatedRow(**other, confidence=None)])
    assert found == {
        "valid_first_accuracy": 0.5,
        "valid_second_accuracy": 0.5,
        "valid_auto_accuracy": 1.0,
        "valid_confidence": 0.8,  # of the row that has one
        "valid_think_ratio": 0.5,
        "valid_tokens": 6.0,
        "valid_format": 0.5,
        "valid_reward": 2.5,
        "valid_rows": 2,
    }
    assert summarise([ValidatedRow(**row, confidence=None)])["valid_confidence"] is None
    assert math.isclose(summarise([ValidatedRow(**row, confidence=0.5)] * 3)["valid_reward"], 2.0)
