"""The files that make trained weights a checkpoint: tokenizer settings, chat template, processor settings, threshold.

    python -m shellgame.checkpoint OUT/checkpoint ../mlxvr/demo/checkpoint

copies config, weights and tokenizer as transformers wrote them and puts the rest beside them.
"""

import argparse
import json
import shutil
from pathlib import Path

TRAINED_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")

# As Qwen-VL's templates do it: turns between im_start and im_end, a picture or video as one placeholder between its
# marks (the processor expands it), and a system turn only where the messages begin with one.
CHAT_TEMPLATE = """\
{%- macro write(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for item in content -%}
            {%- if item.type == 'image' or 'image' in item or 'image_url' in item -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif item.type == 'video' or 'video' in item -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in item -%}
                {{- item.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {{- write(message.content) -}}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_TOKEN_PIXELS = 32 * 32
_FRAME_TOKENS = (16, 20)
_LONGEST_CLIP = 32  # frames: what was trained on

TOKENIZER_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": False,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "bos_token": None,
    "errors": "replace",
    "model_max_length": 8192,
    "split_special_tokens": False,
}
_COMMON = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 16,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "temporal_patch_size": 2,
}
IMAGE_PROCESSOR = {
    **_COMMON,
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
    "size": {"shortest_edge": _FRAME_TOKENS[0] * _TOKEN_PIXELS, "longest_edge": _FRAME_TOKENS[1] * _TOKEN_PIXELS},
}
# `size` bounds the pixels of a whole clip, `max_video_tokens` those of a frame: with both, frames of any file come to
# one of the few sizes that were trained on, whatever the length of the clip.
VIDEO_PROCESSOR = {
    **_COMMON,
    "video_processor_type": "Qwen3VLVideoProcessor",
    "processor_class": "Qwen3VLProcessor",
    "size": {
        "shortest_edge": _FRAME_TOKENS[0] * _TOKEN_PIXELS,
        "longest_edge": _FRAME_TOKENS[1] * _TOKEN_PIXELS * _LONGEST_CLIP,
    },
    "max_video_tokens": _FRAME_TOKENS[1],
    "cap_pixels_per_frame": True,
    "do_sample_frames": True,
    "fps": 2,
    "min_frames": 4,
    "max_frames": _LONGEST_CLIP,
}
MLXVR_SETTINGS = {"source": "shellgame", "family": "qwen3_vl", "threshold": 0.97, "recipe": "shellgame"}


def assemble(trained: Path, folder: Path) -> None:
    """Write a complete checkpoint into `folder` from what training left in `trained`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TRAINED_FILES:
        shutil.copyfile(trained / name, folder / name)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name, settings in (
        ("tokenizer_config.json", TOKENIZER_SETTINGS),
        ("preprocessor_config.json", IMAGE_PROCESSOR),
        ("video_preprocessor_config.json", VIDEO_PROCESSOR),
        ("mlxvr.json", MLXVR_SETTINGS),
    ):
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Command line: where training wrote, and where the checkpoint goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path, help="the folder `checkpoint` that training wrote")
    parser.add_argument("folder", type=Path, help="the checkpoint to write")
    options = parser.parse_args(argv)
    assemble(options.trained, options.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
