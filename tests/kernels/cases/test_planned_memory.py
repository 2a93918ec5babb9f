"""The planner's memory of a step on a GPU against what a step with the Triton kernels allocates."""

import pytest
import torch

from rwkv_accel.bench.harness import peak_tensor_mib
from rwkv_accel.config.schema import ModelConfig, PeftConfig
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.init import generate_init_weight
from rwkv_accel.model.precision import Precision
from rwkv_accel.ops.elementwise.backend import STANDS_FOR
from rwkv_accel.peft.apply import load_model_and_apply_peft
from rwkv_accel.plan.trace import Work, activations_of

# In fp32: a CPU's products of bf16 matrices take memory of their own.
FP32 = Precision.from_name("32-true")


@pytest.mark.parametrize(
    ("mode", "rows", "packed", "quant", "tolerance"),
    [
        ("none", 2, False, "none", 0.06),
        ("block", 1, True, "none", 0.06),
        ("selective", 1, False, "none", 0.06),
        # The weight of one layer while it is restored is a large part of so small a model.
        ("block", 1, False, "nf4", 0.12),
    ],
)
def test_peak_of_forward_and_backward(mode, rows, packed, quant, tolerance, device, monkeypatch, tmp_path):
    tokens, config, peft = 40, RWKV7Config.for_new_model(2, 128, 512, 64), PeftConfig(rank=8, base_quant=quant)
    counted = activations_of(config, peft, FP32, Work(rows, tokens, packed, mode, loss_chunk_rows=16))

    generate_init_weight(config, tmp_path / "base.pth", seed=0)
    base = ModelConfig(path=str(tmp_path / "base.pth"), wkv_backend="triton")
    model = load_model_and_apply_peft(base, peft, precision=FP32).to(device)
    model.gradient_checkpointing, model.loss_chunk_rows = mode, 16
    for param in model.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    monkeypatch.setitem(STANDS_FOR, "cpu", "cuda")
    ids = torch.ones(1 if packed else rows, tokens, dtype=torch.int64, device=device)
    targets = torch.arange(rows * tokens, device=device)
    borders = [0, tokens] if packed else None

    def step():
        model(ids, ids, target_rows=targets, cu_seqlens=borders).backward()

    step()
    measured = peak_tensor_mib(step, device.type) * 2**20
    if device.type == "cuda":
        tolerance = 0.2  # each of many small tensors is rounded up; other libraries restore weights
    assert max(counted.forward_peak, counted.backward_peak) == pytest.approx(measured, rel=tolerance)
