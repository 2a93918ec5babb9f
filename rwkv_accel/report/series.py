"""Records of a run as columns for curves, thinned out without losing an extreme.

Numbers that are no finite number (NaN, infinities, other types, missing) are None.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

Numbers = list[float | None]

# Of these the smallest and the largest value of every stretch stay when a long run is thinned out.
KEPT_EXTREMES = ("loss", "grad_norm", "kt_s")
# Records carry what was processed since the record before; curves are drawn over the sum.
TOKENS, SECONDS = "tokens", "wall_seconds"


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    # By exact type: a bool is no number, and long runs ask this millions of times.
    kind = type(value)
    return value if kind is int or (kind is float and math.isfinite(value)) else None


def columns_of(records: Sequence[dict[str, Any]]) -> dict[str, Numbers]:
    """One list per key that holds a number in any record; `step` among them."""
    names = dict.fromkeys(key for record in records for key in record)
    columns = {name: [number(record.get(name)) for record in records] for name in names}
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}


def running_sum(values: Sequence[float | None]) -> list[float]:
    """Sum of all values so far."""
    total, sums = 0.0, []
    for value in values:
        total += value or 0
        sums.append(total)
    return sums


def rising(values: Sequence[float | None]) -> list[float]:
    """The values with gaps filled by the value before, never falling: an axis."""
    top, axis = 0.0, []
    for value in values:
        top = max(top, value or 0)
        axis.append(top)
    return axis


def chosen_rows(columns: dict[str, Numbers], most: int) -> list[int]:
    """Rows to draw: all, or at most `most`, evenly spread, with every stretch's extremes of KEPT_EXTREMES and its
    first value that is missing."""
    count = len(columns["step"])
    if count <= most:
        return list(range(count))
    watched = [columns[name] for name in KEPT_EXTREMES if name in columns]
    stretches = max(1, (most - 2) // (3 * len(watched) + 1))
    rows = {0, count - 1}
    for index in range(stretches):
        begin, end = index * count // stretches, (index + 1) * count // stretches
        rows.add(begin)
        for values in watched:
            known = [(value, row) for row in range(begin, end) if (value := values[row]) is not None]
            if known:
                rows |= {min(known)[1], max(known)[1]}
            if len(known) < end - begin:
                rows.add(next(row for row in range(begin, end) if values[row] is None))
    return sorted(rows)


def value_at(step: float, steps: Sequence[float], values: Sequence[float]) -> float:
    """Linear between the records, from 0 at step 0; flat after the last."""
    index = bisect_right(steps, step)
    if index == len(steps):
        return values[-1] if values else 0.0
    left_step, left = (steps[index - 1], values[index - 1]) if index else (0, 0.0)
    share = (step - left_step) / (steps[index] - left_step) if steps[index] > left_step else 0.0
    return left + share * (values[index] - left)


def short(values: Sequence[float | None]) -> Numbers:
    """Seven digits are more than a screen shows, and half the size of all."""
    return [value if value is None or isinstance(value, int) else _short(value) for value in values]


def _short(value: float) -> float:
    rounded = float(f"{value:.7g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded
