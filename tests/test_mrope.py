"""Rope positions of Qwen2.5-VL as releases of transformers compute them.

`releases/positions.json` holds what the releases themselves computed; `releases/make.py` writes it.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from releases.prompts import PROMPTS

from mlxvr.model.families.qwen2_5_vl import MRopeConvention
from mlxvr.model.positions import VisionBlock, rope_positions

RELEASES = json.loads((Path(__file__).parent / "releases" / "positions.json").read_text())
FAULTY = ("5.3.0", "5.5.4")  # all rows of a video at one time
TOKENS_PER_SECOND = 2


def our_positions(release: str, prompt: str) -> tuple[np.ndarray, int]:
    """Positions of one of the scripts' prompts under the convention of a release."""
    convention = MRopeConvention.of_release(release)
    mask, blocks, text = [], [], 0
    for part in PROMPTS[prompt]:
        if isinstance(part, int):
            text += part
            continue
        kind, grid, seconds = part
        step = 1.0 if kind == "image" else convention.time_step(seconds, TOKENS_PER_SECOND)
        blocks.append(VisionBlock("", tuple(grid), step))
        mask += [False] * (text + 1) + [True] * blocks[-1].tokens  # the start token before, the end token after
        text = 1
    mask += [False] * text
    return rope_positions(np.array(mask), blocks, time_is_extent=convention.time_is_extent)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("release", [release for release in RELEASES if release not in FAULTY])
def test_positions_equal_those_of_the_release(release: str, prompt: str) -> None:
    expected = RELEASES[release][prompt]
    positions, following = our_positions(release, prompt)
    np.testing.assert_array_equal(positions, expected["positions"])
    assert following == expected["next"]


def test_256_frames_of_ten_minutes() -> None:
    """9.375 positions a row where floats are multiplied, 8 where whole seconds are: the last of 128 rows is far off."""
    rows = {}
    for release in RELEASES:
        if release not in FAULTY:
            positions, _ = our_positions(release, "10 minutes, 256 frames")
            rows[release] = positions[0, 4:132] - positions[0, 4]
    floats, whole = rows["5.24.0"], rows["4.57.1"]
    assert (floats[:4].tolist(), floats[-1]) == ([0, 9, 18, 28], 1190)
    assert (whole[:4].tolist(), whole[-1]) == ([0, 8, 16, 24], 1016)
    assert int((floats != whole).sum()) == 127
    assert {release for release, found in rows.items() if found[-1] == 1016} == {
        "4.52.1",
        "4.52.4",
        "4.55.4",
        "4.57.1",
        "5.0.0",
        "5.2.0",
        "5.6.0",
        "5.17.0",
    }


@pytest.mark.parametrize("release", FAULTY)
def test_releases_that_lost_the_time_are_read_as_the_one_that_mended_it(release: str) -> None:
    theirs = RELEASES[release]["10 minutes, 256 frames"]["positions"][0][4:132]
    assert len(set(theirs)) == 1  # what is not copied here
    assert MRopeConvention.of_release(release) == MRopeConvention.of_release("5.6.0")


def test_time_is_rounded_down_in_float32() -> None:
    """At 1.3 frames a second float64 puts row 39 at 119.99..; float32, in which transformers multiplies, at 120."""
    seconds = 2 / 1.3
    assert int(39 * (seconds * TOKENS_PER_SECOND)) == 119
    positions, _ = our_positions("5.24.0", "1.3 frames a second")
    assert positions[0, 4 + 39] - positions[0, 4] == 120
    assert RELEASES["5.24.0"]["1.3 frames a second"]["positions"][0][4 + 39] == positions[0, 4 + 39]


@pytest.mark.parametrize(
    ("version", "whole_seconds", "time_is_extent"),
    [
        ("4.41.2", False, True),
        ("4.51.3", False, True),
        ("4.52.0.dev0", True, True),
        ("4.57.1", True, True),
        ("5.0.0rc3", True, True),
        ("5.2.0", True, True),
        ("5.3.0", True, False),
        ("5.17.0", True, False),
        ("5.18.0", False, False),
        ("6.0.0.dev0", False, False),
        ("5", True, True),
        (None, True, True),
        ("", True, True),
        ("unknown", True, True),
    ],
)
def test_the_release_that_wrote_a_checkpoint_decides(
    version: str | None, whole_seconds: bool, time_is_extent: bool
) -> None:
    expected = MRopeConvention(whole_seconds, time_is_extent)
    assert MRopeConvention.of_config({"transformers_version": version}) == expected


def test_a_config_that_names_no_release_means_the_public_checkpoints_way() -> None:
    assert MRopeConvention.of_config({}) == MRopeConvention.of_release("4.57.1")
