"""Stretches of blocks in which the same trains, and the plan of a model that has only some of the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.peft.plan import Plan


def stretches_of(config: RWKV7Config, plan: Plan) -> list[range]:
    """All blocks in their order, cut where what trains, or how weights are stored, changes."""
    alike = [_kind(plan, block) for block in range(config.n_layer)]
    cuts = [block for block in range(1, config.n_layer) if alike[block] != alike[block - 1]]
    return [range(a, b) for a, b in pairwise([0, *cuts, config.n_layer])]


def shortened(plan: Plan, blocks: Sequence[int]) -> Plan:
    """The plan of a model that has only these blocks, under new numbers."""
    places = {block: place for place, block in enumerate(blocks)}

    def moved(names: Iterable[str]) -> Iterator[tuple[str, str]]:
        """(name, new name) of those that are left."""
        for name in names:
            number, _, rest = name.removeprefix("blocks.").partition(".")
            if not name.startswith("blocks."):
                yield name, name
            elif int(number) in places:
                yield name, f"blocks.{places[int(number)]}.{rest}"

    return replace(
        plan,
        adapters={new: plan.adapters[name] for name, new in moved(plan.adapters)},
        trained=frozenset(new for _, new in moved(plan.trained)),
        quantised=frozenset(new for _, new in moved(plan.quantised)),
        state_blocks=tuple(place for place, block in enumerate(blocks) if block in plan.state_blocks),
    )


def first_reached(config: RWKV7Config, plan: Plan) -> int:
    """The block where the backward pass ends."""
    if any(name.startswith(("emb.", "blocks.0.ln0.")) for name in plan.trained):
        return 0
    reached = [b for b in range(config.n_layer) if any(_kind(plan, b)[part] for part in (0, 1, 3))]
    return min(reached, default=0)


def _kind(plan: Plan, block: int) -> tuple[Any, ...]:
    """Equal for blocks that take the same memory; the first one's few parameters more or less do not count."""
    prefix = f"blocks.{block}."

    def own(names: Iterable[str]) -> set[str]:
        return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}

    adapters = {name: plan.adapters[prefix + name] for name in own(plan.adapters)}
    trained = {name for name in own(plan.trained) if not name.startswith(("ln0.", "att.v0", "att.v1", "att.v2"))}
    return adapters, trained, own(plan.quantised), block in plan.state_blocks
