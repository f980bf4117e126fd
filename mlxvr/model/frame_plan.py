"""How a vision tower goes over a frame: what depends on the frame's size alone, worked out once, in numpy."""

import functools
from dataclasses import dataclass

import numpy as np

__all__ = ["FramePlan", "plan_frame"]

_ROPE_THETA = 10_000.0


@dataclass(frozen=True, eq=False)
class FramePlan:
    """What a frame of h x w patches needs beside its pixels.

    Attributes:
        order: (tokens,) the order in which the frame's tokens go through the tower.
        restore: (tokens,) its inverse.
        cos, sin: float32 (patches, head_dim), in that order.
        windows: (count, patches) for each run of equal windows, in that order; one entry of the whole frame where
            there are no windows.
        full_layers: the layers that see whole frames rather than windows; None: all of them.
        corners, weights: int32 and float32 (4, patches): the rows of the learned position table that surround each
            patch, and their bilinear weights; None where the tower has no table.
        deepstack_layers: the layers whose features are handed to the language model beside the last one's.
    """

    order: np.ndarray
    restore: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    windows: tuple[tuple[int, int], ...]
    full_layers: frozenset[int] | None = None
    corners: np.ndarray | None = None
    weights: np.ndarray | None = None
    deepstack_layers: tuple[int, ...] = ()


@functools.lru_cache(maxsize=16)
def plan_frame(  # 8 parameters: numbers, by which plans are cached; a family passes those that its tower has
    height: int,
    width: int,
    *,
    merge: int,
    head_dim: int,
    window: int | None = None,
    full_layers: frozenset[int] | None = None,
    table_side: int | None = None,
    deepstack_layers: tuple[int, ...] = (),
) -> FramePlan:
    """Plan a frame.

    Args:
        height, width: in patches.
        merge: patches of one side of a token.
        head_dim: of the tower's attention.
        window: tokens of one side of a window; None: there are no windows.
        full_layers, deepstack_layers: see `FramePlan`.
        table_side: sides of the learned position table; None: there is no table.
    """
    rows, columns = height // merge, width // merge
    order, windows = _window_order(rows, columns, window)
    windows = tuple((count, tokens * merge * merge) for count, tokens in windows)
    y, x = _patch_coordinates(height, width, merge)
    y, x = (axis.reshape(-1, merge * merge)[order].reshape(-1) for axis in (y, x))
    inverse = 1.0 / _ROPE_THETA ** (np.arange(0, head_dim // 2, 2, dtype=np.float32) / np.float32(head_dim // 2))
    angles = np.concatenate([np.outer(y, inverse), np.outer(x, inverse)], axis=1).astype(np.float32)
    angles = np.tile(angles, (1, 2))  # both halves of a head turn by the same angles
    corners = weights = None
    if table_side is not None:
        corners, weights = _table_lookup(y, x, height, width, table_side)
    return FramePlan(
        order=order,
        restore=np.argsort(order),
        cos=np.cos(angles),
        sin=np.sin(angles),
        windows=windows,
        full_layers=full_layers,
        corners=corners,
        weights=weights,
        deepstack_layers=deepstack_layers,
    )


def _patch_coordinates(height: int, width: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """(y, x) of each patch in the order of a processor's rows: token by token, and inside a token row by row."""
    y, x = np.indices((height, width))
    shape = (height // merge, merge, width // merge, merge)
    ordered = [axis.reshape(shape).transpose(0, 2, 1, 3).reshape(-1) for axis in (y, x)]
    return ordered[0], ordered[1]


def _window_order(rows: int, columns: int, window: int | None) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """Tokens sorted so that windows of equal size follow each other, and the (count, tokens) of each such run.

    Windows tile the frame from its top left corner; those at the right and bottom edge may be smaller, so that there
    are at most four sizes.
    """
    tokens = np.arange(rows * columns).reshape(rows, columns)
    if window is None:
        return tokens.reshape(-1), ((1, rows * columns),)
    tiles: dict[tuple[int, int], list[np.ndarray]] = {}
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            tile = tokens[top : top + window, left : left + window]
            tiles.setdefault(tile.shape, []).append(tile.reshape(-1))
    order = np.concatenate([tile for same in tiles.values() for tile in same])
    return order, tuple((len(same), same[0].size) for same in tiles.values())


def _table_lookup(y: np.ndarray, x: np.ndarray, height: int, width: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear interpolation of a side x side table over the frame, edges on edges: rows of the table and weights."""
    down = np.linspace(0, side - 1, height, dtype=np.float32)[y]
    across = np.linspace(0, side - 1, width, dtype=np.float32)[x]
    top, left = down.astype(np.int32), across.astype(np.int32)
    bottom, right = np.minimum(top + 1, side - 1), np.minimum(left + 1, side - 1)
    dy, dx = down - top, across - left
    corners = np.stack([top * side + left, top * side + right, bottom * side + left, bottom * side + right])
    weights = np.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx])
    return corners.astype(np.int32), weights.astype(np.float32)
