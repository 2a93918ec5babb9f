"""The layer benchmark runs every layer; what it shall show about cost is asserted on operations, not on seconds."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_accel.bench.peft import layer_rows
from rwkv_accel.peft.base import AdapterSpec
from rwkv_accel.peft.plan import METHODS
from rwkv_accel.peft.quant import Quant


def test_rows_name_every_layer_and_compare_with_the_plain_one():
    rows = layer_rows(channels=64, rank=4, tokens=3, rounds=1)
    names = [row["name"] for row in rows]
    assert {f"{method}, {base}" for method in METHODS for base in ("fp32", "nf4", "int8")} <= set(names)
    assert {f"{method}, fp32, HF peft" for method in ("lora", "dora", "miss")} <= set(names)
    assert next(row["ratio"] for row in rows if row["name"] == "nn.Linear, frozen") == 1
    assert all(row["ms"] > 0 for row in rows)


class Products(TorchDispatchMode):
    """Shapes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("quant", [None, Quant("nf4"), Quant("int8")])
@pytest.mark.parametrize("method", ["lora", "pissa", "miss"])
def test_no_gradient_of_the_frozen_weight_is_computed(method, quant):
    channels_in, channels_out = 48, 80
    layer = METHODS[method](channels_in, channels_out, AdapterSpec(4), quant)
    layer.set_up(torch.randn(channels_out, channels_in), torch.float32, torch.float32, 0, "x")
    out = layer(torch.randn(5, channels_in, requires_grad=True))
    with Products() as products:
        out.sum().backward()
    assert (channels_out, channels_in) not in products.shapes
    assert (channels_in, channels_out) not in products.shapes
    assert (5, channels_in) in products.shapes
