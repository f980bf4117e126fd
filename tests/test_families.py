"""Names, shapes, config dialects and prompt layouts of both families, against transformers and public checkpoints."""

import json
import math

import checkpoints
import numpy as np
import pytest

from mlxvr.checkpoint.config_normalization import text_settings
from mlxvr.errors import CheckpointError
from mlxvr.model.families import base, qwen2_5_vl
from mlxvr.model.families.base import FAMILIES, family_of

# config.json of the public checkpoints (Qwen2.5-VL-7B-Instruct in its first release's dialect, Qwen3-VL-8B-Instruct).
QWEN2_5_7B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
QWEN3_8B = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": False,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [8, 16, 24],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "intermediate_size": 4304,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
TOKEN_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
DIALECTS = [
    ("qwen2_5_vl", "first"),
    ("qwen2_5_vl", "4.57"),
    ("qwen2_5_vl", "5"),
    ("qwen3_vl", "4.57"),
    ("qwen3_vl", "5"),
]


def config_of(family: str, dialect: str, **text: object) -> dict:
    tokenizer = checkpoints.train_tokenizer(family)
    ids = {token: tokenizer.token_to_id(token) for token in checkpoints.SPECIAL_TOKENS}
    settings = {**checkpoints.text_settings(family), **text}
    return checkpoints.make_config(family, settings, checkpoints.vision_settings(family), ids, dialect=dialect)


@pytest.mark.parametrize(("config", "parameters"), [(QWEN2_5_7B, 8_292_166_656), (QWEN3_8B, 8_767_123_696)])
def test_shapes_add_up_to_the_public_checkpoints_size(config: dict, parameters: int) -> None:
    shapes = family_of(config).expected_shapes(config)
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters  # half of total_size in their index


@pytest.mark.parametrize("config", [QWEN2_5_7B, QWEN3_8B])
def test_shapes_of_a_large_network_take_no_memory(config: dict) -> None:
    """Its 16 GB are never made; and what a caller does to the shapes concerns nobody else."""
    import mlx.core as mx

    base._shapes.clear()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    shapes = family_of(config).expected_shapes(config)
    assert mx.get_peak_memory() - before < 2**20
    expected = dict(shapes)
    shapes.clear()
    assert family_of(config).expected_shapes(config) == expected
    assert len(base._shapes) == 1


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
@pytest.mark.parametrize("names", ["new", "old"])
@pytest.mark.parametrize("tied", [False, True])
def test_public_names_and_shapes_become_mlx_ones(family: str, names: str, tied: bool) -> None:
    text, vision = checkpoints.text_settings(family), checkpoints.vision_settings(family)
    config = {**config_of(family, "5"), "tie_word_embeddings": tied}
    adapter = family_of(config)
    public = checkpoints.tensor_shapes(family, text, vision, names=names, tied=tied)
    found = {adapter.mlx_key(name, tied=tied): shape for name, shape in public.items()}
    assert None not in found
    assert {key: adapter.mlx_shape(key, shape) for key, shape in found.items()} == adapter.expected_shapes(config)


def test_names_by_hand() -> None:
    qwen2_5, qwen3 = FAMILIES["qwen2_5_vl"], FAMILIES["qwen3_vl"]
    for name, key in {
        "visual.blocks.0.attn.qkv.weight": "vision_tower.blocks.0.attn.qkv.weight",
        "model.visual.merger.mlp.0.bias": "vision_tower.merger.mlp.0.bias",
        "model.layers.3.mlp.up_proj.weight": "language_model.model.layers.3.mlp.up_proj.weight",
        "model.language_model.layers.3.mlp.up_proj.weight": "language_model.model.layers.3.mlp.up_proj.weight",
        "model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
        "model.language_model.norm.weight": "language_model.model.norm.weight",
        "lm_head.weight": "language_model.lm_head.weight",
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": None,
        "visual.rotary_pos_emb.inv_freq": None,
    }.items():
        for adapter in (qwen2_5, qwen3):
            assert adapter.mlx_key(name) == key
            if key is not None:
                assert adapter.mlx_key(key) == key  # what is MLX's already stays
    assert qwen3.mlx_key("lm_head.weight", tied=True) is None
    assert qwen3.mlx_key("language_model.lm_head.weight", tied=True) is None
    assert qwen3.is_vision("vision_tower.pos_embed.weight")
    assert not qwen3.is_vision("language_model.model.norm.weight")


