"""torch.compile of the blocks, one graph each.

What is written by hand is no border in that graph. The elementwise ops are seen into, forward and backward, in their
torch form, and fused with what stands beside them. The recurrence and quantised weights are single nodes.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec

from torch import nn

from rwkv_accel.errors import UserError
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.ops.elementwise import AUTOGRAD_FUNCTIONS

COMPILERS = ("c++", "g++", "clang++")
RECOMPILES_PER_BLOCK = 32
"""Versions of a block's code, for its shapes and for training and validation, before the rest runs uncompiled."""


def check_compiler(backend: str, device_type: str, strategy: str) -> None:
    """Raises UserError where trainer.compile cannot do what it says."""
    if backend == "none":
        return
    if strategy in ("zero3", "zero3_offload"):
        raise UserError(
            f"trainer.compile does not go with {strategy}, which gathers the weights of each layer as it is called and "
            "so cuts each block into dozens of graphs; set trainer.compile=none, or use fsdp2, ddp, zero1 or zero2"
        )
    if backend != "inductor":
        return
    if not any(map(shutil.which, COMPILERS)):
        raise UserError(
            f"trainer.compile inductor needs a C++ compiler, and none of {', '.join(COMPILERS)} is here; install one, "
            "or set trainer.compile=none"
        )
    if device_type == "cuda" and find_spec("triton") is None:
        raise UserError("trainer.compile inductor needs the package triton on a GPU; install it, or set compile=none")


def compile_blocks(model: RWKV7, backend: str) -> None:
    """Compile every block in place, at its first call. Names, parameters and hooks stay as they are."""
    if backend == "none":
        return
    import torch._dynamo

    for function in AUTOGRAD_FUNCTIONS:
        torch.compiler.allow_in_graph(function)
    # The number of a block is a plain attribute: without this every block would be compiled anew for it.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    # How many chunks the documents of a packed row make is seen in the batch alone.
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES_PER_BLOCK)
    for block in model.blocks:
        assert isinstance(block, nn.Module)
        block.compile(backend=backend)
