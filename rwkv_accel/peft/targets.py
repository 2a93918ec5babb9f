"""Which modules and parameters a recipe's words mean: targets, parts, patterns, layer ranges."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from rwkv_accel.errors import UserError

VECTORS = frozenset(
    ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a", "r_k")
)  # fmt: skip
LOWRANK = frozenset(("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"))
NORMS = frozenset(("ln0", "ln1", "ln2", "ln_x", "ln_out"))

_BLOCK = re.compile(r"^blocks\.(\d+)\.")


def part_of(name: str) -> str | None:
    """Part that a base parameter belongs to: emb, head, ln, vectors, lowrank, or None for the block
    matrices.
    """
    pieces = name.split(".")
    if name in ("emb.weight", "head.weight"):
        return pieces[0]
    if len(pieces) >= 2 and pieces[-2] in NORMS:
        return "ln"
    if pieces[-1] in VECTORS:
        return "vectors"
    return "lowrank" if pieces[-1] in LOWRANK else None


def block_of(name: str) -> int | None:
    """Index of the block that a module or parameter name lies in, None outside the blocks."""
    found = _BLOCK.match(name)
    return int(found.group(1)) if found else None


def in_layers(name: str, layer_range: tuple[int, int] | None) -> bool:
    """Whether a name lies in the inclusive range of blocks; names outside the blocks always do."""
    block = block_of(name)
    return layer_range is None or block is None or layer_range[0] <= block <= layer_range[1]


def matches(pattern: str, name: str) -> bool:
    """Exact suffix at a dot (`att.key` matches `blocks.3.att.key`), or a glob over the whole name."""
    if any(char in pattern for char in "*?["):
        return fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def select(patterns: Sequence[str], names: Iterable[str], *, key: str, what: str) -> list[str]:
    """Names that match any of the patterns, in their own order.

    Raises:
        UserError: a pattern matches nothing; `key` is the recipe's key and `what` the kind of thing, for
            the message.
    """
    names = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise UserError(f"{key}: {pattern!r} matches no {what} of this model{_nearest(pattern, names)}")
    return [name for name in names if any(matches(pattern, name) for pattern in patterns)]


def check_layer_range(layer_range: tuple[int, int] | None, n_layer: int) -> None:
    """Raises UserError unless the inclusive range lies within the model's blocks."""
    if layer_range is not None and layer_range[1] >= n_layer:
        raise UserError(
            f"peft.layer_range {list(layer_range)} ends beyond the model's last block {n_layer - 1}; "
            f"use at most [{min(layer_range[0], n_layer - 1)}, {n_layer - 1}]"
        )


def rank_for(name: str, rank: int, rank_pattern: dict[str, int]) -> int:
    """Rank of the adapter on a module: that of the first pattern that matches, else the common one."""
    return next((own for pattern, own in rank_pattern.items() if matches(pattern, name)), rank)


def _nearest(pattern: str, names: list[str]) -> str:
    if any(char in pattern for char in "*?["):
        return f"; names look like {names[-1]}" if names else ""
    suffixes = sorted({_BLOCK.sub("", name) for name in names})
    near = difflib.get_close_matches(pattern, [*suffixes, *names], 1, cutoff=0.4)
    near = near or [s for s in suffixes if s.rsplit(".", 1)[-1] == pattern.rsplit(".", 1)[-1]]
    return f"; the nearest is {near[0]}" if near else f"; it has {', '.join(suffixes[:12])}"
