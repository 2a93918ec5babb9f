"""WKV-7 on a GPU: accuracy first, then time against flash-linear-attention and against the floor by bytes.

The gate holds every dtype, near-identical keys included, to the fp64 recurrence; a kernel that fails it is not timed.
The other op reads the logarithm of the decay: while it is timed it is given that ready made; ours makes it itself.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from rwkv_accel.bench.harness import Options, ParityError, Row, device_wait, interleaved, peak_tensor_mib
from rwkv_accel.ops.wkv7 import wkv7

GATE_SHAPE = (2, 300, 2, 64)
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2.5e-3, torch.float32: 1e-5}
SHAPES = ((8, 4096, 64, 64), (1, 32768, 64, 64), (8, 4096, 32, 64))
COPY_BYTES = 2**31
LOWEST_W_LOG = -math.exp(-0.5)

Op = Callable[..., tuple[Tensor, Tensor]]


def ours(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    return wkv7(*tensors, backend="triton")


def log_decay_ready(tensors: Sequence[Tensor]) -> list[Tensor]:
    """r, w_log, k, v, a, b from what `wkv7` reads."""
    r, w_low, k, v, a, b, w0 = tensors
    return [r, LOWEST_W_LOG * torch.sigmoid(w_low + w0), k, v, a, b]


def with_log_decay(op: Op) -> Op:
    """An op that reads w_log, called as `wkv7` is."""
    return lambda *tensors: op(*log_decay_ready(tensors))


def load_fla() -> tuple[str, Op | None]:
    """(name, op) of flash-linear-attention's kernel, called as its own RWKV-7 layer calls it; None if absent.

    It takes (r, w_log, k, v, a, b).
    """
    if find_spec("fla") is None:
        return "flash-linear-attention is not installed", None
    from fla.ops.rwkv7 import chunk_rwkv7

    def op(r: Tensor, w_log: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        options = {"output_final_state": True, "safe_gate": True, "lower_bound": LOWEST_W_LOG, "chunk_size": 64}
        out, state = chunk_rwkv7(r, w_log, k, v, a, b, **options)
        return out, state.transpose(-1, -2)  # theirs is [key, value]

    return f"chunk_rwkv7 of flash-linear-attention {importlib.metadata.version('flash-linear-attention')}", op


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, hard: bool = False) -> list[Tensor]:
    """r, w_low, k, v, a, b, w0 as a model makes them; `hard`: near-identical keys, full rate, hardly any decay."""
    generator = torch.Generator(device).manual_seed(0)
    r, w_low, k, v, kappa, rate = (torch.randn(shape, generator=generator, device=device) for _ in range(6))
    rate = torch.sigmoid(rate)
    if hard:
        kappa, rate = kappa[:, :1] + 0.01 * kappa, 0.98 + 0.02 * rate
    kappa = torch.nn.functional.normalize(kappa, dim=-1)
    w0 = torch.randn(shape[2:], generator=generator, device=device) - 8 * hard
    narrow = [t.to(dtype) for t in (r / 2, w_low, k / 2, v / 2, -kappa, kappa * rate)]
    return [t.requires_grad_() for t in (*narrow, w0)]


def forward_backward(op: Op, tensors: list[Tensor], d_out: Tensor, d_state: Tensor | None = None) -> list[Tensor]:
    """Output, final state, a gradient per tensor."""
    out, state = op(*tensors)
    given = [(out, d_out.to(out.dtype))] + ([] if d_state is None else [(state, d_state.to(state.dtype))])
    grads = torch.autograd.grad([x for x, _ in given], tensors, [d for _, d in given])
    return [out.detach(), state.detach(), *grads]


def worst_error(op: Op, dtype: torch.dtype, device: str, *, hard: bool) -> float:
    """Largest relative error of a result (norm-wise) against the fp64 recurrence."""
    tensors = inputs(GATE_SHAPE, dtype, device, hard=hard)
    batch, _, heads, size = GATE_SHAPE
    generator = torch.Generator(device).manual_seed(1)
    d_out = torch.randn(GATE_SHAPE, generator=generator, device=device)
    d_state = torch.randn(batch, heads, size, size, generator=generator, device=device)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = forward_backward(partial(wkv7, backend="reference"), exact, d_out, d_state)
    found = forward_backward(op, tensors, d_out, d_state)
    return max(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, truth))


def measure(options: Options) -> Iterator[Row]:
    name, fla = load_fla()
    yield from _accuracy(name, fla, options)
    bandwidth = copy_bandwidth(options)
    yield Row("device copy, read and written", bandwidth / 1e12, "TB/s")
    per_token: dict[tuple[int, ...], float] = {}
    for shape in SHAPES:
        yield from _timed(shape, name, fla, bandwidth, options, per_token)
    batched, long = (per_token[shape] for shape in SHAPES[:2])
    yield Row("time per token of one long row", 1e9 * long, "ns", "the batch of eight", batched / long)


def _accuracy(name: str, fla: Op | None, options: Options) -> Iterator[Row]:
    theirs_alike = None if fla is None else with_log_decay(fla)
    for dtype, tolerance in TOLERANCES.items():
        for hard in (False, True):
            label = f"worst error, {str(dtype).removeprefix('torch.')}{', near-identical keys' * hard}"
            error = worst_error(ours, dtype, options.device, hard=hard)
            # Not `error > tolerance`: a NaN must not pass.
            if not error <= tolerance:
                raise ParityError(f"{label}: {error:.1e}, allowed {tolerance:.0e}")
            if theirs_alike is None:
                yield Row(label, error, "relative", note=f"no baseline: {name}")
            else:
                theirs = worst_error(theirs_alike, dtype, options.device, hard=hard)
                yield Row(label, error, "relative", name, theirs / error)


def copy_bandwidth(options: Options) -> float:
    """Bytes per second of a device-to-device copy, reads and writes counted."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    wait = device_wait(options.device)
    return 2 * COPY_BYTES / interleaved({"copy": lambda: target.copy_(source)}, options.repeats, wait)["copy"]


