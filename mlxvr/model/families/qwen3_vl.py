"""Qwen3-VL, the dense sizes: all that is particular to it.

A video has "<1.5 seconds>" and a vision block for each of its temporal patches in the prompt, so positions in time are
the text order of the blocks. The vision tower sees whole frames, adds learned positions and hands features to the
language model's first layers too (deepstack). Pictures are patches of 16 pixels with mean and standard deviation 0.5.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mlxvr.checkpoint.config_normalization import ConfigRules
from mlxvr.media.patches import VisionInput
from mlxvr.media.spec import FrameRules
from mlxvr.model.families.base import Family, register, token_grid
from mlxvr.model.frame_plan import FramePlan, plan_frame
from mlxvr.model.positions import VisionBlock

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["Qwen3VL"]


class Qwen3VL(Family):
    """Qwen3-VL, the dense sizes."""

    name = "qwen3_vl"
    title = "dense Qwen3-VL"
    config_rules = ConfigRules(
        model_type=name,
        text_model_type="qwen3_vl_text",
        head_dim=128,
        must_be_off=("attention_bias",),
        vision_defaults={
            "deepstack_visual_indexes": [8, 16, 24],
            "depth": 27,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "in_channels": 3,
            "intermediate_size": 4304,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": 3584,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        rope_theta=5_000_000.0,
        mrope_section=(24, 20, 20),
        token_ids={
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
        },
    )
    frame_rules = FrameRules(patch_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), counts_whole_clip=True)
    has_head_norms = True
    # arXiv 2601.05175 and its public scripts
    evaluation_limits: ClassVar[Mapping[str, int]] = {"max_frames": 2_048, "video_tokens": 128_000}
    benchmark_frames: ClassVar[Mapping[str, int]] = {"videommmu": 64}

    def network_code(self) -> Any:
        """mlx-vlm's `qwen3_vl`."""
        from mlx_vlm.models import qwen3_vl

        return qwen3_vl

    def vision_layout(self, media: VisionInput, config: Mapping[str, Any]) -> list[VisionBlock]:
        """A block for each temporal patch of a video, each after its source time; one block for an image."""
        t, h, w = token_grid(media, config)
        if media.kind == "image":
            return [VisionBlock("", (t, h, w), 1.0)]
        if len(media.seconds) != t:
            raise ValueError(f"the video has {t} temporal patches and {len(media.seconds)} times for them")
        return [VisionBlock(f"<{seconds:.1f} seconds>", (1, h, w), 1.0) for seconds in media.seconds]

    def frame_plan(self, config: Mapping[str, Any], height: int, width: int) -> FramePlan:
        """Whole frames, with positions from a square table."""
        vision = config["vision_config"]
        return plan_frame(
            height,
            width,
            merge=vision["spatial_merge_size"],
            head_dim=vision["hidden_size"] // vision["num_heads"],
            table_side=round(vision["num_position_embeddings"] ** 0.5),
            deepstack_layers=self.deepstack_layers(config),
        )

    def deepstack_layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Those of `deepstack_visual_indexes`."""
        return tuple(config["vision_config"]["deepstack_visual_indexes"])

    def deepstack_arguments(self, levels: Sequence["mx.array"], media_mask: np.ndarray) -> dict[str, Any]:
        """The mask stays in numpy: mlx-vlm looks its places up on the host, once a layer."""
        return {"visual_pos_masks": media_mask, "deepstack_visual_embeds": list(levels)}


register(Qwen3VL())
