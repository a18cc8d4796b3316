"""Order of an epoch: permutations determined by (seed, epoch), and the ranks' shares."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from pipelines.order import Order, even_split, permutation, philox

WORD = (1 << 64) - 1


def philox_4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as in Salmon et al. (2011), in integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (second >> 64) ^ c1 ^ k0, second & WORD, (first >> 64) ^ c3 ^ k1, first & WORD
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
    return [c0, c1, c2, c3]


def test_words_are_philox() -> None:
    # The known answers of the authors' library, Random123.
    zeros = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox_4x64([0] * 4, [0] * 2) == zeros
    assert philox_4x64([WORD] * 4, [WORD] * 2)[0] == 0x87B092C3013FE90B
    expected = [word for block in (1, 2, 3) for word in philox_4x64([block, 7, 2, 0], [5, 11])]
    assert philox(5, 11, 2, 7).random_raw(12).tolist() == expected
    named = philox_4x64([1, 7, 2**32 + 0xCBF43926, 0], [5, 11])  # the check value of CRC-32
    assert philox(5, 11, "123456789", 7).random_raw(4).tolist() == named


def test_permutation_sorts_philox_words() -> None:
    words = [word for block in range(1, 6) for word in philox_4x64([block, 4, 1, 0], [3, 2])]
    assert permutation(18, seed=3, epoch=2, stream=1, index=4).tolist() == sorted(range(18), key=words.__getitem__)


@pytest.mark.parametrize("shuffle_shards", [1, 4, 100])
def test_each_sample_once(shuffle_shards: int) -> None:
    sizes = np.random.default_rng(1).integers(0, 50, 23)  # some shards are empty
    order = Order(sizes, seed=9, shuffle_shards=shuffle_shards)
    epoch = order.samples(4, 0, len(order))
    assert len(order) == sizes.sum()
    assert np.array_equal(np.sort(epoch), np.arange(sizes.sum()))
    assert not np.array_equal(epoch, np.arange(sizes.sum()))


def test_samples_stay_in_blocks_of_shards() -> None:
    sizes = np.random.default_rng(2).integers(1, 40, 22)
    shard_of = np.repeat(np.arange(22), sizes)
    epoch = shard_of[Order(sizes, seed=0, shuffle_shards=5).samples(0, 0, int(sizes.sum()))]
    seen: list[int] = []
    while len(epoch):
        block = list(dict.fromkeys(epoch.tolist()))[:5]
        length = sizes[block].sum()
        assert set(epoch[:length]) == set(block)  # five whole shards before any other begins
        assert len(block) == 1 or (np.diff(epoch[:length]) != 0).sum() > len(block)  # mixed, not one after another
        seen, epoch = seen + block, epoch[length:]
    assert sorted(seen) == list(range(22))
    assert sorted(seen[:5]) != list(range(5))


def test_blocks_are_shuffled_in_different_ways() -> None:
    blocks = Order(np.full(12, 50), seed=0, shuffle_shards=2).samples(0, 0, 600).reshape(6, 100) % 50
    assert len({block.tobytes() for block in blocks}) == 6


def test_any_range_of_positions_agrees() -> None:
    sizes = np.random.default_rng(3).integers(0, 30, 17)
    order = Order(sizes, seed=1, shuffle_shards=3)
    epoch = Order(sizes, seed=1, shuffle_shards=3).samples(6, 0, len(order))
    cuts = np.random.default_rng(4).integers(0, len(order) + 1, (60, 2))
    for start, stop in np.sort(cuts, axis=1):
        assert np.array_equal(order.samples(6, int(start), int(stop)), epoch[start:stop])


def test_epochs_and_seeds_differ() -> None:
    sizes = np.full(8, 100)
    orders = [Order(sizes, seed, 4).samples(epoch, 0, 800) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 12  # one fixed point is expected of two random permutations


@pytest.mark.parametrize("size", range(1, 9))
def test_parts_cover_the_batch(size: int) -> None:
    for batch in (1, 3, 7, 100, 127):
        ranges = [even_split(batch, rank, size) for rank in range(size)]
        assert [i for low, high in ranges for i in range(low, high)] == list(range(batch))
        lengths = [high - low for low, high in ranges]
        assert max(lengths) - min(lengths) <= 1


def test_a_billion_samples_need_no_billion_entries() -> None:
    tracemalloc.start()
    try:
        order = Order(np.full(10**6, 1000), seed=0, shuffle_shards=16)
        middle = order.samples(0, 500_000_000, 500_001_024)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(order) == 10**9
    assert len(np.unique(middle)) == 1024
    assert peak < 100e6  # a permutation of all samples has 8e9 bytes