def _timed(
    shape: tuple[int, ...],
    name: str,
    fla: Op | None,
    bandwidth: float,
    options: Options,
    per_token: dict[tuple[int, ...], float],
) -> Iterator[Row]:
    tensors = inputs(shape, torch.bfloat16, options.device)
    ready = [t.detach().requires_grad_() for t in log_decay_ready(tensors)]
    d_out = torch.randn(shape, device=options.device, dtype=torch.bfloat16)
    ops: dict[str, tuple[Op, list[Tensor]]] = {"triton": (ours, tensors)}
    if fla is not None:
        ops[name] = (fla, ready)
    read, written = sum(t.nbytes for t in tensors), d_out.nbytes
    cases: dict[str, tuple[dict[str, Callable[[], object]], int]] = {
        "forward": (
            {key: partial(op, *(t.detach() for t in given)) for key, (op, given) in ops.items()},
            read + written,
        ),
        "forward + backward": (
            {key: partial(forward_backward, op, given, d_out) for key, (op, given) in ops.items()},
            3 * read + 2 * written,
        ),
    }
    label = "B={} T={} H={} N={}, bf16".format(*shape)
    for what, (candidates, least_bytes) in cases.items():
        seconds = interleaved(candidates, options.repeats, device_wait(options.device))
        floor = least_bytes / bandwidth
        per_token[shape] = seconds["triton"] / (shape[0] * shape[1])
        for key, value in seconds.items():
            note = f"{floor / value:.0%} of the floor by bytes, {1e3 * floor:.2f} ms"
            compared = key == "triton" and fla is not None
            ratio = seconds[name] / value if compared else None
            yield Row(f"{key} {what}, {label}", 1e3 * value, "ms", name if compared else "", ratio, note)
    for key, candidate in cases["forward + backward"][0].items():
        yield Row(f"{key} peak memory, {label}", peak_tensor_mib(candidate, options.device), "MiB")
