"""Rollouts: against decoding one by one, and against the training pass over the same tokens."""

import dataclasses
import sys

import checkpoints
import groups
import mlx.core as mx
import numpy as np
import pytest

from mlxvr.answering.sampling_config import SamplingConfig
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.data.rows import Row, load_rows
from mlxvr.errors import Cancelled, ConfigError, DataError
from mlxvr.grpo.step.gradient import group_logprobs
from mlxvr.grpo.step.prompts import EncodedPrompt, encode_row
from mlxvr.grpo.step.rollout import rollout
from mlxvr.model.decode import decode, prefill
from mlxvr.model.loading import load_model

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=FAMILIES)
def group(request, tmp_path_factory):
    """A random model and a prompt with a video and an image."""
    model = groups.tiny_model(tmp_path_factory.mktemp("m") / "m", request.param)
    made = groups.make_group(model).prompt
    row = Row(id="r", question="What happens?", answer="A", line="rows.jsonl:1")
    return model, EncodedPrompt(**{**vars(made), "row": row})


@pytest.fixture(scope="module")
def demo():
    return load_model(demo_folder() / "checkpoint", dtype="float32")


def many_ends(model, share=0.05):
    """Let a random model end its turns now and then."""
    size = int(model.config["text_config"]["vocab_size"])
    rng = np.random.default_rng(0)
    return frozenset(rng.choice(size, int(size * share), replace=False).tolist())


def one_by_one(model, prompt, tokens):
    """Log-probs of a completion, decoded alone: (T,)."""
    cache = model.make_cache()
    logits = prefill(model, prompt.ids, prompt.positions, cache, features=prompt.features, media_mask=prompt.media_mask)
    found = []
    for step, token in enumerate(tokens):
        found.append(float(logits[token] - mx.logsumexp(logits)))
        place = mx.full((3, 1, 1), prompt.next_position + step, dtype=mx.int32)
        hidden = model.hidden(mx.array([[token]]), place, cache=cache)
        logits = model.logits(hidden[:, -1])[0].astype(mx.float32)
    return np.array(found)


def test_logprobs_are_those_of_decoding_alone_and_of_the_training_pass(group, monkeypatch):
    model, prompt = group
    monkeypatch.setattr(model.tokenizer, "eos_ids", many_ends(model))
    made = rollout(model, prompt, SamplingConfig(max_tokens=24, seed=3, temperature=1.0), group_size=6)
    lengths = [len(one.ids) for one in made.completions]
    assert len(set(lengths)) > 2, "completions of one length show little"
    packed = group_logprobs(model, made)
    for index, one in enumerate(made.completions):
        np.testing.assert_allclose(one.logprobs, one_by_one(model, prompt, one.ids.tolist()), atol=2e-5)
        np.testing.assert_allclose(one.logprobs, packed[index, : len(one.ids)], atol=2e-5)


def test_logprobs_are_those_of_the_temperature(group):
    model, prompt = group
    made = rollout(model, prompt, SamplingConfig(max_tokens=8, temperature=0.7, seed=1), group_size=3)
    packed = group_logprobs(model, made, temperature=0.7)
    for index, one in enumerate(made.completions):
        np.testing.assert_allclose(one.logprobs, packed[index, : len(one.ids)], atol=2e-5)


def test_greedy_is_what_decode_gives(group):
    model, prompt = group
    cache = model.make_cache()
    logits = prefill(model, prompt.ids, prompt.positions, cache, features=prompt.features, media_mask=prompt.media_mask)
    tokens = list(
        decode(
            model,
            logits,
            cache,
            prompt.next_position,
            max_tokens=12,
            stop_ids=model.eos_ids,
        )
    )
    made = rollout(model, prompt, SamplingConfig(max_tokens=12, temperature=0.0, seed=0), group_size=2)
    for one in made.completions:
        assert one.ids.tolist() == [token.id for token in tokens]
        np.testing.assert_allclose(one.logprobs, [token.logprob for token in tokens], atol=2e-5)


