"""The bundled checkpoint through transformers' own code in float32: the log-probabilities of all that we generate."""

import json
import math

import numpy as np
import pytest

import mlxvr
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.media import load_vision, normalise
from mlxvr.model.loading import load_model
from mlxvr.model.prompt import build_prompt

pytestmark = pytest.mark.parity

ROWS = [json.loads(line) for line in (demo_folder() / "clips.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def theirs():
    torch = pytest.importorskip("torch")
    from transformers import Qwen3VLForConditionalGeneration

    folder = demo_folder() / "checkpoint"
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def their_logprobs(model, prompt, generated, spec):
    """log p of each generated token given all before it, and how far it lies below the likeliest: (n,), (n,)."""
    import torch

    ids = torch.tensor([[*prompt.ids.tolist(), *generated]])
    pixels = torch.from_numpy(np.concatenate([normalise(one.patches, spec) for one in prompt.media]))
    video = ids == model.config.video_token_id
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=video.int() * 2,
            pixel_values_videos=pixels,
            video_grid_thw=torch.tensor([one.grid for one in prompt.media]),
        ).logits[0, len(prompt.ids) - 1 : -1]
    logprobs = logits.double().log_softmax(-1)
    chosen = logprobs[torch.arange(len(generated)), torch.tensor(generated)]
    return chosen.numpy(), (logprobs.max(-1).values - chosen).numpy()


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row["group"] in ("perception", "tracking")][:6], ids=lambda r: r["id"]
)
def test_what_we_generate_is_as_likely_there(theirs, row):
    path = demo_folder() / row["video"]
    with mlxvr.load() as reasoner:
        answer = reasoner.ask(path, row["question"], options=row["options"], kind=row["kind"], mode="think")
    folder = ModelFolder.open(demo_folder() / "checkpoint")
    spec = folder.family.vision_spec(folder.config, folder.image_processor, folder.video_processor)
    model = load_model(demo_folder() / "checkpoint")
    prompt = build_prompt(
        model.tokenizer,
        model.family,
        model.config,
        [load_vision(path, spec)],
        row["question"],
        options=row["options"],
        kind=row["kind"],
    )
    logprobs, below = their_logprobs(theirs, prompt, list(answer.token_ids), spec)
    # Ours are computed in the checkpoint's bfloat16: eight bits of mantissa.
    np.testing.assert_allclose(answer.token_logprobs, logprobs, atol=0.05)
    assert below.max() < 0.05, "greedy: each token is the likeliest there too, or as good as"
    letters = [n for n, token in enumerate(answer.token_ids) if model.tokenizer.decode([token]) == answer.first]
    assert len(answer.first) == 1, "a letter, which is one token"
    assert answer.confidence == pytest.approx(math.exp(logprobs[letters[0]]), abs=0.02)
