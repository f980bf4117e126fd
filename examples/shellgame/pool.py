"""Training examples by the hundred thousand: made by forked workers into shared memory, grouped into fixed shapes.

A bucket is one frame size and one number of pairs of frames. All rows of a bucket are padded to one length, so every
step on it has the same shapes and can be replayed as a CUDA graph.
"""

import mmap
import os
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .questions import KINDS, Example, make_example
from .tokens import IGNORED, Codec
from .world import COLORS, HIDDEN, MAX_SPRITES, OUTLINES, TRAINED_SWAPS, most_swaps

# What share of the rows asks about what; drills practise the reading of options.
MIX = {
    "color": 7, "shape": 6, "direction": 8, "visible": 9, "grounded_color": 6,
    "start_cup": 5, "ball_color": 4, "cup_color": 3, "first_swap": 5, "ball_visible": 3, "cups_moving": 4,
    "count": 5, "final_cup": 27, "drill": 8,
}  # fmt: skip
ROW_KINDS = (*MIX, "held_out")  # the last only when evaluating
LONGEST_TAIL = 246  # tokens after the video; checked when rows are written


@dataclass(frozen=True)
class Bucket:
    """A frame size in pixels, a number of pairs of frames, and the shapes of pictures that come to that size."""

    height: int
    width: int
    pairs: int
    extents: tuple[tuple[float, float], ...]  # (width, height) of the picture in world units

    @property
    def tokens_per_pair(self) -> int:
        """Video tokens of one pair of frames."""
        return (self.height // 32) * (self.width // 32)


_SQUARE, _WIDE, _TALL = ((1.0, 1.0),), ((1.25, 1.0),), ((1.0, 1.25),)
_SQUEEZED = ((4 / 3, 1.0), (16 / 9, 1.0))  # what the token budget makes of 4:3 and 16:9


def make_buckets(shortest: int = 7, longest: int = 16) -> list[Bucket]:
    """Every length at 128x128, and every second one at the other sizes."""
    lengths = range(shortest, longest + 1)
    buckets = [Bucket(128, 128, n, _SQUARE) for n in lengths]
    for height, width, extents in ((128, 160, _WIDE), (160, 128, _TALL), (96, 160, _SQUEEZED)):
        buckets += [Bucket(height, width, n, extents) for n in lengths if n % 2 == 0]
    return buckets


def longest_row(codec: Codec, bucket: Bucket) -> int:
    """Tokens of the longest row of a bucket, rounded up to a multiple of 16."""
    labels = [f"{t + 0.3:.1f}" for t in np.arange(bucket.pairs) * 1.2]
    length = len(codec.prefix(labels, bucket.tokens_per_pair)) + LONGEST_TAIL
    return -(-length // 16) * 16


class Pool:
    """Rows of one bucket in shared memory; `arrays` maps a name to an array whose first axis is the row."""

    def __init__(self, bucket: Bucket, rows: int, length: int) -> None:
        self.bucket, self.rows, self.length = bucket, rows, length
        frames = 2 * bucket.pairs
        self.arrays = {
            "ids": _shared(np.int16, rows, length),
            "labels": _shared(np.int16, rows, length),
            "first": _shared(np.int16, rows, 2),
            "kind": _shared(np.int8, rows),
            "swaps": _shared(np.int8, rows),
            "places": _shared(np.float16, rows, frames, MAX_SPRITES, 2),
            "radius": _shared(np.float32, rows, MAX_SPRITES),
            "outline": _shared(np.int8, rows, MAX_SPRITES),
            "color": _shared(np.int8, rows, MAX_SPRITES),
            "scale": _shared(np.float32, rows, 2),
        }

    def write(
        self, index: int, codec: Codec, rng: random.Random, kind: str, example: Example, guess_span: float
    ) -> None:
        """Encode one example into row `index`."""
        tokens = self.bucket.tokens_per_pair
        is_drill = kind == "drill"
        row = codec.drill(rng, example, tokens) if is_drill else codec.row(rng, example, tokens, guess_span=guess_span)
        if len(row.ids) > self.length:
            raise ValueError(f"a row of {len(row.ids)} tokens does not fit into {self.length}: raise LONGEST_TAIL")
        a, extent = self.arrays, example.extent
        a["ids"][index, : len(row.ids)], a["ids"][index, len(row.ids) :] = row.ids, 0
        a["labels"][index, : len(row.ids)], a["labels"][index, len(row.ids) :] = row.labels, IGNORED
        a["first"][index] = row.first
        a["kind"][index], a["swaps"][index] = ROW_KINDS.index(kind), example.swaps
        sprites = example.scene.sprites
        a["places"][index] = HIDDEN
        a["places"][index, :, : len(sprites)] = example.scene.places(example.clock.times).transpose(1, 0, 2)
        for number in range(MAX_SPRITES):
            sprite = sprites[min(number, len(sprites) - 1)]
            a["radius"][index, number] = sprite.radius
            a["outline"][index, number] = OUTLINES.index(sprite.outline)
            a["color"][index, number] = _COLOR_INDEX[sprite.color]
        a["scale"][index] = self.bucket.width / extent[0], self.bucket.height / extent[1]


_COLOR_INDEX = {name: index for index, name in enumerate(COLORS)}


def _shared(dtype: type, *shape: int) -> np.ndarray:
    """An array that forked children write and the parent reads."""
    size = max(1, int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)
    return np.frombuffer(mmap.mmap(-1, size), dtype=dtype, count=int(np.prod(shape))).reshape(shape)


Maker = Callable[[random.Random, Bucket], tuple[str, Example]]


def training_example(rng: random.Random, bucket: Bucket) -> tuple[str, Example]:
    """A row's kind and example, drawn from `MIX`."""
    kind = rng.choices(list(MIX), list(MIX.values()))[0]
    about = rng.choice(KINDS) if kind == "drill" else kind
    return kind, make_example(rng, about, bucket.pairs, rng.choice(bucket.extents))


def evaluation_example(rng: random.Random, bucket: Bucket) -> tuple[str, Example]:
    """As `training_example`, with held-out sequences and longer games among them and no drills."""
    extent, chance = rng.choice(bucket.extents), rng.random()
    most = most_swaps(bucket.pairs)
    if chance < 0.2:
        swaps = rng.randint(2, min(TRAINED_SWAPS, most))
        return "held_out", make_example(rng, "final_cup", bucket.pairs, extent, swaps=swaps, held_out=True)
    if chance < 0.4 and most > TRAINED_SWAPS:
        swaps = rng.randint(TRAINED_SWAPS + 1, most)
        return "final_cup", make_example(rng, "final_cup", bucket.pairs, extent, swaps=swaps)
    kind = "final_cup" if chance < 0.5 else rng.choice(KINDS)
    return kind, make_example(rng, kind, bucket.pairs, extent)


def fill(pools: Sequence[Pool], codec: Codec, seed: int, *, workers: int, guess_span: float, make: Maker) -> list[int]:
    """Start workers that fill every row of every pool; returns their process ids for `join`."""
    children = []
    for worker in range(workers):
        child = os.fork()
        if child == 0:
            _work(pools, codec, f"{seed}/{worker}", range(worker, 1 << 62, workers), guess_span, make)
        children.append(child)
    return children


def _work(pools: Sequence[Pool], codec: Codec, seed: str, share: range, guess_span: float, make: Maker) -> None:
    """A child's life: its share of each pool's rows, then exit."""
    try:
        rng = random.Random(seed)
        for pool in pools:
            for index in range(share.start, pool.rows, share.step):
                kind, example = make(rng, pool.bucket)
                pool.write(index, codec, rng, kind, example, guess_span)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def join(children: Sequence[int]) -> None:
    """Wait for the workers; raises if one of them failed."""
    for child in children:
        if os.waitpid(child, 0)[1] != 0:
            raise RuntimeError("a worker that makes training examples failed; its traceback is above")