def test_a_seed_decides(group):
    model, prompt = group

    def ids(seed):
        made = rollout(model, prompt, SamplingConfig(max_tokens=10, seed=seed, temperature=1.0), group_size=4)
        return [one.ids.tolist() for one in made.completions]

    assert ids(5) == ids(5)
    assert ids(5) != ids(6)
    assert len({tuple(one) for one in ids(5)}) == 4, "completions of a group are drawn independently"


def test_samples_follow_the_distribution(group):
    """First tokens of many completions: each as often as its probability says."""
    model, prompt = group
    cache = model.make_cache()
    logits = prefill(model, prompt.ids, prompt.positions, cache, features=prompt.features, media_mask=prompt.media_mask)
    size, temperature = 4000, 0.2
    drawn = rollout(model, prompt, SamplingConfig(max_tokens=1, temperature=temperature, seed=0), group_size=size)
    counts = np.bincount([one.ids[0] for one in drawn.completions], minlength=logits.size)
    expected = np.array(mx.softmax(logits / temperature)) * size
    often = expected > 20
    assert often.sum() >= 5
    assert (np.abs(counts - expected)[often] < 5 * np.sqrt(expected[often])).all()


def test_ended_and_truncated(group, monkeypatch):
    model, prompt = group
    monkeypatch.setattr(model.tokenizer, "eos_ids", many_ends(model))
    made = rollout(model, prompt, SamplingConfig(max_tokens=12, seed=1, temperature=1.0), group_size=8)
    ended = [one for one in made.completions if not one.truncated]
    cut = [one for one in made.completions if one.truncated]
    assert ended
    assert cut
    for one in ended:
        assert one.ids[-1] in model.eos_ids
        assert not set(one.ids[:-1].tolist()) & model.eos_ids
        assert one.text == model.tokenizer.decode(one.ids[:-1].tolist())
    for one in cut:
        assert len(one.ids) == 12
        assert not set(one.ids.tolist()) & model.eos_ids
        assert one.text == model.tokenizer.decode(one.ids.tolist())


def test_visual_placeholders_are_never_drawn(group, monkeypatch):
    """As in `decode`; their share stays with them, here and in the training pass, so that the two agree."""
    model, prompt = group
    logits = model.logits
    push = np.zeros(int(model.config["text_config"]["vocab_size"]), np.float32)
    push[sorted(model.suppress_tokens)] = 20.0
    monkeypatch.setattr(model, "logits", lambda hidden: logits(hidden) + mx.array(push))
    made = rollout(model, prompt, SamplingConfig(max_tokens=6, seed=0, temperature=1.0), group_size=4)
    packed = group_logprobs(model, made)
    for index, one in enumerate(made.completions):
        assert not model.suppress_tokens & set(one.ids.tolist())
        np.testing.assert_allclose(one.logprobs, packed[index, : len(one.ids)], atol=1e-4)
        assert one.logprobs.max() < -8


def test_what_float16_cannot_hold_is_refused_by_name(group, tmp_path):
    model, prompt = group
    folder = tmp_path / "m"
    checkpoints.write_checkpoint(folder, model.family.name, dtype="BF16", weights=checkpoints.overflow_float16)
    half = load_model(folder, dtype="float16")
    with pytest.raises(ConfigError, match="float16 overflowed"):
        rollout(half, prompt, SamplingConfig(max_tokens=4, seed=0, temperature=1.0), group_size=2)


def test_the_context_ends_a_completion(group, monkeypatch):
    model, prompt = group
    monkeypatch.setitem(model.config["text_config"], "max_position_embeddings", len(prompt.ids) + 3)
    made = rollout(model, prompt, SamplingConfig(max_tokens=50, seed=0, temperature=1.0), group_size=2)
    assert max(len(one.ids) for one in made.completions) == 3
    monkeypatch.setitem(model.config["text_config"], "max_position_embeddings", len(prompt.ids))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .* no room"):
        rollout(model, prompt, SamplingConfig(max_tokens=50, seed=0, temperature=1.0), group_size=2)


