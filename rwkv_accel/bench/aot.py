"""Every Triton kernel as it is launched, compiled ahead of time for GPUs that are not here, and what it costs there.

A call on tensors without data (device meta) hands over its launches instead of running them; each is compiled for a
named target, and registers, spills, shared memory and instructions are read from the result.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rwkv_accel.ops.elementwise import head_gate, relu_squared, shift_lerp, wkv_inputs
from rwkv_accel.ops.wkv7 import triton_op
from rwkv_accel.ops.wkv7.pieces import WANTED_PROGRAMS, build_pieces
from rwkv_accel.ops.wkv7.step import StepInputs, StepWeights
from rwkv_accel.ops.wkv7.triton_config import (
    DTYPES,
    HEAD_SIZES,
    Config,
    default_config,
    entry_name,
    precision,
)
from rwkv_accel.ops.wkv7.triton_step import step_triton

TARGETS = {
    "sm_80": ("cuda", 80, "cuda"),
    "sm_90": ("cuda", 90, "sm_90"),
    "sm_120": ("cuda", 120, "cuda"),
    "gfx942": ("hip", "gfx942", "hip"),
}
"""Name -> Triton's backend and architecture, family in the table of sizes."""
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_120": 101_376, "gfx942": 65_536}
"""Most bytes of shared memory of one block."""


@dataclass(frozen=True)
class Kernel:
    """One launch of a call: a kernel with the types and constants it is specialised for."""

    name: str
    target: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """What the compiler made of a kernel."""

    registers: int
    spilled: int
    """NVIDIA: loads and stores of the stack; AMD: spilled registers."""
    shared_bytes: int
    instructions: int


def shipped(
    targets: tuple[str, ...] = tuple(TARGETS),
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    head_sizes: tuple[int, ...] = HEAD_SIZES,
) -> Iterator[Kernel]:
    """All kernels of the table's configurations, and the elementwise ones that go with them."""
    for target in targets:
        _, _, family = TARGETS[target]
        for dtype in dtypes:
            for size in head_sizes:
                yield from wkv7_kernels(target, dtype, size, default_config(family, dtype, size))
                yield from elementwise_kernels(target, dtype, size)


@contextmanager
def captured(target: str, label: str) -> Iterator[dict[str, Kernel]]:
    """Fills the dictionary with the launches of the calls within, by name, instead of running them."""
    from triton.runtime.jit import JITFunction

    found: dict[str, Kernel] = {}

    def record(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(function.arg_names, args)) | kwargs
        named = {name: given.pop(name) for name in function.arg_names}
        fixed = {p.name for p in function.params if p.is_constexpr}
        constants = {name: value for name, value in named.items() if name in fixed or value is None}
        signature = {name: "constexpr" if name in constants else _type_of(value) for name, value in named.items()}
        name = "/".join([function.fn.__name__, *_variant(constants), label])
        found.setdefault(name, Kernel(name, target, function, signature, constants, given))

    plain = JITFunction.run
    JITFunction.run = record
    try:
        yield found
    finally:
        JITFunction.run = plain


def wkv7_kernels(target: str, dtype: torch.dtype, size: int, config: Config) -> list[Kernel]:
    """Training from no state; inference; training, but for w0, a sequence cut into pieces; a token of generation."""
    heads, num_tokens = 2, 64 * config.chunk_size
    x = torch.empty(1, num_tokens, heads, size, dtype=dtype, device="meta")
    inputs = (*[x] * 6, x.new_empty(heads, size, dtype=torch.float32))
    state = x.new_empty(1, heads, size, size, dtype=torch.float32)
    numbers = precision(TARGETS[target][2], dtype, size)
    with captured(target, entry_name(dtype, size)) as found:
        for programs, start, kept in ((WANTED_PROGRAMS, None, True), (WANTED_PROGRAMS, state, False), (8, state, True)):
            pieces = build_pieces(1, num_tokens, None, config.chunk_size, programs, torch.device("meta"))
            setup = triton_op.Setup(config, numbers, pieces)
            out, final, extra = triton_op.run_forward(inputs, start, setup, kept)
            if kept:
                triton_op.run_backward(inputs, out, None if start is None else final, extra, setup, start is None)
        token, channels = x.new_empty(3, heads * size), state.new_empty(heads * size)
        step_triton(StepInputs(*[token] * 6), StepWeights(*[channels] * 5), state.new_empty(3, heads, size, size), 1e-5)
    return list(found.values())


def elementwise_kernels(target: str, dtype: torch.dtype, size: int) -> list[Kernel]:
    """Training of a block with all its vectors: forward and backward of the ops around the recurrence."""
    channels = 2 * size

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    h, vector = tensor(1, 32, channels), tensor(channels)
    with captured(target, entry_name(dtype, size)) as found:
        x = wkv_inputs(h, h, h, (h, h), (vector,) * 4, head_size=size, backend="triton")
        gated = head_gate(h, h, h, h, h, vector, vector, vector, head_size=size, eps=1e-5, backend="triton")
        outs = [*(out for out in x if out.requires_grad), gated]
        if size == HEAD_SIZES[0]:  # they know nothing of heads
            outs += [shift_lerp(h, tensor(6, channels), backend="triton"), relu_squared(h, backend="triton")]
        torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])
    return list(found.values())


def _variant(constants: dict[str, Any]) -> list[str]:
    """What tells the launches of one kernel within a call apart."""
    absent = {name for name, value in constants.items() if value is None}
    if constants.get("TRANSITION"):
        return ["transition"]
    from_zeros = ["from zeros"] * ("start_p" in absent or ("d_end_p" in absent and "dz_p" not in absent))
    without = {"u_p": "inference", "dz_p": "state only", "d_w0_p": "w0 frozen"}
    quiet = [label for name, label in without.items() if name in absent]
    return ["backward"] * bool(constants.get("BACKWARD")) + from_zeros + quiet


def _type_of(value: Any) -> str:
    if isinstance(value, int | float):
        return "i32" if isinstance(value, int) else "fp32"
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}
    return "*" + names[value.dtype]


def compile_kernel(kernel: Kernel) -> Cost:
    """Compile for the kernel's target. Raises what Triton raises if it cannot."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, _ = TARGETS[kernel.target]
    pointers = [i for i, kind in enumerate(kernel.signature.values()) if kind.startswith("*")]
    source = ASTSource(
        fn=kernel.function,
        signature=kernel.signature,
        constexprs=kernel.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    compiled = triton.compile(source, target=target, options=kernel.options)
    if backend == "hip":
        return _amd_cost(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _nvidia_cost(compiled.asm["cubin"], compiled.metadata.shared)


def _nvidia_cost(cubin: bytes, shared: int) -> Cost:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        read = [
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        ]
    registers = re.search(r"REG:(\d+)", read[0])
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", read[1], re.MULTILINE)
    assert registers is not None
    spilled = sum(name in ("LDL", "STL") for name in instructions)
    return Cost(int(registers[1]), spilled, shared, len(instructions))


def _amd_cost(assembly: str, shared: int) -> Cost:
    def field(name: str) -> int:
        found = re.search(rf"^\s+\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        assert found is not None, name
        return int(found[1])

    instructions = re.findall(r"^\t[a-z]\w+", assembly.split("s_endpgm")[0], re.MULTILINE)
    spilled = field("vgpr_spill_count") + field("sgpr_spill_count")
    return Cost(field("vgpr_count"), spilled, shared, len(instructions))
