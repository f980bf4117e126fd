"""Resizing: within one level of torch's antialiased bicubic."""

import numpy as np
import pytest

from mlxvr.media.resize import resize

SIZES = [  # (height, width) -> (height, width)
    ((720, 1280), (256, 448)),
    ((720, 1280), (384, 704)),
    ((360, 640), (352, 640)),  # one side stays
    ((100, 60), (224, 140)),  # up
    ((37, 53), (112, 28)),  # one side up, one down
    ((1, 7), (28, 56)),
    ((2, 2), (112, 112)),
    ((50, 4000), (28, 2240)),
    ((128, 128), (128, 128)),
    ((33, 65), (32, 64)),  # by a hair
    ((500, 500), (32, 32)),  # by a lot
]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise with full contrast, the worst case for rounding and overshoot."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parity
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_equals_torch_within_one_level(source, target):
    torch = pytest.importorskip("torch")
    pixels = picture(*source)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    planes = torch.nn.functional.interpolate(planes, size=target, mode="bicubic", antialias=True)
    expected = planes.clamp(0, 255).round()[0].permute(1, 2, 0).numpy()
    difference = np.abs(resize(pixels, target).astype(float) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.005  # only where rounding is a toss-up


def test_the_weights_of_a_hand_worked_case():
    # Halving a row of 8: each output is centred between two inputs and reads 8 of them, at distances 0.25, 0.75,
    # 1.25 and 1.75 (in output steps) on either side. Keys' cubic with a = -0.5 there: 0.8672, 0.2266, -0.0703,
    # -0.0234; their sum, doubled, is 2. An impulse of 200 at input 3 is 0.25 steps from output 1 (at 2.5..3.5).
    row = np.zeros((1, 8, 3), dtype=np.uint8)
    row[0, 3] = 200
    # output 0 reads inputs 0..4, weights normalised over those; output 1 reads 0..6, 2 reads 1..7, 3 reads 3..7
    cubic = {0.25: 0.8671875, 0.75: 0.2265625, 1.25: -0.0703125, 1.75: -0.0234375}
    full = 2 * sum(cubic.values())
    assert full == 2.0
    outputs = resize(row, (1, 4))[0, :, 0].tolist()
    left = sum(cubic[d] for d in (0.25, 0.75, 1.25, 1.75)) + cubic[0.25]  # output 0: inputs 1, 2, 3, 4 and 0
    expected = [
        max(0, round(200 * cubic[1.25] / left)),
        round(200 * cubic[0.25] / (full - cubic[1.75])),  # output 1 has no input at distance 1.75 on its left
        round(200 * cubic[0.75] / (full - cubic[1.75])),
        max(0, round(200 * cubic[1.75] / left)),
    ]
    assert outputs == expected


def test_flat_pictures_stay_flat():
    for level in (0, 1, 127, 254, 255):
        pixels = np.full((90, 70, 3), level, dtype=np.uint8)
        assert np.all(resize(pixels, (28, 112)) == level)


def test_overshoot_is_clamped_not_wrapped():
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:, 4:] = 255
    resized = resize(pixels, (64, 64))
    assert np.all(resized[:, :24] < 30)
    assert np.all(resized[:, 40:] > 225)


def test_a_stack_is_its_frames():
    frames = np.stack([picture(60, 80, seed) for seed in range(3)])
    stacked = resize(frames, (28, 56))
    assert stacked.shape == (3, 28, 56, 3)
    for frame, resized in zip(frames, stacked):
        assert np.array_equal(resize(frame, (28, 56)), resized)


def test_the_same_size_is_a_copy():
    pixels = picture(32, 32)
    resized = resize(pixels, (32, 32))
    assert np.array_equal(resized, pixels)
    assert not np.shares_memory(resized, pixels)


def test_strided_input():
    pixels = picture(64, 48)
    turned = pixels.swapaxes(0, 1)
    assert np.array_equal(resize(turned, (24, 40)), resize(np.ascontiguousarray(turned), (24, 40)))
