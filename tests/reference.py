"""transformers on torch (CPU, float32) as the independent truth: its networks, positions and greedy decoding.

Import it after `pytest.importorskip("torch")`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration
from transformers.utils import logging

from mlxvr.media.patches import VisionInput

logging.set_verbosity_error()
logging.disable_progress_bar()

MODELS = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}


class Reference:
    """A checkpoint as transformers runs it."""

    def __init__(self, folder: Path, family: str):
        self.family = family
        self.model = MODELS[family].from_pretrained(folder, dtype=torch.float32).eval()

    def inputs(self, ids: np.ndarray, media: Sequence[VisionInput], pixels: Sequence[np.ndarray]) -> dict[str, Any]:
        """Arguments of forward and generate; `pixels` are the media's `pixel_values`."""
        config = self.model.config
        input_ids = torch.tensor(np.asarray(ids, dtype=np.int64)[None])
        kinds = torch.zeros_like(input_ids)
        kinds[input_ids == config.image_token_id] = 1
        kinds[input_ids == config.video_token_id] = 2
        found: dict[str, Any] = {"input_ids": input_ids, "mm_token_type_ids": kinds}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            own = [(one, values) for one, values in zip(media, pixels) if one.kind == kind]
            if own:
                found[name] = torch.tensor(np.concatenate([values for _, values in own]))
                found[f"{kind}_grid_thw"] = torch.tensor([one.grid for one, _ in own])
        seconds = [one.second_per_grid for one in media if one.kind == "video"]
        if seconds and self.family == "qwen2_5_vl":
            found["second_per_grid_ts"] = torch.tensor(seconds)
        return found

    def positions(self, inputs: dict[str, Any]) -> np.ndarray:
        """(3, n) rope positions."""
        wanted = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        grids = {name: inputs[name] for name in wanted if name in inputs}
        found, _ = self.model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **grids)
        return found[:, 0].numpy()

    def logits(self, inputs: dict[str, Any], **extra: Any) -> np.ndarray:
        """(n, vocab)."""
        with torch.no_grad():
            return self.model(**inputs, **extra).logits[0].numpy()

    def greedy(self, inputs: dict[str, Any], count: int) -> list[int]:
        """The next `count` tokens, none of which ends the turn."""
        with torch.no_grad():
            ids = self.model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=-1)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    def vision(self, grid: tuple[int, int, int], pixels: np.ndarray) -> list[np.ndarray]:
        """The vision tower's features, then those of each deepstack level."""
        with torch.no_grad():
            out = self.model.model.visual(torch.tensor(pixels), grid_thw=torch.tensor([grid]))
        return [out.pooler_output.numpy(), *(level.numpy() for level in getattr(out, "deepstack_features", None) or ())]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference anywhere, relative to the largest expected value."""
    return float(np.abs(np.asarray(found, dtype=np.float64) - expected).max() / np.abs(expected).max())
