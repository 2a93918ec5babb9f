"""The order of rows: a pure function of (seed, epoch, position). Nothing is shuffled in memory.

A Feistel network permutes [0, 4^h); positions that land outside of [0, size) walk on through the cycle until
they are inside, which keeps the whole a bijection of [0, size). Any position of any epoch is therefore
known at once, for a hundred rows and for a billion alike, and a run resumes from one integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rwkv_accel.data.binidx import magic_slot

ROUNDS = 6
_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15


class RowOrder(Protocol):
    """Which row stands at which position of an epoch."""

    @property
    def rows_per_epoch(self) -> int: ...

    def rows_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Row ids (int64) at positions 0 <= p < rows_per_epoch of the epoch."""
        ...


@dataclass(frozen=True)
class FileOrder:
    """Rows as they are, the same in every epoch."""

    rows_per_epoch: int

    def rows_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        return positions


@dataclass(frozen=True)
class ShuffledOrder:
    """Every row once per epoch, in an order that (seed, epoch) names."""

    rows_per_epoch: int
    seed: int

    def rows_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        return permute(positions, self.rows_per_epoch, self.seed, epoch)


@dataclass(frozen=True)
class BucketOrder:
    """Every row once per epoch, rows of similar length in the same update. Rows must be sorted by length.

    Rows move about within blocks of BLOCK_WINDOWS updates, and the full updates are shuffled; a short last
    update stays last and takes from the longest rows.
    """

    rows_per_epoch: int
    seed: int
    rows_per_window: int

    BLOCK_WINDOWS = 16

    def rows_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        windows, within = np.divmod(positions, self.rows_per_window)
        num_full = self.rows_per_epoch // self.rows_per_window
        full = windows < num_full
        windows = windows.copy()
        if full.any():
            windows[full] = permute(windows[full], num_full, self.seed, epoch)
        sorted_positions = windows * self.rows_per_window + within
        block_size = self.BLOCK_WINDOWS * self.rows_per_window
        rows = np.empty_like(sorted_positions)
        for block in np.unique(sorted_positions // block_size).tolist():
            chosen = sorted_positions // block_size == block
            first = block * block_size
            size = min(block_size, self.rows_per_epoch - first)
            moved = permute(sorted_positions[chosen] - first, size, derive_seed(self.seed, block), epoch)
            rows[chosen] = first + moved
        return rows


@dataclass(frozen=True)
class MixtureOrder:
    """Rows of several sources by weight. Rows of source i are numbered from sum(sizes[:i]) on.

    An epoch has sum(sizes) rows, of which each source gives its share, rounded. A source is read through
    completely before any of its rows comes again, epochs notwithstanding, and each time in another order.
    """

    sizes: Sequence[int]
    weights: Sequence[float]
    seed: int

    @property
    def rows_per_epoch(self) -> int:
        return sum(self.sizes)

    def quotas(self) -> list[int]:
        """Rows of each source per epoch; they add up (largest remainders are rounded up)."""
        total, whole = self.rows_per_epoch, sum(self.weights)
        exact = [total * weight / whole for weight in self.weights]
        quotas = [int(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
        for index in by_remainder[: total - sum(quotas)]:
            quotas[index] += 1
        return quotas

    def rows_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        quotas = self.quotas()
        ends = np.cumsum(quotas)
        drawn = permute(positions, self.rows_per_epoch, self.seed, epoch)
        source_of = np.searchsorted(ends, drawn, side="right")
        rows = np.empty_like(drawn)
        for source in np.unique(source_of).tolist():
            chosen = source_of == source
            size, base = self.sizes[source], sum(self.sizes[:source])
            draws = epoch * quotas[source] + drawn[chosen] - (ends[source] - quotas[source])
            passes, within = np.divmod(draws, size)
            moved = np.empty_like(within)
            for number in np.unique(passes).tolist():
                now = passes == number
                moved[now] = permute(within[now], size, derive_seed(self.seed, source), number)
            rows[chosen] = base + moved
        return rows


@dataclass(frozen=True)
class MagicPrimeOrder:
    """The official pretraining order: sample ii of the run reads slot floor(golden * p) * ii^3 mod p.

    An epoch is one pass over the p slots. Source: RWKV-LM train_temp/src/dataset.py.
    """

    rows_per_epoch: int
    """The prime p."""

    def rows_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        first = 1 + epoch * self.rows_per_epoch
        return np.array([magic_slot(first + p, self.rows_per_epoch) for p in positions.tolist()], np.int64)


def permute(positions: np.ndarray, size: int, seed: int, epoch: int = 0) -> np.ndarray:
    """Where the permutation of [0, size) that (seed, epoch) names sends each of the positions; int64."""
    if size == 1:
        return np.zeros_like(positions, dtype=np.int64)
    half_bits = max(3, (int(size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = _encrypt(positions.astype(np.uint64), half_bits, keys)
    outside = values >= size
    while outside.any():
        values[outside] = _encrypt(values[outside], half_bits, keys)
        outside = values >= size
    return values.astype(np.int64)


def derive_seed(seed: int, index: int) -> int:
    """A seed of its own for part number `index` of something."""
    return int(_mix(np.array([(seed ^ _GOLDEN) & _MASK], np.uint64) + np.uint64(index + 1))[0])


def _encrypt(values: np.ndarray, half_bits: int, keys: list[np.uint64]) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    state = np.array([seed & _MASK], np.uint64)
    state = _mix(_mix(state + np.uint64(_GOLDEN)) + np.uint64(epoch))
    keys = []
    for _ in range(ROUNDS):
        state = state + np.uint64(_GOLDEN)
        keys.append(_mix(state)[0])
    return keys
