"""Prefill and decoding: the same tokens as transformers, and the state that is left when a caller stops."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import random_media

from mlxvr.errors import Cancelled, CheckpointError, ConfigError, MlxvrError
from mlxvr.media.patches import normalise
from mlxvr.model import cache as kv
from mlxvr.model.decode import Decoder, Sampler, decode, prefill
from mlxvr.model.loading import load_model
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import Prompt, build_prompt


@pytest.fixture(scope="module", params=checkpoints.FAMILIES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("decode") / request.param, request.param)


@pytest.fixture(scope="module")
def model(path: Path) -> VideoModel:
    return load_model(path)


@pytest.fixture(scope="module")
def prompt(model: VideoModel) -> Prompt:
    family = model.family.name
    media = [
        random_media(family, "video", (4, 6, 10), second_per_grid=0.75),
        random_media(family, "image", (1, 4, 6), seed=1),
        random_media(family, "video", (2, 4, 4), seed=2),
    ]
    return build_prompt(model.tokenizer, model.family, model.config, media, "What happens?")


def read(model: VideoModel, prompt: Prompt, **options: object) -> tuple[mx.array, list]:
    cache = model.make_cache()
    features = model.encode(prompt.media)
    mask = prompt.media_mask
    logits = prefill(model, prompt.ids, prompt.positions, cache, features=features, media_mask=mask, **options)
    return logits, cache


def full_logits(model: VideoModel, prompt: Prompt, ids: list[int]) -> np.ndarray:
    """Logits of the last prompt token and of every token of `ids`, in one pass without a cache."""
    positions = prompt.next_position + np.arange(len(ids), dtype=np.int32)
    hidden = model.hidden(
        mx.array(np.concatenate([prompt.ids, np.array(ids, np.int32)]))[None],
        mx.array(np.concatenate([prompt.positions, np.tile(positions, (3, 1))], axis=1))[:, None],
        features=model.encode(prompt.media),
        media_mask=np.concatenate([prompt.media_mask, np.zeros(len(ids), bool)])[None],
    )
    return np.array(model.logits(hidden)[0, len(prompt.ids) - 1 :])


@pytest.mark.parity
def test_64_greedy_tokens_are_those_of_transformers(model: VideoModel, path: Path, prompt: Prompt) -> None:
    pytest.importorskip("torch")
    from reference import Reference

    reference = Reference(path, model.family.name)
    pixels = [normalise(one.patches, model.spec) for one in prompt.media]
    expected = reference.greedy(reference.inputs(prompt.ids, prompt.media, pixels), 64)
    for step_size in (2048, 50):
        logits, cache = read(model, prompt, step_size=step_size)
        tokens = list(decode(model, logits, cache, prompt.next_position, max_tokens=64, suppress_tokens=()))
        assert [token.id for token in tokens] == expected
    assert len(set(expected)) > 4  # it does not just repeat itself


def test_logprobs_are_those_of_the_whole_distribution(model: VideoModel, prompt: Prompt) -> None:
    logits, cache = read(model, prompt)
    tokens = list(decode(model, logits, cache, prompt.next_position, max_tokens=12))
    rows = full_logits(model, prompt, [token.id for token in tokens]).astype(np.float64)
    for row, token in zip(rows, tokens):
        expected = row[token.id] - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert token.logprob == pytest.approx(expected, abs=1e-4)
        assert row[token.id] == pytest.approx(row.max(), abs=1e-4)


def test_stopping_and_going_on_changes_nothing(model: VideoModel, prompt: Prompt) -> None:
    logits, cache = read(model, prompt)
    whole = list(decode(model, logits, cache, prompt.next_position, max_tokens=20))
    kv.trim(cache, len(prompt.ids))
    tokens = decode(model, logits, cache, prompt.next_position, max_tokens=20)
    first = list(itertools.islice(tokens, 7))
    mx.synchronize()  # whatever happens in between
    assert first + list(tokens) == whole


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_a_closed_iterator_leaves_prompt_and_tokens(model: VideoModel, prompt: Prompt, taken: int) -> None:
    logits, cache = read(model, prompt)
    tokens = decode(model, logits, cache, prompt.next_position, max_tokens=20)
    ids = [token.id for token in itertools.islice(tokens, taken)]
    tokens.close()
    assert kv.length(cache) == len(prompt.ids) + taken
    # and what comes next can be read on the same cache
    more = np.array([5, 6, 7], np.int32)
    positions = prompt.next_position + taken + np.arange(3, dtype=np.int32)
    logits = prefill(model, more, np.tile(positions, (3, 1)), cache)
    expected = full_logits(model, prompt, [*ids, 5, 6, 7])[-1]
    np.testing.assert_allclose(np.array(logits), expected, atol=2e-4)


def test_a_failure_leaves_the_same(model: VideoModel, prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network has read a token that is never handed out, for example because of Ctrl-C."""
    logits, cache = read(model, prompt)
    tokens = decode(model, logits, cache, prompt.next_position, max_tokens=20)
    list(itertools.islice(tokens, 3))

    def fail(hidden: mx.array) -> mx.array:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "logits", fail)
    with pytest.raises(KeyboardInterrupt):
        next(tokens)
    assert kv.length(cache) == len(prompt.ids) + 3


@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_exhausted_iterator_leaves_the_same(model: VideoModel, prompt: Prompt, count: int) -> None:
    logits, cache = read(model, prompt)
    assert len(list(decode(model, logits, cache, prompt.next_position, max_tokens=count))) == count
    assert kv.length(cache) == len(prompt.ids) + count


def test_a_stop_token_is_handed_out_and_ends_it(model: VideoModel, prompt: Prompt) -> None:
    logits, cache = read(model, prompt)
    ids = [token.id for token in decode(model, logits, cache, prompt.next_position, max_tokens=20)]
    stop = ids[9]
    end = ids.index(stop) + 1
    kv.trim(cache, len(prompt.ids))
    tokens = decode(model, logits, cache, prompt.next_position, max_tokens=20, stop_ids={stop})
    assert [token.id for token in tokens] == ids[:end]
    assert kv.length(cache) == len(prompt.ids) + end


def test_banned_tokens_are_not_chosen_and_the_rest_keeps_its_probability(model: VideoModel, prompt: Prompt) -> None:
    logits, cache = read(model, prompt)
    order = np.argsort(-np.array(logits))
    (token,) = decode(model, logits, cache, prompt.next_position, max_tokens=1, suppress_tokens=order[:2].tolist())
    assert token.id == order[2]
    expected = np.array(logits - mx.logsumexp(logits))[order[2]]
    assert token.logprob == pytest.approx(float(expected), abs=1e-6)


SUPPRESSED = {"<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"}


def test_visual_placeholders_are_never_written(
    model: VideoModel, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is asked for; greedily and sampled; the log-probs are still those of the whole distribution."""
    never = {model.tokenizer.special_ids[text] for text in SUPPRESSED}
    assert model.suppress_tokens == never
    push = np.zeros(checkpoints.VOCABULARY, np.float32)
    push[sorted(never)] = 30.0
    whole = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: whole(hidden) + mx.array(push))
    logits, cache = read(model, prompt)
    for sampler in (None, Sampler(1.0, seed=0)):
        kv.trim(cache, len(prompt.ids))
        tokens = list(decode(model, logits, cache, prompt.next_position, max_tokens=8, sampler=sampler))
        assert not never & {token.id for token in tokens}
        rows = full_logits(model, prompt, [token.id for token in tokens]).astype(np.float64)
        for row, token in zip(rows, tokens):
            assert token.logprob == pytest.approx(row[token.id] - row.max() - np.log(np.exp(row - row.max()).sum()))
    kv.trim(cache, len(prompt.ids))
    (token,) = decode(model, logits, cache, prompt.next_position, max_tokens=1, suppress_tokens=())
    assert token.id in never


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_logits_that_are_not_finite_are_refused(
    model: VideoModel, prompt: Prompt, monkeypatch: pytest.MonkeyPatch, value: float, dtype: str
) -> None:
    """Of the prompt, and those that turn bad while an answer is written; what was handed out stays in the cache."""
    advice = {
        "float16": "float16 overflowed .*: use --dtype bfloat16 or float32",
        "bfloat16": "in bfloat16: use --dtype float32",
        "float32": "in float32: get the checkpoint again",
    }
    monkeypatch.setattr(VideoModel, "dtype", getattr(mx, dtype))
    logits, cache = read(model, prompt)
    bad = mx.array([value] + [0.0] * (checkpoints.VOCABULARY - 1))
    whole = model.logits
    for good in (0, 3):
        kv.trim(cache, len(prompt.ids))
        calls = itertools.count(1)  # the call after token n gives the logits of token n + 1

        def spoilt(hidden: mx.array, calls: Iterator[int] = calls, good: int = good) -> mx.array:
            return whole(hidden) + (bad if next(calls) >= good else 0.0)

        monkeypatch.setattr(model, "logits", spoilt)
        tokens = decode(model, logits if good else logits + bad, cache, prompt.next_position, max_tokens=9)
        assert len(list(itertools.islice(tokens, good))) == good
        with pytest.raises(MlxvrError, match=advice[dtype]) as raised:
            next(tokens)
        assert isinstance(raised.value, ConfigError if dtype == "float16" else CheckpointError)
        assert kv.length(cache) == len(prompt.ids) + good


def test_the_head_runs_for_the_last_token_of_a_prompt_alone(
    model: VideoModel, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of a prompt's other tokens would take more memory than anything else."""
    rows: list[int] = []
    whole = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (rows.append(hidden.size // 64), whole(hidden))[1])
    for step_size in (2048, 50):
        logits, cache = read(model, prompt, step_size=step_size)
    list(decode(model, logits, cache, prompt.next_position, max_tokens=4))
    assert rows == [1, 1, 1, 1, 1, 1]


def test_the_decoder_says_where_it_is(model: VideoModel, prompt: Prompt) -> None:
    logits, cache = read(model, prompt)
    decoder = Decoder(model, logits, cache, prompt.next_position)
    first, second = next(decoder), next(decoder)
    assert decoder.position == prompt.next_position + 2
    assert kv.length(cache) == len(prompt.ids) + 2
    expected = full_logits(model, prompt, [first.id, second.id])[-1]
    np.testing.assert_allclose(np.array(decoder.logits), expected, atol=2e-4)
    third = next(decoder)
    assert third.id == expected.argmax()


def test_progress_and_chunks(model: VideoModel, prompt: Prompt) -> None:
    calls: list[tuple[str, int, int]] = []
    _, cache = read(model, prompt, step_size=100, progress=lambda *call: calls.append(call))
    total = len(prompt.ids)
    assert calls == [("prefill", min(done, total), total) for done in range(100, total + 100, 100)]
    assert kv.length(cache) == total


def test_the_last_token_of_a_long_step_goes_alone(
    model: VideoModel, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, _ = read(model, prompt)
    monkeypatch.setattr("mlxvr.model.decode._LONG_STEP", 100)
    calls: list[int] = []
    logits, cache = read(model, prompt, progress=lambda stage, done, total: calls.append(done))
    assert calls == [len(prompt.ids) - 1, len(prompt.ids)]
    assert kv.length(cache) == len(prompt.ids)
    np.testing.assert_allclose(np.array(logits), np.array(together), atol=1e-4)


def test_prefill_can_be_stopped_between_chunks(model: VideoModel, prompt: Prompt) -> None:
    cache, answers = model.make_cache(), iter([False, False, True])
    with pytest.raises(Cancelled):
        prefill(
            model,
            prompt.ids,
            prompt.positions,
            cache,
            features=model.encode(prompt.media),
            media_mask=prompt.media_mask,
            step_size=50,
            should_stop=lambda: next(answers),
        )
    assert kv.length(cache) == 100


def test_what_cannot_be_read(model: VideoModel, prompt: Prompt) -> None:
    cache = model.make_cache()
    with pytest.raises(ConfigError, match="prompt is empty"):
        prefill(model, prompt.ids[:0], prompt.positions[:, :0], cache)
    with pytest.raises(ConfigError, match="step size is 0"):
        prefill(model, prompt.ids, prompt.positions, cache, step_size=0)
    with pytest.raises(ValueError, match="rows of visual features"):
        prefill(
            model,
            prompt.ids,
            prompt.positions,
            cache,
            features=model.encode(prompt.media[:1]),
            media_mask=prompt.media_mask,
        )


# Sampling: against the distribution itself.

PROBABILITIES = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
LOGITS = np.log(PROBABILITIES).astype(np.float32)


def frequencies(sampler: Sampler, draws: int = 20_000) -> np.ndarray:
    ids = np.array(sampler(mx.broadcast_to(mx.array(LOGITS), (draws, 5))))
    return np.bincount(ids, minlength=5) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_tempered_distribution(temperature: float) -> None:
    expected = PROBABILITIES ** (1 / temperature)
    expected /= expected.sum()
    np.testing.assert_allclose(frequencies(Sampler(temperature, seed=1)), expected, atol=0.015)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.8, 3), (0.95, 4), (1.0, 5)])
def test_the_nucleus_is_the_smallest_set_that_holds_top_p(top_p: float, kept: int) -> None:
    found = frequencies(Sampler(1.0, top_p=top_p, seed=2))
    expected = np.where(np.arange(5) < kept, PROBABILITIES, 0)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.015)
    assert (found[kept:] == 0).all()


