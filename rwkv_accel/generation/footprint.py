"""Memory that a generation will need, compared with what is free before any of it is taken.

The recurrent state does not grow with the prompt and activations are bounded by the passes of the prefill, so what
grows is rows (state, logits, probabilities) and the prompts themselves (text and token lists on the host).
"""

from __future__ import annotations

from pathlib import Path

import torch

from rwkv_accel.errors import UserError
from rwkv_accel.generation.prefill import PASS_TOKENS
from rwkv_accel.model.rwkv7 import RWKV7

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
BYTES_PER_PROMPT_TOKEN = 96
"""Two lists of Python integers (36 bytes each) and a tensor, with slack for the piece being read."""
VALUES_PER_ACTIVATION = 48
"""Channel-wide values of one token that live at once in a block's forward, the 4C of the feed-forward included."""
BYTES_PER_LOGIT = 32
"""Logits, their fp32 form, probabilities, and the fp64 sums that a draw searches."""


def state_bytes(model: RWKV7) -> int:
    """Recurrent state of one row."""
    config, item = model.config, model.compute_dtype.itemsize
    return config.n_layer * config.n_embd * (2 * item + config.head_size * max(item, 4))


def device_bytes(model: RWKV7, num_rows: int, num_tokens: int) -> int:
    """On the model's device: to read num_tokens of prompts and to decode num_rows at once."""
    config, item = model.config, model.compute_dtype.itemsize
    activations = min(num_tokens, PASS_TOKENS) * config.n_embd * VALUES_PER_ACTIVATION * max(item, 4)
    # Rows are joined and reordered by copies, and a pass keeps the states between its chunks.
    return activations + num_rows * (4 * state_bytes(model) + config.vocab_size * BYTES_PER_LOGIT)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device, a container's own limit included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    available = psutil.virtual_memory().available
    try:
        limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
        return min(available, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return available


def check_memory(model: RWKV7, *, num_rows: int, num_tokens: int) -> None:
    """Raises UserError unless prompts of num_tokens together fit beside num_rows rows in the free memory."""
    device = model.ln_out.weight.device
    needed = {device: device_bytes(model, num_rows, num_tokens)}
    host = torch.device("cpu")
    needed[host] = needed.get(host, 0) + num_tokens * BYTES_PER_PROMPT_TOKEN
    for where, size in needed.items():
        free = free_bytes(where)
        if size > free:
            raise UserError(
                f"{num_rows} replies at once to prompts of about {num_tokens:,} tokens need {size / GIB:.2f} GiB of "
                f"{where.type} memory, {max(free, 0) / GIB:.2f} GiB are free; shorten the prompt, or lower --batch-size"
            )
