"""State tuning: the WKV state that every fresh sequence starts from is trained (RWKV-PEFT
rwkvt/rwkv7/att.py).

Shapes: H heads, N head size; time_state [H, N, N] = [H, value, key] per block. Shift states start at zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rwkv_accel.model.rwkv7 import RWKV7


def add_time_states(model: RWKV7, blocks: Iterable[int], dtype: torch.dtype) -> None:
    """Give blocks a trained initial state: the one the base brought along, or zero, which changes nothing."""
    config = model.config
    for block in blocks:
        att = model.blocks[block].att
        zeros = torch.zeros(config.n_head, config.head_size, config.head_size)
        start = zeros if att.time_state is None else att.time_state.detach()
        att.register_parameter("time_state", nn.Parameter(start.to(dtype, copy=True)))


@torch.no_grad()
def start_from_prompt(model: RWKV7, prompt_ids: Sequence[int], blocks: Iterable[int]) -> None:
    """Set the initial state of blocks to what the model remembers after reading the prompt.

    Approximate as a prefix: the token shifts after the prompt are not part of an initial state.
    """
    ids_BT = torch.tensor([list(prompt_ids)], device=model.ln_out.weight.device)
    _, state = model(ids_BT, return_state=True)
    for block in blocks:
        time_state: Tensor = model.blocks[block].att.time_state
        time_state.copy_(state.wkv[block][0])
