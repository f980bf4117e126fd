"""Qwen2.5-VL (arXiv 2502.13923): all that is particular to it.

A video is one vision block in the prompt. The vision tower sees windows, and whole frames in some of its layers.
Pictures are patches of 14 pixels with CLIP's mean and standard deviation.

A temporal patch (a pair of frames) of a video has the position `floor(index * seconds * tokens_per_second)` in time,
where `seconds` lie between two of them; text follows the video. What releases of transformers compute was established
by running `get_rope_index` of each (`tests/releases` holds the numbers and the script). For temporal patches 4.6875 s
apart (256 frames of ten minutes) at 2 positions a second:

    transformers     temporal step               positions in time        text after a video begins after
    up to 4.51       floats                      0, 9, 18, 28 .. 1190     its largest position on any axis
    4.52 to 5.2      whole seconds: int(4.6875)  0, 8, 16, 24 .. 1016     its largest position on any axis
    5.3 to 5.5       none: all at one time       (a fault)                its height or width
    5.6 to 5.17      whole seconds               0, 8, 16, 24 .. 1016     its height or width
    from 5.18        floats                      0, 9, 18, 28 .. 1190     its height or width

They agree on images, on Qwen3-VL, and on the time of clips at 2 frames a second (temporal patches 1 s apart) or 1.
Above 2 frames a second, whole seconds put every frame of a clip at the same time.

A checkpoint means what the release that wrote it computes, so `transformers_version` in its config.json decides; a
conversion keeps that key. The public VideoAuto-R1 checkpoints were written by 4.57.1: their training pass and their
evaluation run copies of its function, with whole seconds. Their rollouts came from vLLM 0.11, which multiplies floats;
where the two differ the training pass is what the weights were fitted to. The original Qwen2.5-VL checkpoints say
4.41.2, which stands for the code of their first release (4.49): floats.

Releases 5.3 to 5.5 are read as 5.6, the first that mended them: a checkpoint that was only saved by them was not
trained with their fault. The same doubt remains for a fine-tune that a 5.x saved and that was trained under 4.57: the
file names 5.x, so 5.x's positions are used. Whoever knows better sets `transformers_version` in config.json to
"4.57.1".
"""

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mlxvr.checkpoint.config_normalization import ConfigRules
from mlxvr.media.patches import VisionInput
from mlxvr.media.spec import FrameRules
from mlxvr.model.families.base import Family, register, token_grid
from mlxvr.model.frame_plan import FramePlan, plan_frame
from mlxvr.model.positions import VisionBlock, rope_positions

__all__ = ["MRopeConvention", "Qwen25VL"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MRopeConvention:
    """How a release of transformers places a video and the text after it.

    Attributes:
        whole_seconds: the time between two temporal patches is cut down to whole seconds before it is multiplied.
        time_is_extent: text after a video begins after the video's last temporal position, if that is the largest one;
            otherwise only height and width count.
    """

    whole_seconds: bool
    time_is_extent: bool

    @classmethod
    def of_release(cls, version: str | None) -> "MRopeConvention":
        """The convention of a release, such as "4.57.1"; None or text that is no version: that of 4.57."""
        numbers = re.match(r"(\d+)(?:\.(\d+))?", str(version or ""))
        release = (int(numbers[1]), int(numbers[2] or 0)) if numbers else (4, 57)
        return cls(whole_seconds=(4, 52) <= release < (5, 18), time_is_extent=release < (5, 3))

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "MRopeConvention":
        """The convention of the release that wrote a config.json."""
        return cls.of_release(config.get("transformers_version"))

    def time_step(self, seconds_apart: float, positions_per_second: float) -> float:
        """Temporal positions from one temporal patch of a video to the next, before rounding down."""
        return (int(seconds_apart) if self.whole_seconds else seconds_apart) * positions_per_second


class Qwen25VL(Family):
    """Qwen2.5-VL, any size."""

    name = "qwen2_5_vl"
    title = "Qwen2.5-VL"
    config_rules = ConfigRules(
        model_type=name,
        text_model_type=name,
        text_at_root=True,
        vision_defaults={
            "depth": 32,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "hidden_act": "silu",
            "hidden_size": 3584,
            "in_channels": 3,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 4,
            "window_size": 112,
        },
        rope_theta=1_000_000.0,
        mrope_section=(16, 24, 24),
        token_ids={
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
        },
    )
    frame_rules = FrameRules(
        patch_size=14,
        mean=(0.48145466, 0.4578275, 0.40821073),  # CLIP's
        std=(0.26862954, 0.26130258, 0.27577711),
        counts_whole_clip=False,
    )
    has_head_norms = False
    # arXiv 2601.05175 and its public scripts
    evaluation_limits: ClassVar[Mapping[str, int]] = {"max_frames": 256, "video_tokens": 16_384}
    benchmark_frames: ClassVar[Mapping[str, int]] = {"activitynet": 512, "mmvu": 64, "videommmu": 64}

    def network_code(self) -> Any:
        """mlx-vlm's `qwen2_5_vl`."""
        from mlx_vlm.models import qwen2_5_vl

        return qwen2_5_vl

    def vision_layout(self, media: VisionInput, config: Mapping[str, Any]) -> list[VisionBlock]:
        """One block; the time between two temporal patches depends on the release that wrote the checkpoint."""
        grid = token_grid(media, config)
        if media.kind == "image":
            return [VisionBlock("", grid, 1.0)]
        rate = config["vision_config"].get("tokens_per_second", 4)
        step = MRopeConvention.of_config(config).time_step(media.second_per_grid, rate)
        if step == 0.0 < media.second_per_grid and grid[0] > 1:
            _warn_of_one_time()
        return [VisionBlock("", grid, step)]

    def positions(
        self, config: Mapping[str, Any], media_mask: np.ndarray, blocks: Sequence[VisionBlock]
    ) -> tuple[np.ndarray, int]:
        """Rope positions of a prompt, as the release computes them that wrote the checkpoint."""
        return rope_positions(media_mask, blocks, time_is_extent=MRopeConvention.of_config(config).time_is_extent)

    def frame_plan(self, config: Mapping[str, Any], height: int, width: int) -> FramePlan:
        """Windows of `window_size` pixels, but whole frames in the layers `fullatt_block_indexes`."""
        vision = config["vision_config"]
        merge = vision["spatial_merge_size"]
        return plan_frame(
            height,
            width,
            merge=merge,
            head_dim=vision["hidden_size"] // vision["num_heads"],
            window=vision["window_size"] // merge // vision["patch_size"],
            full_layers=frozenset(vision["fullatt_block_indexes"]),
        )


@functools.cache  # once a process, not at every question
def _warn_of_one_time() -> None:
    _log.warning(
        "more than 2 frames a second: this checkpoint counts whole seconds from one pair of frames to the next, so all "
        "of the clip's frames have the same time for it; give fps=2 or less"
    )


register(Qwen25VL())