def test_a_token_that_begins_where_the_nucleus_ends_is_not_in_it() -> None:
    """Four tokens of exactly a quarter each: two of them hold a half."""
    ids = np.array(Sampler(1.0, top_p=0.5, seed=2)(mx.zeros((2_000, 4))))
    assert len(np.unique(ids)) == 2


def test_a_seed_is_repeatable_whatever_else_is_drawn(model: VideoModel, prompt: Prompt) -> None:
    logits, cache = read(model, prompt)

    def draw(seed: int | None) -> list[int]:
        kv.trim(cache, len(prompt.ids))
        mx.random.normal((3,))
        sampler = Sampler(1.5, seed=seed)
        tokens = decode(model, logits, cache, prompt.next_position, max_tokens=12, sampler=sampler)
        return [token.id for token in tokens]

    assert draw(7) == draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_logprobs_of_samples_are_untempered(model: VideoModel, prompt: Prompt) -> None:
    logits, cache = read(model, prompt)
    sampler = Sampler(3.0, seed=3)
    (token,) = decode(model, logits, cache, prompt.next_position, max_tokens=1, sampler=sampler)
    expected = np.array(logits - mx.logsumexp(logits))[token.id]
    assert token.logprob == pytest.approx(float(expected), abs=1e-6)
    assert not math.isclose(
        token.logprob, float(np.array(logits / 3 - mx.logsumexp(logits / 3))[token.id]), abs_tol=1e-3
    )


@pytest.mark.parametrize(
    ("temperature", "top_p", "words"),
    [
        (0.0, 1.0, "temperature 0.0"),
        (-1.0, 1.0, "temperature"),
        (math.nan, 1.0, "temperature"),
        (1.0, 0.0, "top_p"),
        (1.0, 1.1, "top_p"),
    ],
)
def test_samplers_that_cannot_be(temperature: float, top_p: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampler(temperature, top_p=top_p)
