"""The keyed permutation: a bijection of any size, known at any position, another per epoch and seed."""

import numpy as np
import pytest

from rwkv_accel.data.sampler import permute


@pytest.mark.parametrize("size", [1, 2, 3, 7, 63, 64, 65, 1000, 4097])
def test_bijection(size):
    order = permute(np.arange(size), size, seed=5, epoch=2)
    assert np.array_equal(np.sort(order), np.arange(size))
    assert order.dtype == np.int64


def test_one_position_needs_no_other():
    whole = permute(np.arange(1000), 1000, seed=3, epoch=1)
    one_by_one = [int(permute(np.array([p]), 1000, seed=3, epoch=1)[0]) for p in range(1000)]
    assert whole.tolist() == one_by_one


def test_a_billion_rows():
    positions = np.array([0, 1, 999_999_999])
    rows = permute(positions, 1_000_000_000, seed=1)
    assert len(set(rows.tolist())) == 3
    assert ((rows >= 0) & (rows < 1_000_000_000)).all()


def test_seed_and_epoch_matter():
    orders = {tuple(permute(np.arange(50), 50, s, e).tolist()) for s in range(4) for e in range(4)}
    assert len(orders) == 16


def test_order_is_fixed_for_ever():
    # A change here would silently reorder the data of runs that resume with a newer version.
    assert permute(np.arange(10), 10, seed=42, epoch=0).tolist() == [4, 6, 0, 2, 5, 8, 1, 3, 7, 9]


def test_every_row_is_equally_likely_at_every_position():
    size, trials = 10, 2000
    counts = np.zeros((size, size))
    for seed in range(trials):
        counts[np.arange(size), permute(np.arange(size), size, seed)] += 1
    chi_square = ((counts - trials / size) ** 2 / (trials / size)).sum()
    # 81 degrees of freedom: mean 81, standard deviation 12.7.
    assert chi_square < 81 + 5 * 12.7


def test_neighbours_are_torn_apart():
    order = permute(np.arange(10_000), 10_000, seed=0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
