"""Columns, axes and thinning, by hand-made numbers."""

import math
import random

import pytest

from rwkv_accel.report.series import chosen_rows, columns_of, number, rising, running_sum, short, value_at


@pytest.mark.parametrize("value", [None, True, "1.5", math.nan, math.inf, -math.inf, [1], {}])
def test_what_is_no_number(value):
    assert number(value) is None


def test_columns_have_a_gap_where_a_record_has_no_number():
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "mfu": 0.4, "note": "x"}, {"step": 3, "loss": 1.0}]
    assert columns_of(records) == {"step": [1, 2, 3], "loss": [2.0, None, 1.0], "mfu": [None, 0.4, None]}
    assert columns_of([]) == {}


def test_axes_never_run_backwards():
    assert running_sum([5, None, 7]) == [5, 5, 12]
    assert rising([1.0, None, 0.5, 3.0]) == [1.0, 1.0, 1.0, 3.0]


def test_value_between_records():
    steps, seconds = [10, 20], [5.0, 25.0]
    assert [value_at(step, steps, seconds) for step in (0, 5, 10, 15, 20, 99)] == [0, 2.5, 5, 15, 25, 25]
    assert value_at(3, [], []) == 0


def random_columns(count):
    rng = random.Random(0)
    return {
        "step": list(range(1, count + 1)),
        "loss": [rng.random() for _ in range(count)],
        "grad_norm": [rng.random() for _ in range(count)],
        "lr": [1e-3] * count,
    }


def test_a_short_run_is_drawn_whole():
    assert chosen_rows(random_columns(500), 500) == list(range(500))


def test_a_long_run_keeps_extremes_ends_and_gaps():
    columns = random_columns(100_000)
    columns["loss"][43_210] = 99.0
    columns["loss"][43_220] = -7.0
    columns["grad_norm"][77_777] = 1e6
    columns["loss"][5_000] = columns["loss"][99_000] = None
    rows = chosen_rows(columns, 4000)
    assert 2000 < len(rows) <= 4000
    assert rows == sorted(set(rows))
    assert {0, 99_999, 43_210, 43_220, 77_777, 5_000, 99_000} <= set(rows)
    gaps = [b - a for a, b in zip(rows, rows[1:])]
    assert max(gaps) < 300, "evenly spread"


@pytest.mark.parametrize("count", [101, 150, 999])
def test_never_more_points_than_asked_for(count):
    columns = random_columns(count)
    columns["loss"] = [None if row % 3 else value for row, value in enumerate(columns["loss"])]
    assert len(chosen_rows(columns, 100)) <= 100


def test_short_numbers_keep_seven_digits():
    assert short([1.23456789012, None, 3, 2.0, 1e-20]) == [1.234568, None, 3, 2, 1e-20]
