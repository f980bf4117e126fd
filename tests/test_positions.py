"""Rope positions against tables worked by hand, and against transformers' get_rope_index."""

import numpy as np
import pytest

from mlxvr.model.positions import VisionBlock, rope_positions


def prompt(*parts: int | VisionBlock) -> tuple[np.ndarray, list[VisionBlock]]:
    """Mask and blocks of a prompt given as runs of text tokens and vision blocks."""
    mask = [np.zeros(part, bool) if isinstance(part, int) else np.ones(part.tokens, bool) for part in parts]
    return np.concatenate(mask), [part for part in parts if not isinstance(part, int)]


def test_text_counts_up() -> None:
    positions, following = rope_positions(*prompt(4))
    assert positions.tolist() == [[0, 1, 2, 3]] * 3
    assert following == 4
    assert positions.dtype == np.int32


def test_nothing() -> None:
    positions, following = rope_positions(np.zeros(0, bool), [])
    assert positions.shape == (3, 0)
    assert following == 0


def test_an_image_by_hand() -> None:
    positions, following = rope_positions(*prompt(2, VisionBlock("", (1, 2, 3), 1.0), 2))
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert following == 7


def test_a_video_of_half_second_rows_by_hand() -> None:
    """Step 1.5: rows at 0, 1.5, 3 and 4.5 stand at 0, 1, 3 and 4; the video reaches 4 beyond its beginning."""
    block = VisionBlock("", (4, 1, 2), 1.5)
    positions, following = rope_positions(*prompt(1, block, 2))
    assert positions.tolist() == [
        [0, 1, 1, 2, 2, 4, 4, 5, 5, 6, 7],
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 6, 7],
        [0, 1, 2, 1, 2, 1, 2, 1, 2, 6, 7],
    ]
    assert following == 8


def test_the_same_video_where_time_is_no_extent() -> None:
    """Text goes on 2 (the width) after the video began, and generation after the largest position of all."""
    block = VisionBlock("", (4, 1, 2), 1.5)
    positions, following = rope_positions(*prompt(1, block, 2), time_is_extent=False)
    assert positions[:, -2:].tolist() == [[3, 4]] * 3
    assert positions[0, 1:9].tolist() == [1, 1, 2, 2, 4, 4, 5, 5]
    assert following == 6


def test_both_ways_agree_while_the_sides_reach_further_than_time() -> None:
    parts = prompt(3, VisionBlock("", (3, 2, 5), 2.0), 4, VisionBlock("", (1, 7, 2), 1.0), 1)
    one, two = (rope_positions(*parts, time_is_extent=flag) for flag in (True, False))
    np.testing.assert_array_equal(one[0], two[0])
    assert one[1] == two[1] == 3 + 5 + 4 + 7 + 1


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0.5, [0, 0, 1, 1, 2]),
        (1.0, [0, 1, 2, 3, 4]),
        (0.0, [0, 0, 0, 0, 0]),
        (4 / 3, [0, 1, 2, 4, 5]),  # 3 * 4/3 must be 4, not 3.999..
        (2.5, [0, 2, 5, 7, 10]),
        (1.4, [0, 1, 2, 4, 5]),
        (1.4 * 5 / 7, [0, 1, 2, 3, 4]),
    ],
)
def test_time_is_rounded_down_after_the_product(step: float, expected: list[int]) -> None:
    positions, _ = rope_positions(*prompt(VisionBlock("", (5, 1, 1), step)))
    assert positions[0].tolist() == expected


def test_the_product_is_that_of_float32() -> None:
    """At 1.3 frames and 2 positions a second row 39 is at 39 * 40/13 = 120, as torch has it; in float64 at 119."""
    positions, _ = rope_positions(*prompt(VisionBlock("", (40, 1, 1), 2 / 1.3 * 2)))
    assert positions[0].tolist()[-2:] == [116, 120]


def test_blocks_of_qwen3_follow_the_text_between_them() -> None:
    row = VisionBlock("<0.2 seconds>", (1, 2, 2), 1.0)
    positions, following = rope_positions(*prompt(2, row, 3, row, 1))
    assert positions[0].tolist() == [0, 1, 2, 2, 2, 2, 4, 5, 6, 7, 7, 7, 7, 9]
    assert positions[1].tolist() == [0, 1, 2, 2, 3, 3, 4, 5, 6, 7, 7, 8, 8, 9]
    assert positions[2].tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9]
    assert following == 10


