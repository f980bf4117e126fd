r"""Rewards without labels against groups worked by hand, and coherence against one completion at a time."""

import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import FAMILIES
from groups import make_group, tiny_model
from qwen_tokenizer import qwen

from mlxvr.answering.transcript import FALLBACK
from mlxvr.errors import ConfigError, DataError
from mlxvr.grading.reward import Weights, score
from mlxvr.grpo.step import coherence as coherence_module
from mlxvr.grpo.step.coherence import coherence
from mlxvr.grpo.step.label_free_rewards import agreement, label_free_reward
from mlxvr.model.network import VideoModel


def said(first: str, second: str) -> str:
    return f"\\boxed{{{first}}}<think>look</think>\\boxed{{{second}}}"


NO_FIRST = "<think>look</think>\\boxed{A}"
NO_SECOND = "\\boxed{A}<think>look</think>"
TWO_BOXES = "\\boxed{A}<think>look</think>\\boxed{A} \\boxed{A}"

# kind, completions, their agreement
GROUPS = {
    "majority": (
        "exact_match",
        [said("A", "A"), said("B", "A"), said(FALLBACK, "A"), said("B", "B"), NO_FIRST, NO_SECOND],
        [1, 0.75, 1, 0, 0.75, 0],
    ),
    "one answer in many spellings": (
        "exact_match",
        [said("A", "(A)"), said("a)", "a"), said("B", "b")],
        [1, 1, 0],
    ),
    "two largest classes": ("exact_match", [said(one, one) for one in "AABBC"], [0.5, 0.5, 0.5, 0.5, 0]),
    "two largest, one disagrees with itself": (
        "exact_match",
        [said("A", "A"), said("B", "A"), said("B", "B"), said("B", "B")],
        [0.5, 0.375, 0.5, 0.5],
    ),
    "all differ": ("exact_match", [said(one, one) for one in "ABCD"], [0, 0, 0, 0]),
    "one answer": ("exact_match", [said("A", "A"), NO_SECOND, TWO_BOXES], [0, 0, 0]),
    "one completion": ("exact_match", [said("A", "A")], [0]),
    "none": ("exact_match", [], []),
    "declining is no vote": ("exact_match", [said("A", FALLBACK)] * 3 + [said("A", "A")] * 2, [0, 0, 0, 1, 1]),
    # IoU of 1 and 2 is 1/2, of 1 and 3 is 1/2, of 2 and 3 is 0
    "intervals": (
        "iou",
        [said(one, one) for one in ("[0, 10]", "[0, 5]", "[5, 10]")],
        [0.5, 0.25, 0.25],
    ),
    "intervals, own": (
        "iou",
        [said("[0, 5]", "[0, 10]"), said(FALLBACK, "[0, 10]"), said("[2, 3]", "no idea"), NO_SECOND],
        [0.5 * 0.875, 0.5, 0, 0],
    ),
    # (1 + 1/2) / 2, (0 + 1) / 2 and (0 + 1/2) / 2
    "grounded": (
        "gqa",
        [said(one, one) for one in ("A <> [0, 10]", "A <> [0, 5]", "B <> [0, 10]")],
        [0.625, 0.5, 0.375],
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_agreement_as_worked_by_hand(name: str) -> None:
    kind, texts, expected = GROUPS[name]
    np.testing.assert_allclose(agreement(texts, kind), expected, atol=1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_agreement_does_not_depend_on_the_order(name: str) -> None:
    kind, texts, _ = GROUPS[name]
    np.testing.assert_allclose(agreement(texts[::-1], kind), agreement(texts, kind)[::-1], atol=1e-12)


def test_formulas_agree_by_their_value() -> None:
    pytest.importorskip("math_verify")
    texts = [said("1/2", "0.5"), said("$\\frac{1}{2}$", "1/2"), said("0.5", "2")]
    np.testing.assert_allclose(agreement(texts, "math"), [1, 1, 0])
    written = [said("$\\sqrt{8}$", "2\\sqrt{2}"), said("2\\sqrt{2}", "$\\sqrt{8}$")]  # which is first does not matter
    np.testing.assert_allclose(agreement(written, "math"), [1, 1])
    np.testing.assert_allclose(agreement(written[::-1], "math"), [1, 1])


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(DataError, match="'essay'"):
        agreement([said("A", "A"), said("A", "A")], "essay")


def test_the_reward_as_worked_by_hand() -> None:
    texts = [said("A", "A"), said("B", "A"), said(FALLBACK, "A"), said("A", "B"), "A: " + said(FALLBACK, "A")]
    parts = {
        "agreement": np.array([1.0, 0.75, 1.0, 0.0, 1.0]),
        "coherence": np.array([0.5, 0.25, 0.6, 0.3, 0.4]),
    }
    found = label_free_reward(parts, texts, "exact_match", weights=Weights())
    assert [one.first for one in found] == [1, 0, 0, 1, 0]
    assert [one.second for one in found] == pytest.approx([0.75, 0.5, 0.8, 0.15, 0.7])
    assert [one.format for one in found] == [1, 1, 1, 1, 0]
    assert [one.fallback for one in found] == [0, 0, 1, 0, 0]  # 0.7 is not above 0.7
    assert [one.total for one in found] == pytest.approx([2.725, 1.55, 2.18, 2.065, 0.77])
    weights = Weights(first=1.0, second=10.0, format=100.0, fallback=1000.0)
    assert label_free_reward(parts, texts, "exact_match", weights=weights)[2].total == pytest.approx(1108.0)
    alone = label_free_reward({"coherence": parts["coherence"]}, texts, "exact_match")
    assert [one.second for one in alone] == pytest.approx(parts["coherence"])


def test_a_first_answer_counts_by_the_other_completions_intervals() -> None:
    texts = [said("[0, 10]", "[90, 91]"), said("[0, 10]", "[0, 10]"), said("[0, 5]", "[0, 5]")]
    found = label_free_reward({"agreement": agreement(texts, "iou")}, texts, "iou")
    # of the first: 1 and 1/2 with the others; of the second: 0 and 1/2; of the third: 0 and 1/2
    assert [one.first for one in found] == pytest.approx([0.75, 0.25, 0.25])
    assert [one.second for one in found] == pytest.approx([0, 0.25, 0.25])


def test_where_the_majority_is_right_it_pays_what_the_label_would() -> None:
    texts = [said("A", "A"), said("A", "A"), said(FALLBACK, "A"), said("C", "B"), said(FALLBACK, "C"), NO_SECOND]
    found = label_free_reward({"agreement": agreement(texts, "exact_match")}, texts, "exact_match")
    assert found == [score(text, "A") for text in texts]


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ({}, ConfigError),
        ({"length": np.zeros(2)}, ConfigError),
        ({"agreement": np.zeros(3)}, ValueError),
    ],
)
def test_scores_that_do_not_fit_are_refused(parts: dict[str, np.ndarray], error: type[Exception]) -> None:
    with pytest.raises(error):
        label_free_reward(parts, [said("A", "A")] * 2, "exact_match")


# Coherence -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VideoModel:
    return tiny_model(tmp_path_factory.mktemp("labelfree") / "m", request.param)


def naive_logprobs(model: VideoModel, prompt: SimpleNamespace, ids: list[int], temperature: float) -> np.ndarray:
    """(T,) of one completion, from the whole sequence and all of its logits."""
    after = np.tile(prompt.next_position + np.arange(len(ids)), (3, 1))
    hidden = model.hidden(
        mx.array(np.concatenate([prompt.ids, ids]).astype(np.int32))[None],
        mx.array(np.concatenate([prompt.positions, after], axis=1).astype(np.int32))[:, None],
        features=prompt.features,
        media_mask=np.concatenate([prompt.media_mask, np.zeros(len(ids), dtype=bool)])[None],
    )
    logits = np.array(model.logits(hidden[0]).astype(mx.float32), dtype=np.float64)[len(prompt.ids) - 1 : -1]
    logits /= temperature
    return logits[np.arange(len(ids)), ids] - np.log(np.exp(logits).sum(axis=-1))


def tokens_of(model: VideoModel, ids: list[int], answer: str) -> list[int]:
    """The tokens of the last place where an ASCII answer stands, found by the lengths of their texts."""
    pieces = [model.tokenizer.decode([token]) for token in ids]
    ends = np.cumsum([len(piece) for piece in pieces])
    start = "".join(pieces).rindex(answer)
    return [index for index, end in enumerate(ends) if end > start and end - len(pieces[index]) < start + len(answer)]


def roll(model: VideoModel, texts: list[str], temperature: float = 1.0) -> SimpleNamespace:
    """A rollout of these texts, with the naive log-probs."""
    prompt = make_group(model, lengths=(1,)).prompt
    end = model.tokenizer.encode("<|im_end|>")
    completions = []
    for text in texts:
        ids = model.tokenizer.encode(text) + end
        logprobs = naive_logprobs(model, prompt, ids, temperature).astype(np.float32)
        completions.append(
            SimpleNamespace(ids=np.array(ids, dtype=np.int32), logprobs=logprobs, text=text, truncated=False)
        )
    return SimpleNamespace(prompt=prompt, completions=tuple(completions))


# completion, the answer as it is put directly, what of it counts
CHAINS = [
    ("\\boxed{A}<think>Two dogs, so \\boxed{C}.</think>\\boxed{B}", "B", "B"),
    ("\\boxed{B}<think>It is a cat.</think>\\boxed{ (B) the red cup }", "(B) the red cup", "B"),
    ("\\boxed{A}<think>It starts late</think>\n\n\\boxed{[1.5, 12.0]}", "[1.5, 12.0]", "[1.5, 12.0]"),
    ("<think>no first box</think>So: \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "\\frac{1}{2}"),
    ("\\boxed{B}<think>B</think>\\boxed{B}", "B", "B"),
]
WITHOUT = [
    "\\boxed{B}",
    NO_SECOND,
    TWO_BOXES,
    said("A", " "),
    said("A", FALLBACK),
    "\\boxed{A}<think>cut off \\boxed{B}",
    "\\boxed{A}<think>x</think>\\boxed{B",
]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_coherence_is_the_naive_one(model: VideoModel, temperature: float) -> None:
    rollout = roll(model, [text for text, _, _ in CHAINS] + WITHOUT, temperature)
    expected = []
    for (_, answer, counts), one in zip(CHAINS, rollout.completions):
        ids = model.tokenizer.encode(f"\\boxed{{{answer}}}")
        direct = naive_logprobs(model, rollout.prompt, ids, temperature)[tokens_of(model, ids, counts)].mean()
        supported = one.logprobs[tokens_of(model, one.ids.tolist(), counts)].mean()
        expected.append(1.0 / (1.0 + math.exp(direct - supported)))
    assert np.ptp(expected) > 0.01  # a random model has little to say; the comparison is finer
    found = coherence(model, rollout, temperature=temperature)
    np.testing.assert_allclose(found, expected + [0.0] * len(WITHOUT), atol=2e-5)


def test_one_pass_for_every_answer_that_differs(model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    run = coherence_module.completion_logprobs

    def count(model, packed, **options):
        passes.append(packed.mask.shape[0])
        return run(model, packed, **options)

    monkeypatch.setattr(coherence_module, "completion_logprobs", count)
    coherence(model, roll(model, [said("A", "B"), said("C", "B"), said("A", " A"), NO_SECOND]))
    assert passes == [2]
    assert coherence(model, roll(model, WITHOUT)).tolist() == [0.0] * len(WITHOUT)
    assert passes == [2]


def test_every_byte_of_a_character_counts(model: VideoModel) -> None:
    ids = model.tokenizer.encode(said("A", "世界"))
    rollout = roll(model, [said("A", "世界")])
    stop = max(index for index, token in enumerate(ids) if "}" in model.tokenizer.decode([token]))
    start = max(index for index, token in enumerate(ids) if "{" in model.tokenizer.decode([token])) + 1
    assert stop - start > 2
    alone = model.tokenizer.encode("\\boxed{世界}")
    direct = naive_logprobs(model, rollout.prompt, alone, 1.0)[-1 - (stop - start) : -1].mean()
    supported = rollout.completions[0].logprobs[start:stop].mean()
    assert coherence(model, rollout)[0] == pytest.approx(1 / (1 + math.exp(direct - supported)), abs=2e-5)


# answer, the pieces of it that count in the real tokenizer, whose `}` is often a part of something else
PIECES = {
    "(B)": ["B"],
    "[1.5, 2.0]": ["[", "1", ".", "5", ",", " ", "2", ".", "0", "]}"],
    "the red cup": ["the", " red", " cup"],
}


@pytest.mark.parametrize("flavour", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize("answer", PIECES)
def test_only_the_answers_tokens_count(answer: str, flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the chain they get -1, directly -2.5, and everything else -90: the sigmoid of 1.5."""
    tokenizer = qwen(flavour)
    counting = PIECES[answer]

    def logprobs_of(ids: list[int], value: float) -> np.ndarray:
        pieces = [tokenizer.decode([token]) for token in ids]
        size = len(counting)
        start = max(at for at in range(len(pieces) - size + 1) if pieces[at : at + size] == counting)
        logprobs = np.full(len(ids), -90.0, dtype=np.float32)
        logprobs[start : start + size] = value
        return logprobs

    def encode(text: str, *, literal: tuple[int, int]) -> list[int]:
        assert literal == (0, len(text))  # no control characters from an answer
        return tokenizer.encode(text)

    prompt = SimpleNamespace(
        ids=np.zeros(1, np.int32),
        positions=np.zeros((3, 1), np.int32),
        media_mask=np.zeros(1, bool),
        features=None,
        next_position=1,
    )
    ids = tokenizer.encode(f"\\boxed{{{answer}}}<think>It is {answer}</think>\\boxed{{{answer}}}<|im_end|>")
    completion = SimpleNamespace(ids=np.array(ids, np.int32), logprobs=logprobs_of(ids, -1.0))
    monkeypatch.setattr(
        coherence_module,
        "completion_logprobs",
        lambda _, packed, **__: logprobs_of(packed.targets[0].tolist(), -2.5)[None],
    )
    fake = SimpleNamespace(tokenizer=SimpleNamespace(encode=encode, decode=tokenizer.decode))
    found = coherence(fake, SimpleNamespace(prompt=prompt, completions=(completion,)))
    assert found == pytest.approx([1 / (1 + math.exp(-1.5))])
    completion.logprobs = completion.logprobs * 1e6
    assert coherence(fake, SimpleNamespace(prompt=prompt, completions=(completion,))).tolist() == [0.0]
