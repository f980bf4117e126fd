"""Patches: against transformers' processors, and against positions worked by hand."""

import numpy as np
import pytest

from mlxvr.errors import ConfigError
from mlxvr.media.patches import normalise, patchify, temporal_patch_seconds
from mlxvr.model.families.base import FAMILIES

SPECS = {
    "qwen2_5_vl": FAMILIES["qwen2_5_vl"].vision_spec({}),
    "qwen3_vl": FAMILIES["qwen3_vl"].vision_spec({}),
}


def frames(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("family", SPECS)
def test_every_value_lies_where_the_layout_says(family):
    spec = SPECS[family]
    pixels = frames(5, 2 * spec.factor, 3 * spec.factor)
    patches, grid = patchify(pixels, spec)
    assert grid == (3, 4, 6)
    assert patches.shape == (3 * 4 * 6, 3 * 2 * spec.patch_size**2)
    assert patches.dtype == np.uint8
    rng = np.random.default_rng(1)
    for _ in range(500):  # rows: time, token row, token column, merge row, merge column; columns: rgb, frame, y, x
        t, block_y, block_x = rng.integers(3), rng.integers(2), rng.integers(3)
        merge_y, merge_x, rgb, frame = rng.integers(2), rng.integers(2), rng.integers(3), rng.integers(2)
        y, x = rng.integers(spec.patch_size, size=2)
        row = (((t * 2 + block_y) * 3 + block_x) * 2 + merge_y) * 2 + merge_x
        column = ((rgb * 2 + frame) * spec.patch_size + y) * spec.patch_size + x
        source = pixels[
            min(t * 2 + frame, 4),  # the last frame is repeated
            (block_y * 2 + merge_y) * spec.patch_size + y,
            (block_x * 2 + merge_x) * spec.patch_size + x,
            rgb,
        ]
        assert patches[row, column] == source


@pytest.mark.parity
@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_videos_equal_transformers(family, count):
    torch = pytest.importorskip("torch")
    # Qwen2-VL's video processor has the same method, but cannot be imported without torchvision.
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor as Processor

    spec = SPECS[family]
    pixels = frames(count, 3 * spec.factor, 2 * spec.factor)
    video = torch.from_numpy(pixels).permute(0, 3, 1, 2)[None].double()  # (1, n, 3, height, width)
    mean, std = (torch.tensor(v, dtype=torch.float64)[None, None, :, None, None] for v in (spec.mean, spec.std))
    expected, *grid = Processor.patchify(
        None, (video / 255 - mean) / std, spec.patch_size, spec.merge_size, spec.temporal_patch_size
    )
    patches, ours = patchify(pixels, spec)
    assert ours == tuple(grid)
    values = normalise(patches, spec)
    assert values.dtype == np.float32
    assert np.abs(values - expected[0].numpy()).max() <= 1e-6


@pytest.mark.parity
@pytest.mark.parametrize("family", SPECS)
def test_images_equal_transformers(family):
    pytest.importorskip("torch")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    spec = SPECS[family]
    pixels = frames(1, 2 * spec.factor, 5 * spec.factor)
    processor = Qwen2VLImageProcessorPil(
        patch_size=spec.patch_size, image_mean=list(spec.mean), image_std=list(spec.std), do_resize=False
    )
    expected = processor(pixels[0], return_tensors="np")
    patches, grid = patchify(pixels, spec)
    assert grid == tuple(expected["image_grid_thw"][0])
    assert np.abs(normalise(patches, spec) - expected["pixel_values"]).max() <= 1e-6


def test_normalise_is_the_formula():
    spec = SPECS["qwen2_5_vl"]
    row = np.repeat(np.array([0, 128, 255], dtype=np.uint8), 2 * 14 * 14)[None]
    values = normalise(row, spec).reshape(3, -1)
    assert values[0, 0] == pytest.approx((0 / 255 - 0.48145466) / 0.26862954, abs=1e-6)
    assert values[1, 5] == pytest.approx((128 / 255 - 0.4578275) / 0.26130258, abs=1e-6)
    assert values[2, -1] == pytest.approx((255 / 255 - 0.40821073) / 0.27577711, abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 30, 32, 3), np.uint8),
        ((2, 32, 48, 3), np.uint8),
        ((2, 32, 32), np.uint8),
        ((0, 32, 32, 3), np.uint8),
        ((2, 32, 32, 3), np.float32),
    ],
)
def test_what_cannot_be_cut_is_refused(shape, dtype):
    with pytest.raises(ConfigError, match=r"expected uint8|multiples of 32"):
        patchify(np.zeros(shape, dtype), SPECS["qwen3_vl"])


def test_temporal_patch_seconds_are_means_of_pairs():
    assert temporal_patch_seconds(np.array([0.0, 0.5, 1.0, 1.5]), 2) == (0.25, 1.25)
    assert temporal_patch_seconds(np.array([0.0, 0.5, 1.0]), 2) == (0.25, 1.0)  # the last frame is repeated
    assert temporal_patch_seconds(np.array([3.0]), 2) == (3.0,)
