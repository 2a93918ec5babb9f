"""WKV-7 on a GPU: accuracy first, then time against flash-linear-attention, the algorithm of RWKV's own CUDA kernel and
the floor by bytes.

The gate holds every dtype, near-identical keys included, to the fp64 recurrence. If bf16 fails, nothing is timed; if
another does, the case fails after the timing. The others read the logarithm of the decay or its whole logit: while they
are timed they are given that ready made; ours makes it itself.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from rwkv_accel.bench import wkv7_cuda
from rwkv_accel.bench.harness import Options, ParityError, Row, device_wait, interleaved, peak_tensor_mib
from rwkv_accel.ops.wkv7 import wkv7

logger = logging.getLogger(__name__)

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


def log_decay_alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same with w_log in the dtype of the others, as flash-linear-attention's own layer has it: half the bytes."""
    r, w_low, k, v, a, b, w0 = tensors
    return [r, LOWEST_W_LOG * torch.sigmoid(w_low + w0.to(w_low.dtype)), k, v, a, b]


def with_log_decay(op: Op) -> Op:
    """An op that reads w_log, called as `wkv7` is."""
    return lambda *tensors: op(*log_decay_alike(tensors))


def load_fla() -> tuple[str, Op | None]:
    """(name, op) of flash-linear-attention's kernel, called as its own RWKV-7 layer calls it; None if absent.

    It takes (r, w_log, k, v, a, b).
    """
    if find_spec("fla") is None:
        return "flash-linear-attention is not installed", None
    try:
        from fla.ops.rwkv7 import chunk_rwkv7
    except ImportError as error:
        return f"flash-linear-attention cannot be imported ({error})", None

    def op(r: Tensor, w_log: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        options = {"output_final_state": True, "safe_gate": True, "lower_bound": LOWEST_W_LOG, "chunk_size": 64}
        out, state = chunk_rwkv7(r, w_log, k, v, a, b, **options)
        return out, state.transpose(-1, -2)  # theirs is [key, value]

    return f"chunk_rwkv7 of flash-linear-attention {importlib.metadata.version('flash-linear-attention')}", op


@dataclass(frozen=True)
class Baseline:
    """An op of others, and how its inputs are made of those of `wkv7`, which is not timed."""

    name: str
    op: Op
    prepare: Callable[[Sequence[Tensor]], list[Tensor]]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)

    def on_inputs_of_wkv7(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return self.op(*self.prepare(tensors))

    def error(self, dtype: torch.dtype, device: str, *, hard: bool) -> float | None:
        """Its worst error; None where it does not run."""
        try:
            return worst_error(self.on_inputs_of_wkv7, dtype, device, hard=hard)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001
            logger.warning("%s in %s: %s", self.name, dtype, error)
            return None


def logit_ready(tensors: Sequence[Tensor]) -> list[Tensor]:
    """r, w_logit, k, v, a, b from what `wkv7` reads, the logit rounded as a whole."""
    r, w_low, k, v, a, b, w0 = tensors
    return [r, (w_low + w0).to(w_low.dtype), k, v, a, b]


OFFICIAL = Baseline(wkv7_cuda.NAME, wkv7_cuda.wkv7_cuda, logit_ready, (torch.bfloat16,))


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


def baselines() -> Iterator[Baseline]:
    """Those that can be had here."""
    name, fla = load_fla()
    if fla is not None:
        yield Baseline(name, fla, log_decay_alike)
    if torch.version.hip is None:
        yield OFFICIAL


def measure(options: Options) -> Iterator[Row]:
    others = list(baselines())
    for baseline in list(others):
        try:
            worst_error(baseline.on_inputs_of_wkv7, torch.bfloat16, options.device, hard=False)
        except torch.AcceleratorError:
            raise  # nothing runs on the device after it
        except Exception as error:  # noqa: BLE001  (another's failure: ours is measured without it)
            logger.warning("no baseline %s: %s: %s", baseline.name, type(error).__name__, error)
            others.remove(baseline)
    failures: list[str] = []
    yield from _accuracy(others, options, failures)
    bandwidth = copy_bandwidth(options)
    yield Row("device copy, read and written", bandwidth / 1e12, "TB/s")
    per_token: dict[tuple[int, ...], float] = {}
    for shape in SHAPES:
        yield from _timed(shape, others, bandwidth, options, per_token)
    batched, long = (per_token[shape] for shape in SHAPES[:2])
    yield Row("time per token of one long row", 1e9 * long, "ns", "the batch of eight", batched / long)
    if failures:
        raise ParityError(failures[0])


def _accuracy(others: list[Baseline], options: Options, failures: list[str]) -> Iterator[Row]:
    """Raises ParityError for what is timed, bf16, before it is; what else is off goes to the failures."""
    for dtype, tolerance in TOLERANCES.items():
        for hard in (False, True):
            label = f"worst error, {str(dtype).removeprefix('torch.')}{', near-identical keys' * hard}"
            error = worst_error(ours, dtype, options.device, hard=hard)
            # Not `error > tolerance`: a NaN must not pass.
            if not error <= tolerance:
                failures.append(f"{label}: {error:.1e}, allowed {tolerance:.0e}")
            if failures and dtype == torch.bfloat16:
                raise ParityError(failures[0])
            if not math.isfinite(error):
                continue  # JSON has no such number
            theirs = {b.name: b.error(dtype, options.device, hard=hard) for b in others if dtype in b.dtypes}
            yield from _against(label, error, "relative", theirs)


def _against(label: str, value: float, unit: str, theirs: Mapping[str, float | None], note: str = "") -> Iterator[Row]:
    """A row for each baseline, or one alone."""
    known = {name: other for name, other in theirs.items() if other is not None and math.isfinite(other)}
    for name, other in known.items():
        yield Row(label, value, unit, name, other / value, note)
    if not known:
        yield Row(label, value, unit, note=note or "no baseline")


def copy_bandwidth(options: Options) -> float:
    """Bytes per second of a device-to-device copy, reads and writes counted."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    wait = device_wait(options.device)
    return 2 * COPY_BYTES / interleaved({"copy": lambda: target.copy_(source)}, options.repeats, wait)["copy"]


def _timed(
    shape: tuple[int, ...],
    others: list[Baseline],
    bandwidth: float,
    options: Options,
    per_token: dict[tuple[int, ...], float],
) -> Iterator[Row]:
    tensors = inputs(shape, torch.bfloat16, options.device)
    d_out = torch.randn(shape, device=options.device, dtype=torch.bfloat16)
    ops: dict[str, tuple[Op, list[Tensor]]] = {"triton": (ours, tensors)}
    for baseline in others:
        ready = [t.detach().requires_grad_() for t in baseline.prepare(tensors)]
        ops[baseline.name] = (baseline.op, ready)
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
        our_ms, *their_ms = (1e3 * value for value in seconds.values())
        per_token[shape] = our_ms / 1e3 / (shape[0] * shape[1])
        note = f"{1e3 * floor / our_ms:.0%} of the floor by bytes, {1e3 * floor:.2f} ms"
        theirs = dict(zip(list(seconds)[1:], their_ms, strict=True))
        yield from _against(f"triton {what}, {label}", our_ms, "ms", theirs, note)
        for name, value in theirs.items():
            yield Row(f"{name} {what}, {label}", value, "ms")
    for key, candidate in cases["forward + backward"][0].items():
        yield Row(f"{key} peak memory, {label}", peak_tensor_mib(candidate, options.device), "MiB")