def test_patch_embedding_is_laid_out_once() -> None:
    adapter = FAMILIES["qwen3_vl"]
    key = "vision_tower.patch_embed.proj.weight"
    torch_layout = np.arange(4 * 3 * 2 * 5 * 5).reshape(4, 3, 2, 5, 5)
    ours = adapter.mlx_tensor(key, torch_layout)
    assert ours.shape == (4, 2, 5, 5, 3)
    assert ours[1, 0, 2, 3, 2] == torch_layout[1, 2, 0, 2, 3]
    assert adapter.mlx_tensor(key, ours) is ours
    other = np.zeros((4, 3))
    assert adapter.mlx_tensor("vision_tower.merger.norm.weight", other) is other


@pytest.mark.parametrize(("family", "dialect"), DIALECTS)
def test_every_dialect_means_the_same(family: str, dialect: str) -> None:
    adapter = family_of(config_of(family, dialect))
    found = adapter.mlx_config(config_of(family, dialect))
    newest = adapter.mlx_config(config_of(family, "5"))
    for key in (
        "hidden_size",
        "rope_theta",
        "rope_scaling",
        "num_key_value_heads",
        "vocab_size",
        "tie_word_embeddings",
    ):
        assert found["text_config"][key] == newest["text_config"][key], key
    section = [6, 5, 5] if family == "qwen3_vl" else [4, 6, 6]
    assert found["text_config"]["rope_scaling"] == {"type": "default", "mrope_section": section}
    assert found["vision_config"]["in_channels"] == 3
    assert adapter.mlx_config(found) == found  # idempotent
    json.dumps(found)


@pytest.mark.parametrize(("family", "dialect"), DIALECTS)
def test_stock_mlx_vlm_reads_the_result(family: str, dialect: str) -> None:
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    raw = config_of(family, dialect, rms_norm_eps=3e-5)
    config = family_of(raw).mlx_config(raw)
    code, _ = get_model_and_args(config)
    settings = code.ModelConfig.from_dict(config)
    settings = update_module_configs(settings, code, config, ["text", "vision"])
    assert settings.text_config.rms_norm_eps == 3e-5
    assert settings.text_config.rope_theta == (500_000.0 if family == "qwen3_vl" else 1_000_000.0)
    assert settings.text_config.rope_scaling["mrope_section"] == ([6, 5, 5] if family == "qwen3_vl" else [4, 6, 6])
    assert settings.vision_config.depth == 4
    assert settings.image_token_id == raw["image_token_id"]
    code.Model(settings)


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_silent_files_mean_what_transformers_assumes(family: str) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

    default = {"qwen2_5_vl": Qwen2_5_VLConfig, "qwen3_vl": Qwen3VLConfig}[family]().vision_config
    found = family_of({"model_type": family}).mlx_config({**config_of(family, "5"), "vision_config": {}})[
        "vision_config"
    ]
    for key, value in found.items():
        if key != "model_type":
            theirs = getattr(default, key)
            assert (list(theirs) if isinstance(theirs, tuple) else theirs) == value, key


def test_both_rope_spellings_and_scaled_rope() -> None:
    config = config_of("qwen3_vl", "5")
    config["text_config"]["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    with pytest.raises(CheckpointError, match="rope type 'yarn'"):
        FAMILIES["qwen3_vl"].mlx_config(config)
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 8, 8]}
    with pytest.raises(CheckpointError, match="makes 24; expected 16"):
        FAMILIES["qwen3_vl"].mlx_config(config)


@pytest.mark.parametrize(
    ("family", "where", "key", "value"),
    [
        ("qwen2_5_vl", "text_config", "use_sliding_window", True),
        ("qwen2_5_vl", "text_config", "layer_types", ["full_attention", "sliding_attention"]),
        ("qwen2_5_vl", "vision_config", "hidden_act", "gelu"),
        ("qwen3_vl", "text_config", "attention_bias", True),
        ("qwen3_vl", "text_config", "hidden_act", "gelu"),
        ("qwen3_vl", "vision_config", "in_channels", 4),
    ],
)
def test_what_the_network_does_not_do_is_refused(family: str, where: str, key: str, value: object) -> None:
    config = config_of(family, "5")
    config[where][key] = value
    with pytest.raises(CheckpointError, match=key):
        family_of(config).mlx_config(config)


def test_missing_setting_is_named() -> None:
    config = config_of("qwen3_vl", "5")
    del config["text_config"]["num_hidden_layers"]
    with pytest.raises(CheckpointError, match="'num_hidden_layers'"):
        FAMILIES["qwen3_vl"].mlx_config(config)


@pytest.mark.parametrize("model_type", ["llama", "qwen2_vl", "qwen3_vl_moe", None])
def test_other_architectures_are_refused_by_name(model_type: str | None) -> None:
    with pytest.raises(CheckpointError, match=r"qwen2_5_vl and qwen3_vl") as raised:
        family_of({"model_type": model_type})
    assert repr(model_type) in str(raised.value)


