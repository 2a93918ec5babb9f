"""The base streams from its file: no more than two of its tensors are at full width at any moment."""

import weakref
from collections.abc import Mapping

import pytest
import torch

from rwkv_accel.config.schema import PeftConfig
from rwkv_accel.model.config import RWKV7Config, parameter_shapes
from rwkv_accel.model.io import build_model
from rwkv_accel.model.precision import Precision
from rwkv_accel.peft.apply import Applier
from rwkv_accel.peft.plan import make_plan

CONFIG = RWKV7Config.for_new_model(3, 64, 97, 32)
PRECISION = Precision.from_name("bf16-true")


class Counting(Mapping):
    """Random fp32 tensors made on demand; remembers how many large ones were alive at once."""

    def __init__(self):
        self.shapes, self.alive, self.most = parameter_shapes(CONFIG), weakref.WeakSet(), 0

    def __getitem__(self, name):
        tensor = torch.randn(self.shapes[name])
        if name.startswith("blocks") and tensor.numel() >= 64 * 64:
            self.alive.add(tensor.untyped_storage())
            self.most = max(self.most, len(self.alive))
        return tensor

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "miss"])
@pytest.mark.parametrize("base_quant", ["nf4", "int8"])
def test_full_width_weights_are_dropped_one_by_one(method, base_quant):
    peft = PeftConfig(method=method, rank=4, base_quant=base_quant, targets=("att.key", "ffn.value"))
    tensors = Counting()
    model = build_model(CONFIG, tensors, PRECISION, transform=Applier(make_plan(CONFIG, peft), PRECISION, 0, {}))
    assert tensors.most <= 2
    assert {param.dtype for name, param in model.named_parameters() if name.endswith("weight_codes")} <= {
        torch.uint8,
        torch.int8,
    }


def test_memory_beside_a_weight_is_a_fraction_of_it():
    """Quantising needs room for the result and a chunk, not for another copy in fp32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from rwkv_accel.peft.quant import quantize_int8, quantize_nf4

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.seen = max(Largest.seen, out.numel() * out.element_size())
            return out

    weight = torch.randn(4096, 2048, dtype=torch.bfloat16)
    for quantize, result_bytes in ((quantize_nf4, weight.numel() // 2), (quantize_int8, weight.numel())):
        Largest.seen = 0
        flat = weight.numel() * 2
        with Largest():
            quantize(weight)
        # Views of the weight itself are counted with its own size.
        assert Largest.seen <= max(flat, result_bytes)