def test_blocks_that_do_not_fill_the_mask_are_a_mistake() -> None:
    mask, _ = prompt(2, VisionBlock("", (1, 2, 2), 1.0))
    with pytest.raises(ValueError, match="vision blocks"):
        rope_positions(mask, [VisionBlock("", (1, 2, 1), 1.0)])


# Prompts as runs of text and (kind, (t, h, w) in tokens, seconds between rows).
MIXES = {
    "one video": [9, ("video", (6, 3, 4), 1.0), 5],
    "long and small": [9, ("video", (24, 2, 2), 1.0), 5],
    "odd seconds": [4, ("video", (7, 2, 5), 0.75), 3, ("video", (5, 4, 3), 1.3), 6],
    "thirds": [4, ("video", (16, 2, 2), 2 / 3), 3],
    "slow": [4, ("video", (5, 2, 2), 7.9), 3],
    "image between videos": [
        2,
        ("video", (2, 3, 3), 0.5),
        1,
        ("image", (1, 9, 2), 0.0),
        1,
        ("video", (3, 1, 1), 2.0),
        8,
    ],
    "images": [3, ("image", (1, 5, 7), 0.0), 2, ("image", (1, 2, 2), 0.0), 4],
}


@pytest.mark.parity
@pytest.mark.parametrize("name", MIXES)
def test_qwen2_5_against_transformers(name: str) -> None:
    blocks = [
        part if isinstance(part, int) else VisionBlock("", part[1], part[2] * 2 if part[0] == "video" else 1.0)
        for part in MIXES[name]
    ]
    theirs, following = positions_of_transformers("qwen2_5_vl", MIXES[name])
    positions, ours_following = rope_positions(*prompt(*blocks), time_is_extent=False)
    np.testing.assert_array_equal(positions, theirs)
    assert ours_following == following


@pytest.mark.parity
@pytest.mark.parametrize("name", MIXES)
def test_qwen3_against_transformers(name: str) -> None:
    spread: list = []  # a video's rows become blocks with text (the time, vision start and end) between them
    for part in MIXES[name]:
        if isinstance(part, int) or part[0] == "image":
            spread.append(part)
            continue
        for row in range(part[1][0]):
            spread += [3, ("video", (1, *part[1][1:]), 0.0)] if row else [("video", (1, *part[1][1:]), 0.0)]
    blocks = [part if isinstance(part, int) else VisionBlock("", part[1], 1.0) for part in spread]
    theirs, following = positions_of_transformers("qwen3_vl", spread)
    for flag in (True, False):  # makes no difference in this family
        positions, ours_following = rope_positions(*prompt(*blocks), time_is_extent=flag)
        np.testing.assert_array_equal(positions, theirs)
        assert ours_following == following


def positions_of_transformers(family: str, parts: list) -> tuple[np.ndarray, int]:
    """transformers' own positions (3, n), and where it goes on, from a network that has no weights."""
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    cls = {"qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}[family]
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    bare = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision),
        get_vision_position_ids=lambda *a, **k: cls.get_vision_position_ids(bare, *a, **k),
    )
    kinds: list[int] = []
    grids: dict[str, list] = {"image": [], "video": []}
    seconds = []
    for part in parts:
        if isinstance(part, int):
            kinds += [0] * part
            continue
        kind, (t, h, w), second = part
        kinds += [1 if kind == "image" else 2] * (t * h * w)
        grids[kind].append([t, h * 2, w * 2])
        if kind == "video":
            seconds.append(second)
    ids = torch.zeros((1, len(kinds)), dtype=torch.long)
    extra = {"second_per_grid_ts": torch.tensor(seconds)} if family == "qwen2_5_vl" and seconds else {}
    positions, deltas = cls.get_rope_index(
        bare,
        ids,
        torch.tensor([kinds]),
        torch.tensor(grids["image"]) if grids["image"] else None,
        torch.tensor(grids["video"]) if grids["video"] else None,
        **extra,
    )
    return positions[:, 0].numpy(), int(deltas[0, 0]) + len(kinds)
