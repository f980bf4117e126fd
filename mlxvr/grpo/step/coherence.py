r"""Coherence: how much the reasoning of a completion supports its reviewed answer.

    coherence    sigmoid(mean log p(a2 | prompt, chain) - mean log p(a2 | prompt))

that is, how much more likely the chain makes the answer than it is when it is put directly into the first box.
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlxvr.answering.confidence import answer_span
from mlxvr.answering.detokenizer import Detokenizer
from mlxvr.grading.reward import answers
from mlxvr.grpo.step.forward import completion_logprobs
from mlxvr.grpo.step.majority import is_answer
from mlxvr.grpo.step.packing import pack
from mlxvr.model.network import VideoModel
from mlxvr.model.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from mlxvr.grpo.step.rollout import Rollout

__all__ = ["coherence"]

_BOX, _END_THINK = "\\boxed{", "</think>"


def coherence(model: VideoModel, rollout: "Rollout", *, temperature: float = 1.0) -> np.ndarray:
    r"""How much the chains of a group support their reviewed answers.

    The log-probs of the answers after their chains were recorded by the rollout. Those of the direct answers take one
    packed pass over the prompt for all of them: `\boxed{a2}` for each distinct answer. As in the confidence of a direct
    answer, a choice counts by its letter alone (`mlxvr.answering.confidence.answer_span`), and every token that
    overlaps what counts is included.

    Args:
        model: the policy that sampled.
        rollout: of one prompt, with the log-probs of its tokens.
        temperature: the sampling temperature; 0 (greedy) counts as 1.

    Returns:
        float64 (G,), in [0, 1]; 0 without `</think>`, and where the reviewed answer is empty or declines.
    """
    scores = np.zeros(len(rollout.completions))
    after_chain = {}  # index of the completion -> its answer, and the answer's mean log-prob after the chain
    for index, completion in enumerate(rollout.completions):
        reviewed = _find_reviewed(np.asarray(completion.ids).tolist(), model.tokenizer)
        if reviewed is not None:
            answer, tokens = reviewed
            logprobs = np.asarray(completion.logprobs, dtype=np.float64)
            after_chain[index] = answer, float(np.mean(logprobs[tokens]))
    if not after_chain:
        return scores
    distinct = list(dict.fromkeys(answer for answer, _ in after_chain.values()))
    direct = _direct_logprobs(model, rollout, distinct, temperature)
    for index, (answer, supported) in after_chain.items():
        scores[index] = (1.0 + math.tanh((supported - direct[answer]) / 2.0)) / 2.0  # the sigmoid, without overflow
    return scores


def _find_reviewed(ids: list[int], tokenizer: ChatTokenizer) -> tuple[str, slice] | None:
    """The reviewed answer after a chain, and its tokens; None: there is none."""
    text, spans = _decode_spans(ids, tokenizer)
    chain_end = text.rfind(_END_THINK)
    answer = answers(text)[1]
    if chain_end < 0 or not is_answer(answer):
        return None
    box = re.compile(rf"{re.escape(_BOX)}\s*({re.escape(answer)})\s*\}}").search(text, chain_end)
    assert box is not None, "the answer was read from a box"
    return answer, _tokens_of(answer, box.start(1), spans)


def _direct_logprobs(
    model: VideoModel, rollout: "Rollout", distinct: Sequence[str], temperature: float
) -> dict[str, float]:
    """The mean log-prob of each answer as the content of the first box."""
    texts = [f"{_BOX}{answer}}}" for answer in distinct]
    encoded = [model.tokenizer.encode(text, literal=(0, len(text))) for text in texts]
    packed = pack(rollout.prompt, [np.array(ids, dtype=np.int32) for ids in encoded])
    logprobs = np.array(completion_logprobs(model, packed, temperature=temperature), dtype=np.float64)
    means = {}
    for answer, ids, row in zip(distinct, encoded, logprobs):
        text, spans = _decode_spans(ids, model.tokenizer)
        content = text[len(_BOX) : -1]  # the answer as the tokenizer normalises it
        means[answer] = float(np.mean(row[_tokens_of(content, len(_BOX), spans)]))
    return means


def _decode_spans(ids: Sequence[int], tokenizer: ChatTokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The text of tokens, and the characters [start, end) that each token covers."""
    detokenizer = Detokenizer(tokenizer.decode)
    text = "".join([detokenizer.push(token) for token in ids]) + detokenizer.flush()
    return text, detokenizer.spans


def _tokens_of(answer: str, offset: int, spans: Sequence[tuple[int, int]]) -> slice:
    """The tokens that overlap the counted part of an answer whose first character is at `offset`."""
    start, stop = (offset + end for end in answer_span(answer))
    tokens = [token for token, (begin, end) in enumerate(spans) if begin < stop and end > start]
    return slice(tokens[0], tokens[-1] + 1)
