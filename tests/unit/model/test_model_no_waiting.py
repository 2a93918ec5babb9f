"""A training step never waits for the device: it runs through on tensors without values, which nobody can look at."""

import pytest
import torch

from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.rwkv7 import RWKV7

CONFIG = RWKV7Config.for_new_model(2, 64, 50, 32)


def step(recompute, packed, with_rows):
    with torch.device("meta"):
        model = RWKV7(CONFIG, wkv_backend="chunked")
    model.gradient_checkpointing = recompute
    model.head.requires_grad_(False)
    ids_BT = torch.zeros(1 if packed else 2, 40, dtype=torch.int64, device="meta")
    rows = torch.zeros(30, dtype=torch.int64, device="meta") if with_rows else None
    loss = model(ids_BT, ids_BT.clone(), target_rows=rows, cu_seqlens=(0, 17, 40) if packed else None)
    loss.backward()
    return model


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_forward_and_backward_do_not_wait(packed, recompute):
    model = step(recompute, packed, with_rows=True)
    assert model.blocks[1].ffn.key.weight.grad.device.type == "meta"
    assert model.head.weight.grad is None


def test_looking_for_the_targets_would_wait():
    with pytest.raises(NotImplementedError, match="nonzero"):
        step("none", packed=False, with_rows=False)
