"""The order of training: every row once, the same for any number of ranks, and no two epochs alike."""

import hashlib
import subprocess
import sys
from collections import Counter

import pytest

from mlxvr.errors import ConfigError
from mlxvr.grpo.data_order import batches


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 64, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 200])
def test_every_row_comes_once(count, batch_size):
    found = batches(count, batch_size=batch_size, seed=3, epoch=0)
    assert sorted(index for batch in found for index in batch) == list(range(count))
    assert [len(batch) for batch in found[:-1]] == [batch_size] * (len(found) - 1)
    assert len(found[-1]) == (count % batch_size or batch_size)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 16])
def test_ranks_share_the_same_batches(ranks):
    """Together they have each batch, no row twice, and as many batches each."""
    whole = batches(53, batch_size=8, seed=1, epoch=2)
    shares = [batches(53, batch_size=8, seed=1, epoch=2, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(whole)}
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert Counter(index for part in parts for index in part) == Counter(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_seed_and_epoch_decide():
    def order(**what):
        return [index for batch in batches(50, batch_size=50, **what) for index in batch]

    assert order(seed=1, epoch=0) == order(seed=1, epoch=0)
    others = [order(seed=seed, epoch=epoch) for seed in (0, 1, 11) for epoch in (0, 1, 11)]
    assert len({tuple(one) for one in others}) == 9
    assert list(range(50)) not in others


def test_the_order_is_written_down():
    """By hand from the digests, so that no version may change it: a run could not be resumed."""
    digests = {index: hashlib.sha256(f"7/1/{index}".encode()).hexdigest() for index in range(6)}
    expected = tuple(sorted(digests, key=digests.get))
    assert batches(6, batch_size=4, seed=7, epoch=1) == [expected[:4], expected[4:]]
    code = "from mlxvr.grpo.data_order import batches; print(batches(6, batch_size=4, seed=7, epoch=1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[(3, 4, 0, 1), (5, 2)]"


def test_places_are_even():
    """Over many seeds a row is as often in the first half as in the second."""
    first = Counter(index for seed in range(400) for index in batches(10, batch_size=5, seed=seed, epoch=0)[0])
    assert all(150 < first[index] < 250 for index in range(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count is 0: expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0: expected at least 1"),
        ({"ranks": 0}, "ranks is 0: expected at least 1"),
        ({"rank": 2, "ranks": 2}, "rank 2 is none of 2 ranks: expected 0 to 1"),
        ({"rank": -1}, "rank -1 is none of 1 ranks"),
    ],
)
def test_numbers_that_make_no_sense(change, message):
    what = {"count": 4, "batch_size": 2, "seed": 0, "epoch": 0, **change}
    with pytest.raises(ConfigError, match=message):
        batches(what.pop("count"), **what)
