"""What the tensors of an adapter say about it, for files that have no description."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rwkv_accel.errors import UserError
from rwkv_accel.peft.targets import VECTORS, part_of


def describe_tensors(tensors: Mapping[str, Tensor], method: str) -> dict[str, Any]:
    """The peft keys that follow from an adapter's tensors: ranks, targets, trained base parameters and
    states.
    """
    ranks: dict[str, int] = {}
    base_names, has_state = [], False
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        if last in ("lora_A", "miss_D"):
            ranks[owner] = tensor.shape[-1] if tensor.dim() == 3 else tensor.shape[0]
        elif last == "time_state":
            has_state = True
        elif last not in ("lora_B", "lora_m", "init_lora_A", "init_lora_B"):
            if part_of(name) is None and last not in VECTORS:
                raise UserError(f"unknown tensor {name} among the adapter's; only adapters of RWKV-7 can be read")
            base_names.append(name)
    fields: dict[str, Any] = {"train_patterns": tuple(base_names), "train_state": has_state and method != "state"}
    if ranks:
        rank = Counter(ranks.values()).most_common(1)[0][0]
        # Full names: a suffix would also mean blocks that this adapter may have left out.
        fields |= {"rank": rank, "targets": tuple(ranks)}
        fields["rank_pattern"] = {name: own for name, own in ranks.items() if own != rank}
    return fields
