"""A packed group holds what each completion read, where it read it, and lets nobody see more than that."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxvr.grpo.step import forward
from mlxvr.grpo.step.packing import PackedGroup, pack, tree_mask


def make_prompt(length: int, *, next_position: int | None = None) -> SimpleNamespace:
    positions = np.stack([np.arange(length), np.arange(length) // 2, np.arange(length) % 3]).astype(np.int32)
    media_mask = np.zeros(length, dtype=bool)
    media_mask[1:3] = length > 3
    return SimpleNamespace(
        ids=np.arange(100, 100 + length, dtype=np.int32),
        positions=positions,
        media_mask=media_mask,
        features=None,
        next_position=length if next_position is None else next_position,
    )


def pack_lengths(prompt: int, lengths: list[int]) -> PackedGroup:
    rng = np.random.default_rng(0)
    return pack(make_prompt(prompt), [rng.integers(0, 99, length).astype(np.int32) for length in lengths])


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_a_group_by_hand():
    packed = pack(make_prompt(4, next_position=9), [ids(5, 6, 7), ids(8), ids(10, 11)])
    assert packed.ids.tolist() == [100, 101, 102, 103, 5, 6, 10]
    assert packed.owner.tolist() == [-1, -1, -1, -1, 0, 0, 2]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 9, 10, 9], [0, 0, 1, 1, 9, 10, 9], [0, 1, 2, 0, 9, 10, 9]]
    assert packed.targets.tolist() == [[5, 6, 7], [8, 0, 0], [10, 11, 0]]
    assert packed.mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert packed.columns.tolist() == [[3, 4, 5], [3, 0, 0], [3, 6, 0]]
    assert packed.media_mask.tolist() == [False, True, True, False, False, False, False]
    assert (packed.prompt_length, packed.spans) == (4, [(4, 6), (6, 6), (6, 7)])
    for array in (packed.ids, packed.positions, packed.targets, packed.columns):
        assert array.dtype == np.int32


def test_the_mask_by_hand():
    packed = pack(make_prompt(2), [ids(5, 6, 7), ids(8, 9)])
    assert np.array(tree_mask(packed)).astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("completions", [[], [ids(5, 6), ids()]])
def test_what_cannot_be_packed(completions):
    with pytest.raises(ValueError, match="at least one"):
        pack(make_prompt(3), completions)


@pytest.mark.parametrize(("scores_at_once", "queries_at_once"), [(1, 99), (60, 99), (200, 99), (10**9, 99), (10**9, 4)])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [6, 1, 9, 2, 2], [3, 3, 3, 3], [1, 20, 1], [2]])
@pytest.mark.parametrize("prompt", [1, 7])
def test_blocks_show_each_query_what_the_tree_shows_it(prompt, lengths, scores_at_once, queries_at_once, monkeypatch):
    monkeypatch.setattr(forward, "SCORES_AT_ONCE", 2 * scores_at_once)
    monkeypatch.setattr(forward, "QUERIES_AT_ONCE", queries_at_once)
    packed = pack_lengths(prompt, lengths)
    count = len(packed.ids)
    seen = np.zeros((count, count), dtype=int)
    next_query = 0
    for block in forward._blocks(packed, 2):
        assert block.start == next_query < block.stop
        next_query = block.stop
        keys = np.array(block.keys(mx.arange(count)[None, None, :, None]))[0, 0, :, 0]
        queries = np.arange(block.start, block.stop)
        assert len(queries) <= queries_at_once
        assert len(queries) * len(keys) <= max(scores_at_once, len(keys))  # as many as allowed, but one query at least
        if isinstance(block.mask, str):  # causal, aligned at the lower right
            visible = np.arange(len(keys))[None] <= np.arange(len(queries))[:, None] + len(keys) - len(queries)
        else:
            visible = np.array(block.mask)
        for query, row in zip(queries, visible):
            seen[query, keys[row]] += 1
    assert next_query == count
    np.testing.assert_array_equal(seen, np.array(tree_mask(packed)).astype(int))


def test_short_completions_share_a_block_and_long_ones_do_not(monkeypatch):
    packed = pack_lengths(10, [4, 4, 4, 30])

    def cut(scores: int, queries: int) -> list[tuple[int, int]]:
        monkeypatch.setattr(forward, "SCORES_AT_ONCE", scores)
        monkeypatch.setattr(forward, "QUERIES_AT_ONCE", queries)
        return [(block.start, block.stop) for block in forward._blocks(packed, 1)]

    assert cut(10**9, 99) == [(0, 10), (10, 48)]
    assert cut(200, 99) == [(0, 10), (10, 19), (19, 24), (24, 29), (29, 34), (34, 39), (39, 44), (44, 48)]
    assert cut(10**9, 8) == [(0, 8), (8, 10), (10, 16), (16, 19), (19, 27), (27, 35), (35, 43), (43, 48)]
