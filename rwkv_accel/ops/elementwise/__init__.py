"""The elementwise work around the matrix products of a block, each in one pass forward and one pass backward.

Every op is one autograd function over two implementations of the same signature: torch (any device) and Triton
kernels (NVIDIA and AMD). Kept for the backward pass are inputs alone; what is cheap is computed again there, and a
gradient that nobody asks for is not made.
"""

from rwkv_accel.ops.elementwise.backend import BACKENDS, select_backend
from rwkv_accel.ops.elementwise.head_gate import _HeadGate, head_gate
from rwkv_accel.ops.elementwise.relu_squared import _ReluSquared, relu_squared
from rwkv_accel.ops.elementwise.shift_lerp import _ShiftLerp, shift_lerp, start_table
from rwkv_accel.ops.elementwise.wkv_inputs import WKVInputs, _WKVInputs, wkv_inputs

__all__ = [
    "AUTOGRAD_FUNCTIONS",
    "BACKENDS",
    "WKVInputs",
    "head_gate",
    "relu_squared",
    "select_backend",
    "shift_lerp",
    "start_table",
    "wkv_inputs",
]

AUTOGRAD_FUNCTIONS = (_HeadGate, _ReluSquared, _ShiftLerp, _WKVInputs)
"""What torch.compile takes into its graphs as it is, backward pass included."""
