"""Which rope positions a checkpoint means: releases of transformers compute two things in different ways.

A Qwen2.5-VL video has a temporal position for each row, `floor(row * seconds * tokens_per_second)`, and text follows
it. What the releases compute was established by running `get_rope_index` of each (`tests/releases` holds the numbers
and the script). For rows 4.6875 s apart (256 frames of ten minutes) at 2 positions a second:

    transformers     temporal step               rows of that video       text after a video begins after
    up to 4.51       floats                      0, 9, 18, 28 .. 1190     its largest position on any axis
    4.52 to 5.2      whole seconds: int(4.6875)  0, 8, 16, 24 .. 1016     its largest position on any axis
    5.3 to 5.5       none: all rows at one time  (a fault)                its height or width
    5.6 to 5.17      whole seconds               0, 8, 16, 24 .. 1016     its height or width
    from 5.18        floats                      0, 9, 18, 28 .. 1190     its height or width

They agree on images, on Qwen3-VL, and on the time of clips at 2 frames a second (1 s a row) or 1. Above 2 frames a
second, whole seconds put every row of a clip at the same time.

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

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["MRopeConvention"]


@dataclass(frozen=True)
class MRopeConvention:
    """How a release of transformers places a video and the text after it.

    Attributes:
        whole_seconds: the time between two rows is cut down to whole seconds before it is multiplied.
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

    def time_step(self, seconds_per_row: float, positions_per_second: float) -> float:
        """Temporal positions from one row of a Qwen2.5-VL video to the next, before rounding down."""
        return (int(seconds_per_row) if self.whole_seconds else seconds_per_row) * positions_per_second
