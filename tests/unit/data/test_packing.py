"""Rows: nothing lost, nothing over ctx_len, little unused."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_accel.data.documents import Document
from rwkv_accel.data.packing import best_fit, next_fit, plan_rows
from rwkv_accel.data.store import build_store


def store_of(*documents):
    """Documents given as (ids, flags), or as a length (all targets)."""
    made = [(list(range(1, d)) + [0], [True] * d) if isinstance(d, int) else d for d in documents]
    return build_store((Document("here", ids, flags) for ids, flags in made), 257)


def plan(store, ctx_len, packing="pack", overlong="split", keep_order=True):
    return plan_rows(store, ctx_len=ctx_len, packing=packing, overlong=overlong, keep_order=keep_order)


def rows_of(plan):
    """Rows as lists of (document, start, length)."""
    pieces = list(zip(plan.piece_document.tolist(), plan.piece_start.tolist(), plan.piece_length.tolist()))
    return [pieces[a:b] for a, b in pairwise(plan.row_offsets)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 16), max_size=80))
def test_best_fit_places_every_piece_once_and_within_capacity(lengths):
    array = np.array(lengths, np.int32)
    order, offsets = best_fit(array, 16)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    sums = [int(array[order[a:b]].sum()) for a, b in pairwise(offsets)]
    assert all(0 < s <= 16 for s in sums)
    # Best fit decreasing needs at most 11/9 of the best possible number of rows, plus 4 (Johnson 1973).
    assert len(sums) <= 11 / 9 * -(-sum(lengths) // 16) + 4 or max(lengths, default=0) > 8


def test_best_fit_fills_the_tightest_gap():
    order, offsets = best_fit(np.array([6, 5, 4, 3, 2]), 10)
    assert [order[a:b].tolist() for a, b in pairwise(offsets)] == [[0, 2], [1, 3, 4]]


def test_next_fit_keeps_the_order():
    order, offsets = next_fit(np.array([3, 4, 5, 1, 10]), 10)
    assert order.tolist() == [0, 1, 2, 3, 4]
    assert offsets.tolist() == [0, 2, 4, 5]


def test_chat_like_lengths_leave_less_than_two_percent_unused():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 0.8, 20_000), 5, 1024).astype(np.int32)
    _, offsets = best_fit(lengths, 1024)
    assert 1 - lengths.sum() / ((len(offsets) - 1) * 1024) < 0.02


def test_blocks_are_packed_apart_and_joined(monkeypatch):
    monkeypatch.setattr("rwkv_accel.data.packing.BLOCK_PIECES", 4)
    order, offsets = best_fit(np.full(10, 5), 10)
    assert order.tolist() == list(range(10))
    assert offsets.tolist() == [0, 2, 4, 6, 8, 10]


def test_a_document_of_n_tokens_has_n_minus_1_inputs():
    assert rows_of(plan(store_of(9, 2, 9), 8)) == [[(0, 0, 8)], [(1, 0, 1)], [(2, 0, 8)]]
    assert plan(store_of(9), 8).num_overlong == 0
    assert plan(store_of(10), 8).num_overlong == 1


def test_split_pieces_overlap_by_the_token_that_is_input_and_target():
    # 20 tokens, 19 inputs in pieces of 8, 8 and 3: tokens 0..8, 8..16, 16..19.
    split = plan(store_of(20, 3), 8)
    assert rows_of(split) == [[(0, 0, 8)], [(0, 8, 8)], [(0, 16, 3), (1, 0, 2)]]
    assert (split.num_overlong, split.num_tokens, split.num_rows) == (1, 21, 3)


def test_truncate_and_drop():
    assert rows_of(plan(store_of(20, 3), 8, overlong="truncate")) == [[(0, 0, 8)], [(1, 0, 2)]]
    dropped = plan(store_of(20, 3), 8, overlong="drop")
    assert rows_of(dropped) == [[(1, 0, 2)]]
    assert dropped.num_overlong == 1


def test_pad_gives_every_piece_its_row():
    assert rows_of(plan(store_of(4, 3, 12), 8, packing="pad")) == [
        [(0, 0, 3)], [(1, 0, 2)], [(2, 0, 8)], [(2, 8, 3)]
    ]  # fmt: skip


def test_pieces_without_target_are_left_out():
    prompt_only = ([5, 6, 0], [False, False, False])
    first_only = ([5, 0], [True, False])  # its only target has nothing to predict it from
    empty = ([0], [True])
    late_reply = ([5] * 12 + [6, 0], [False] * 12 + [True, True])
    result = plan(store_of(prompt_only, 3, first_only, empty, late_reply), 8)
    assert rows_of(result) == [[(1, 0, 2)], [(4, 8, 5)]] or rows_of(result) == [[(1, 0, 2), (4, 8, 5)]]
    assert result.num_without_target == 4


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=20),
    st.integers(1, 16),
    st.sampled_from(["pack", "pad"]),
    st.booleans(),
)
def test_every_target_of_every_document_is_in_exactly_one_row(lengths, ctx_len, packing, keep_order):
    result = plan(store_of(*lengths), ctx_len, packing=packing, keep_order=keep_order)
    targets = [
        (document, start + offset)
        for row in rows_of(result)
        for document, start, length in row
        for offset in range(1, length + 1)
    ]
    assert sorted(targets) == [(d, t) for d, n in enumerate(lengths) for t in range(1, n)]
    assert all(sum(length for _, _, length in row) <= ctx_len for row in rows_of(result))
