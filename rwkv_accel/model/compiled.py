"""torch.compile of the blocks, around the hand-written operators, which it leaves as they are."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

from torch import nn

from rwkv_accel.errors import UserError
from rwkv_accel.model.rwkv7 import RWKV7

COMPILERS = ("c++", "g++", "clang++")
# Custom forward and backward passes: fused already, and not for the compiler to look into.
HAND_WRITTEN = ("rwkv_accel.ops", "rwkv_accel.peft.quant")
RECOMPILES_PER_BLOCK = 32
"""Versions of a block's code, for its shapes and for training and validation, before the rest runs uncompiled."""


def check_compiler(backend: str, device_type: str, strategy: str) -> None:
    """Raises UserError where trainer.compile cannot do what it says."""
    if backend == "none":
        return
    if strategy in ("zero3", "zero3_offload", "fsdp2"):
        raise UserError(
            f"trainer.compile does not go with {strategy}, which gathers the weights of each layer as it is called; "
            "set trainer.compile=none, or use ddp, zero1 or zero2"
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
    from torch._dynamo import trace_rules

    for package in HAND_WRITTEN:
        trace_rules.add(package)
    # The number of a block is a plain attribute: without this every block would be compiled anew for it.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES_PER_BLOCK)
    for block in model.blocks:
        assert isinstance(block, nn.Module)
        block.compile(backend=backend)