def test_refused_and_stopped(group):
    model, prompt = group
    with pytest.raises(ConfigError, match="must be positive"):
        rollout(model, prompt, SamplingConfig(max_tokens=4, seed=0, temperature=1.0), group_size=0)
    with pytest.raises(Cancelled):
        rollout(
            model, prompt, SamplingConfig(max_tokens=4, seed=0, temperature=1.0), group_size=2, should_stop=lambda: True
        )


def test_rows_of_the_bundled_world(demo):
    """Real clips: the greedy completion is the answer that the reasoner gives."""
    import mlxvr

    row = next(row for row in load_rows(demo_folder() / "clips.jsonl") if row.task != "" and row.options)
    prompt = encode_row(demo, row)
    made = rollout(demo, prompt, SamplingConfig(max_tokens=200, temperature=0.0, seed=0), group_size=1)
    with mlxvr.load(dtype="float32") as reasoner, reasoner.open(row.video) as clip:
        answer = clip.ask(row.text, options=row.options, kind=row.ask_kind, mode="think")
    assert made.completions[0].ids.tolist() == list(answer.token_ids)
    np.testing.assert_allclose(made.completions[0].logprobs, answer.token_logprobs, atol=1e-4)


def test_the_beginning_of_an_answer_is_part_of_its_text(demo):
    row = load_rows(demo_folder() / "clips.jsonl")[0]
    opened = dataclasses.replace(row, response_prefix="\\boxed{")
    made = rollout(demo, encode_row(demo, opened), SamplingConfig(max_tokens=40, seed=0, temperature=1.0), group_size=2)
    assert all(text.startswith("\\boxed{") for text in made.texts)
    assert not made.completions[0].text.startswith("\\boxed{")


def test_long_prompts_name_their_row(demo):
    row = load_rows(demo_folder() / "clips.jsonl")[0]
    with pytest.raises(
        DataError, match=r"clips\.jsonl:1: the prompt has \d+ tokens, \d+ of them visual.* limit is 100"
    ):
        encode_row(demo, row, max_prompt_tokens=100)


def test_text_alone(tmp_path):
    model = load_model(checkpoints.write_checkpoint(tmp_path / "m", "qwen3_vl"))
    row = Row(id="t", question="What is 2 + 2?", answer="4", kind="math", line="rows.jsonl:4")
    prompt = encode_row(model, row)
    assert prompt.features is None
    assert not prompt.media_mask.any()
    made = rollout(model, prompt, SamplingConfig(max_tokens=5, seed=0, temperature=1.0), group_size=2)
    np.testing.assert_allclose(made.completions[0].logprobs, group_logprobs(model, made)[0, :5], atol=2e-5)


def test_top_p_of_almost_nothing_is_greedy(group):
    """The smallest set that holds a billionth of the probability is the likeliest token alone; 1 leaves all of them."""
    model, prompt = group
    options = {"max_tokens": 12, "seed": 4}
    (greedy,) = rollout(model, prompt, SamplingConfig(**options, temperature=0.0), group_size=1).completions
    narrow = SamplingConfig(**options, temperature=3.0, top_p=1e-9)
    for one in rollout(model, prompt, narrow, group_size=3).completions:
        np.testing.assert_array_equal(one.ids, greedy.ids)
    free = rollout(model, prompt, SamplingConfig(**options, temperature=3.0), group_size=3).completions
    assert any(one.ids.tolist() != greedy.ids.tolist() for one in free)


def test_it_is_asked_between_tokens_whether_to_stop(group):
    """Not only while the prompt is read: a rollout of thousands of tokens ends after the third here."""
    model, prompt = group
    asked = []

    def should_stop():
        if sys._getframe(1).f_code.co_name == "rollout":
            asked.append(1)
        return len(asked) == 3

    with pytest.raises(Cancelled, match="the rollout was stopped"):
        rollout(
            model,
            prompt,
            SamplingConfig(max_tokens=500, seed=0, temperature=1.0),
            group_size=2,
            should_stop=should_stop,
        )
    assert len(asked) == 3
