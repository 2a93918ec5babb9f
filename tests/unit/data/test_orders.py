"""Mixtures and buckets: pure functions of (seed, epoch, position) like the plain shuffle."""

from collections import Counter

import numpy as np
import pytest

from rwkv_accel.data.binidx import write_binidx
from rwkv_accel.data.sampler import BucketOrder, MixtureOrder
from rwkv_accel.errors import UserError

from .conftest import make_loader


def epoch_of(order, epoch):
    return order.rows_at(epoch, np.arange(order.rows_per_epoch)).tolist()


def source_counts(rows, sizes):
    ends = np.cumsum(sizes)
    return [int((np.searchsorted(ends, rows, side="right") == i).sum()) for i in range(len(sizes))]


def test_mixture_gives_each_source_its_share():
    order = MixtureOrder([100, 10, 50], [1.0, 2.0, 1.0], seed=3)
    assert order.quotas() == [40, 80, 40]
    for epoch in range(3):
        assert source_counts(epoch_of(order, epoch), [100, 10, 50]) == [40, 80, 40]


def test_shares_are_rounded_and_add_up():
    assert MixtureOrder([5, 5, 1], [1, 1, 1], seed=0).quotas() == [4, 4, 3]
    assert MixtureOrder([10], [0.3], seed=0).quotas() == [10]


def test_every_row_of_a_source_comes_before_any_comes_again():
    sizes = [12, 5]
    order = MixtureOrder(sizes, [1, 3], seed=1)
    # Source 0 gives 4 rows per epoch: three epochs are one pass. Source 1 gives 13.
    rows = [r for epoch in range(3) for r in epoch_of(order, epoch)]
    assert sorted(r for r in rows if r < 12) == list(range(12))
    counts = Counter(r for r in rows if r >= 12)
    assert set(counts.values()) <= {7, 8}
    assert sum(counts.values()) == 39


def test_mixture_is_known_at_any_position_and_repeats():
    order, twin = (MixtureOrder([30, 20], [1, 1], seed=5) for _ in range(2))
    whole = epoch_of(order, 2)
    assert whole == epoch_of(twin, 2)
    assert whole == [int(order.rows_at(2, np.array([p]))[0]) for p in range(50)]
    assert whole != epoch_of(order, 1)
    assert whole != epoch_of(MixtureOrder([30, 20], [1, 1], seed=6), 2)


def test_sources_are_interleaved():
    rows = np.array(epoch_of(MixtureOrder([500, 500], [1, 1], seed=0), 0))
    first_half = source_counts(rows[:500], [500, 500])
    assert abs(first_half[0] - 250) < 60


@pytest.mark.parametrize(("num_rows", "window"), [(1000, 8), (37, 8), (5, 8), (8, 8), (1, 1)])
def test_buckets_hold_every_row_once(num_rows, window):
    order = BucketOrder(num_rows, seed=1, rows_per_window=window)
    for epoch in (0, 1):
        assert sorted(epoch_of(order, epoch)) == list(range(num_rows))


def test_bucket_windows_are_of_similar_length_and_change_with_the_epoch():
    order = BucketOrder(4096, seed=1, rows_per_window=8)
    windows = np.array(epoch_of(order, 0)).reshape(-1, 8)
    # Rows are sorted by length: a window may only span one block of 16 windows.
    assert (np.ptp(windows, axis=1) < 16 * 8).all()
    assert abs(np.corrcoef(windows[:-1, 0], windows[1:, 0])[0, 1]) < 0.2
    other = np.array(epoch_of(order, 1)).reshape(-1, 8)
    assert {frozenset(w) for w in windows.tolist()} != {frozenset(w) for w in other.tolist()}


def test_bucket_loader_pads_little(write_jsonl):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 60, 400).tolist()
    path = write_jsonl([{"text": "x" * n} for n in lengths])

    def padding(packing):
        loader = make_loader(path, packing=packing, ctx_len=64, trainer={"global_batch_size": 8, "micro_batch_size": 8})
        batches = [b for w in loader.windows(0, 0) for b in w.batches]
        assert sorted(i for b in batches for i in b.sample_ids) == list(range(400))
        assert all(b.cu_seqlens is None and len(b.ids_BT) == 8 for b in batches)
        return 1 - sum(b.num_tokens for b in batches) / sum(b.ids_BT.numel() for b in batches)

    assert padding("bucket") < 0.2 < padding("pad")


def test_mixture_of_files_through_the_loader(write_jsonl, tmp_path):
    first = write_jsonl([{"text": "a" * (3 + i % 4)} for i in range(30)], "a.jsonl")
    write_binidx(tmp_path / "b", [[99, 99, 99, 0]] * 10)
    loader = make_loader((first, str(tmp_path / "b.bin")), weights=(1, 1), packing="pad")
    drawn = [b.ids_BT[0, 0].item() for w in loader.windows(0, 0) for b in w.batches]
    assert Counter(drawn) == {98: 20, 99: 20}
    assert f"data: 20 rows per epoch from the 10 of {tmp_path}/b.bin" in loader.describe()


def test_paths_without_weights_are_joined(write_jsonl, tmp_path):
    first = write_jsonl([{"text": "a"}] * 2, "a.jsonl")
    write_binidx(tmp_path / "b", [[99, 0]] * 2)
    last = write_jsonl([{"text": "c"}] * 2, "c.jsonl")
    loader = make_loader((first, str(tmp_path / "b.bin"), last), packing="pad", shuffle=False)
    assert [b.ids_BT.tolist() for w in loader.windows(0, 0) for b in w.batches] == [
        [[98]], [[98]], [[99]], [[99]], [[100]], [[100]]
    ]  # fmt: skip
    limited = make_loader((first, str(tmp_path / "b.bin"), last), packing="pad", shuffle=False, max_documents=3)
    assert limited.rows_per_epoch == 3


def test_bucket_of_mixed_kinds_is_refused(write_jsonl, tmp_path):
    write_binidx(tmp_path / "b", [[99, 0]] * 2)
    with pytest.raises(UserError, match="bucket cannot join binidx"):
        make_loader((write_jsonl([{"text": "a"}]), str(tmp_path / "b.bin")), packing="bucket")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"weights": (1, 1)}, "data.weights has 2 numbers for 1 paths"),
        ({"weights": (1,), "shuffle": False}, "data.weights decides the order"),
        ({"packing": "bucket", "shuffle": False}, "data.packing bucket decides the order"),
        ({"packing": "bucket", "weights": (1,)}, "with data.weights use pack or pad"),
        ({"streaming": True, "packing": "bucket"}, "packing bucket needs all rows at once"),
        ({"streaming": True, "sampling": "magic_prime"}, "sampling magic_prime needs all rows at once"),
        ({"sampling": "magic_prime", "max_documents": 3}, "one whole binidx"),
        ({"prompt_column": "q"}, "go together"),
        ({"template": "raw", "thinking": "fast"}, "fast is a form of data.template rwkv, not of raw"),
    ],
)
def test_settings_that_contradict_each_other(data, problem):
    with pytest.raises(ValueError, match=problem):
        make_loader("x.jsonl", **data)