def test_text_settings_are_found_in_both_places() -> None:
    assert text_settings({"hidden_size": 1, "vision_config": {}, "text_config": {"hidden_size": 2}})["hidden_size"] == 2
    assert text_settings({"hidden_size": 1})["hidden_size"] == 1


@pytest.mark.parametrize(("family", "dialect"), DIALECTS)
def test_a_null_in_a_section_says_nothing(family: str, dialect: str) -> None:
    config = config_of(family, dialect)
    expected = family_of(config).mlx_config(config)
    nulls = dict.fromkeys([*TOKEN_KEYS, "head_dim", "rope_scaling", "rope_theta", "num_key_value_heads"])
    text = {key: None for key in nulls if key not in (config.get("text_config") or {})}
    config["text_config"] = {**text, **(config.get("text_config") or {})}
    config["vision_config"] = {"hidden_act": None, "in_channels": None, **config["vision_config"]}
    found = family_of(config).mlx_config(config)
    assert found == expected
    assert None not in found["text_config"].values()
    assert [found[key] for key in TOKEN_KEYS] == [446, 447, 443, 444]


def test_null_token_ids_at_the_root_are_those_of_the_section_or_qwens() -> None:
    config = config_of("qwen2_5_vl", "4.57")
    config |= {"image_token_id": None, "video_token_id": None}
    config["text_config"]["video_token_id"] = 7
    found = FAMILIES["qwen2_5_vl"].mlx_config(config)
    assert (found["image_token_id"], found["video_token_id"]) == (151655, 7)


def test_qwen3_writes_a_block_for_each_row_with_its_time() -> None:
    video = checkpoints.random_media("qwen3_vl", "video", (4, 6, 8), second_per_grid=0.5, first=0.25)
    layout = FAMILIES["qwen3_vl"].vision_layout(video, config_of("qwen3_vl", "5"))
    # 0.25, 0.75, 1.25 and 1.75 are exact in binary, so ties go to the even digit
    assert [block.label for block in layout] == ["<0.2 seconds>", "<0.8 seconds>", "<1.2 seconds>", "<1.8 seconds>"]
    assert {block.grid for block in layout} == {(1, 3, 4)}
    assert layout[0].tokens == 12


def test_qwen2_5_writes_one_block_whose_rows_lie_apart_by_their_time() -> None:
    video = checkpoints.random_media("qwen2_5_vl", "video", (4, 6, 8), second_per_grid=0.75)
    (block,) = FAMILIES["qwen2_5_vl"].vision_layout(video, config_of("qwen2_5_vl", "5"))
    assert (block.label, block.grid, block.time_step) == ("", (4, 3, 4), 1.5)


def test_the_time_between_rows_is_the_one_of_the_release_that_wrote_the_checkpoint(caplog) -> None:
    qwen2_5_vl._warn_of_one_time.cache_clear()
    video = checkpoints.random_media("qwen2_5_vl", "video", (4, 6, 8), second_per_grid=2.75)
    fast = checkpoints.random_media("qwen2_5_vl", "video", (4, 6, 8), second_per_grid=0.5)
    steps = {}
    for version in ("4.49.0", "4.57.1", "5.24.0"):
        config = {**config_of("qwen2_5_vl", "5"), "transformers_version": version}
        assert FAMILIES["qwen2_5_vl"].mlx_config(config)["transformers_version"] == version
        steps[version] = [
            FAMILIES["qwen2_5_vl"].vision_layout(media, config)[0].time_step for media in (video, fast, fast)
        ]
    assert steps == {"4.49.0": [5.5, 1.0, 1.0], "4.57.1": [4.0, 0.0, 0.0], "5.24.0": [5.5, 1.0, 1.0]}
    assert ["give fps=2 or less" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("adapter", FAMILIES.values(), ids=FAMILIES)
def test_an_image_is_one_block_without_a_time(adapter) -> None:
    image = checkpoints.random_media(adapter.name, "image", (1, 6, 8))
    (block,) = adapter.vision_layout(image, config_of(adapter.name, "5"))
    assert (block.label, block.grid) == ("", (1, 3, 4))


def test_a_row_without_a_time_is_a_mistake() -> None:
    video = checkpoints.random_media("qwen3_vl", "video", (2, 4, 4))
    wrong = type(video)("video", video.patches, (3, 4, 4), video.seconds, 1.0)
    with pytest.raises(ValueError, match="3 temporal patches and 2 times"):
        FAMILIES["qwen3_vl"].vision_layout(wrong, config_of("qwen3_vl", "5"))
