"""Model FLOPs utilisation: the arithmetic that the updates need, against what the devices could do in that time.

Needed are the matrix products of the forward pass, of the gradients of inputs, and of the gradients of the weights
that are trained, and the WKV recurrence as written down token by token. What is done on top (recomputation, the
chunked form of the recurrence, dequantisation) does not count: it makes a run slower, not its model larger.

C channels, N head size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from rwkv_accel.model.rwkv7 import RWKV7

# Dense bf16 matrix products with fp32 sums, in 1e12 FLOPs per second, from the makers' data sheets.
PEAK_TFLOPS = (
    (r"H100 PCIe", 756.0),
    (r"H100 NVL", 835.0),
    (r"\b(H100|H200|H800)\b", 989.4),
    (r"\bH20\b", 148.0),
    (r"\bB200\b", 2250.0),
    (r"\b(A100|A800)\b", 312.0),
    (r"\bA10\b", 125.0),
    (r"\bL40S\b", 362.0),
    (r"\bL40\b", 181.0),
    (r"\bL4\b", 121.0),
    (r"RTX A6000", 154.8),
    (r"RTX 6000 Ada", 364.2),
    (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2),
    (r"RTX 3090(?! Ti)", 71.0),
    (r"\b(MI300X|MI325X)\b", 1307.4),
    (r"\bMI250X\b", 191.5),  # each of its two dies is a device
    (r"\bMI210\b", 181.0),
)


@dataclass(frozen=True)
class Compute:
    """What one token costs, and what the devices of the run offer."""

    token_flops: float
    """Per processed token."""
    target_flops: float
    """On top of it per target token: the head runs over targets only."""
    peak_flops: float
    """Per second, all devices together."""

    def utilisation(self, kt_s: float, target_kt_s: float) -> float:
        """Share of the peak at these speeds (thousands of tokens per second)."""
        return 1000 * (kt_s * self.token_flops + target_kt_s * self.target_flops) / self.peak_flops


def compute_of(model: RWKV7, device_name: str | None, num_devices: int) -> Compute | None:
    """None where the peak is not known: on a CPU (device_name None), and on devices that are not in the table."""
    peak = None if device_name is None else peak_tflops(device_name)
    if peak is None:
        return None
    return Compute(*flops_of(model), peak * 1e12 * num_devices)


def peak_tflops(device_name: str) -> float | None:
    """Of one device, by the name that its driver gives it."""
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, device_name)), None)


def flops_of(model: RWKV7) -> tuple[float, float]:
    """(per processed token, more per target token) of one update. The model is whole, not sharded yet."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if any(name.startswith("emb.") for name in trained):
        first = 0
    else:
        blocks = [int(name.split(".")[1]) for name in trained if name.startswith("blocks.")]
        first = min(blocks, default=model.config.n_layer)
    total = 0.0
    for layer, block in enumerate(model.blocks):
        total += _matrix_flops(block, needs_inputs=layer >= first)
        # S k̂, S * w, - S k̂ (k̂ a)ᵀ, + v kᵀ, S r: 9 N per channel, and twice that for its gradients.
        total += 9 * model.config.head_size * model.config.n_embd * (3 if layer >= first else 1)
    return total, _matrix_flops(model.head, needs_inputs=first < model.config.n_layer)


def _matrix_flops(module: nn.Module, needs_inputs: bool) -> float:
    """2 per weight for each of: the output, the gradient of the input, the gradient of the weight."""
    from rwkv_accel.peft.base import AdapterLinear, FrozenLinear

    per_weight = 4 if needs_inputs else 2
    total, counted = 0, set()
    for layer in module.modules():
        if not isinstance(layer, FrozenLinear):
            continue
        # By shape: a quantised weight is stored in fewer numbers than it has.
        total += per_weight * layer.in_features * layer.out_features
        counted |= {id(parameter) for parameter in layer.parameters(recurse=False)}
        if isinstance(layer, AdapterLinear):
            matrices = [getattr(layer, name) for name in layer.adapter_names]
            total += sum((per_weight + 2) * matrix.numel() for matrix in matrices if matrix.dim() > 1)
    for name, parameter in module.named_parameters():
        is_matrix = parameter.dim() == 2 and not name.endswith("r_k")
        if is_matrix and id(parameter) not in counted:
            total += (per_weight + 2 * parameter.requires_grad) * parameter.numel()
    return float(total)
