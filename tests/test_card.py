"""The model card of a converted folder: what the Hub reads of it, from cards as people write them."""

from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from mlxvr.conversion import card

SETTINGS = {
    "source": "IVUL-KAUST/VideoAuto-R1-Qwen3-VL-8B",
    "commit": "abc",
    "family": "qwen3_vl",
    "threshold": 0.97,
    "quantization": {
        "bits": 4, "group_size": 64, "mode": "affine", "dtype": "bfloat16", "bits_per_weight": 4.5,
    },
    "recipe": {"name": "8b", "license": "apache-2.0", "description": "VideoAuto-R1"},
    "versions": {"mlxvr": "1.0"},
}  # fmt: skip


def written(folder, source_card=None, **changes):
    if source_card is not None:
        (folder / "README.md").write_bytes(source_card)
    return card._card(SimpleNamespace(path=folder), {**SETTINGS, **changes}, "mine")


def test_the_head_byte_for_byte(tmp_path):
    assert written(tmp_path).startswith(
        "---\n"
        "library_name: mlx\n"
        "pipeline_tag: video-text-to-text\n"
        "license: apache-2.0\n"
        "base_model: IVUL-KAUST/VideoAuto-R1-Qwen3-VL-8B\n"
        "base_model_relation: quantized\n"
        "tags:\n- mlx\n- mlxvr\n- video\n- qwen3_vl\n"
        "---\n\n# mine\n\n"
    )


def test_a_folder_of_ones_own_has_no_base_on_the_hub(tmp_path):
    head = yaml.safe_load(written(tmp_path, source="my-folder").split("---\n")[1])
    assert set(head) == {"library_name", "pipeline_tag", "license", "tags"}


@pytest.mark.parametrize(
    ("source_card", "licence"),
    [
        (b"---\nlicense: mit\ntags: [a]\n---\n# x\n", {"license": "mit"}),
        (b"---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        (
            b"---\nlicense: other\nlicense_name: 'qwen: research'\nlicense_link: https://x/LICENSE\n---\n",
            {"license": "other", "license_name": "qwen: research", "license_link": "https://x/LICENSE"},
        ),
        (b"---\nlicense:\n- mit\n- apache-2.0\n---\n", {"license": ["mit", "apache-2.0"]}),
        (b"---\ntags: [a]\n---\n", {"license": "apache-2.0"}),
        (b"---\nlicense:\n---\n", {"license": "apache-2.0"}),
        (b"---\nlicense: [unclosed\n---\n", {"license": "apache-2.0"}),
        (b"# a card without a head\nlicense: mit\n", {"license": "apache-2.0"}),
        (b"---\nlicense: mit\n---\n\xff\xfe", {"license": "mit"}),
        (b"\xef\xbb\xbf---\nlicense: mit\n---\n", {"license": "mit"}),
        (b"---\n- a list\n---\n", {"license": "apache-2.0"}),
    ],
)
def test_the_licence_is_that_of_the_source(tmp_path, source_card, licence):
    """Where its card names one that can be read, and else that of the recipe."""
    text = written(tmp_path, source_card)
    head = yaml.safe_load(text.split("---\n")[1])
    assert {name: value for name, value in head.items() if name.startswith("license")} == licence
    data = ModelCard(text).data  # what the Hub's own reader finds
    assert (data.base_model, data.tags[:2]) == ("IVUL-KAUST/VideoAuto-R1-Qwen3-VL-8B", ["mlx", "mlxvr"])


def test_no_licence_at_all(tmp_path):
    text = written(tmp_path, recipe={"name": "8b", "license": "", "description": ""})
    assert "license" not in text.split("---\n")[1]
