"""WKV-7 forward and backward on the shapes of the 0.1B model, and on packed documents.

The baseline is autograd of the token-by-token loop on inputs taken apart once; indexing `x[:, t]` in it would make it
quadratic in T and easy to beat.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from itertools import chain

import torch
from torch import Tensor

from rwkv_accel.bench.harness import (
    Options,
    Row,
    check_parity,
    device_wait,
    interleaved,
    peak_tensor_mib,
)
from rwkv_accel.bench.wkv7_gpu import log_decay_ready
from rwkv_accel.ops.wkv7 import available_backends, select_backend, wkv7

SHAPES = ((2, 512, 12, 64), (1, 4096, 12, 64))
DOCUMENTS = (700, 40, 1500, 300, 96, 1000, 460)
"""Lengths in the packed row: [1, 4096] tokens in all."""
TOLERANCE = 1e-4
BASELINE = "reference (autograd)"


def inputs(shape: tuple[int, ...], device: str) -> list[Tensor]:
    """r, w_low, k, v, a, b, w0 as a model makes them: unit kappa, decays over their whole range."""
    generator = torch.Generator().manual_seed(0)
    r, w_low, k, v, kappa, iclr = (torch.randn(shape, generator=generator) for _ in range(6))
    kappa = torch.nn.functional.normalize(kappa, dim=-1)
    tensors = [r, w_low, k, v, -kappa, kappa * torch.sigmoid(iclr), torch.zeros(shape[2:])]
    return [t.to(device).requires_grad_() for t in tensors]


def run(tensors: list[Tensor], backend: str, cu_seqlens: Tensor | None = None) -> list[Tensor]:
    """Output, final state and a gradient per tensor."""
    out, state = wkv7(*tensors, cu_seqlens=cu_seqlens, backend=backend)
    grads = torch.autograd.grad(out.square().sum() + state.square().sum(), tensors)
    return [out.detach(), state.detach(), *grads]


def measure(options: Options) -> Iterable[Row]:
    if options.device == "cuda":
        from rwkv_accel.bench import wkv7_gpu, wkv7_tune

        return chain(wkv7_tune.tune(options) if options.tune else (), wkv7_gpu.measure(options))
    rows = []
    for shape in SHAPES:
        found = _compare(inputs(shape, options.device), None, "B={} T={} H={} N={}".format(*shape), options)
        fastest, _ = select_backend("auto", options.device, shape[-1])
        ours = next(row.value for row in found if row.name.startswith(f"{fastest}, "))
        rows += [*found, _against_fla(shape, fastest, ours)]
    borders = torch.tensor([0, *DOCUMENTS]).cumsum(0)
    packed = inputs((1, sum(DOCUMENTS), *SHAPES[1][2:]), options.device)
    return rows + _compare(packed, borders, f"{len(DOCUMENTS)} packed documents, T={sum(DOCUMENTS)}", options)


def fla_naive(tensors: list[Tensor]) -> list[Tensor]:
    """`run` with flash-linear-attention's recurrence, the only form of theirs that runs on a CPU."""
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    # Theirs is [B,H,T,N], scales r by N^-0.5, takes the log decay last, and its state is [key, value].
    r, w_log, k, v, a, b = (x.transpose(1, 2) for x in log_decay_ready(tensors))
    out, state = dplr_recurrence(r * r.shape[-1] ** 0.5, k, v, a, b, w_log)
    out, state = out.transpose(1, 2), state.transpose(-1, -2)
    grads = torch.autograd.grad(out.square().sum() + state.square().sum(), tensors)
    return [out.detach(), state.detach(), *grads]


def _against_fla(shape: tuple[int, ...], backend: str, ours: float) -> Row:
    """Run once: it takes minutes for long rows. `ours`: milliseconds of our backend."""
    label = "{}, B={} T={} H={} N={}".format(backend, *shape)
    if find_spec("fla") is None:
        return Row(label, ours, "ms", note="baseline not measured: pip install flash-linear-attention")
    fla_naive(inputs((1, 2, 1, shape[-1]), "cpu"))  # its import is not part of the time
    tensors = inputs(shape, "cpu")
    start = time.perf_counter()
    found = fla_naive(tensors)
    seconds = time.perf_counter() - start
    check_parity(f"FLA's naive recurrence, {label}", found, run(tensors, backend), TOLERANCE)
    return Row(label, ours, "ms", "FLA's naive recurrence, once", 1e3 * seconds / ours)


def _compare(tensors: list[Tensor], cu_seqlens: Tensor | None, label: str, options: Options) -> list[Row]:
    candidates = {name: partial(run, tensors, name, cu_seqlens) for name in available_backends(tensors[0].device.type)}
    truth = candidates["reference"]()
    for name, candidate in candidates.items():
        check_parity(f"{name}, {label}", candidate(), truth, TOLERANCE)
    seconds = interleaved(candidates, options.repeats, device_wait(options.device))
    peaks = {name: peak_tensor_mib(candidate, options.device) for name, candidate in candidates.items()}
    rows = [_row(f"{name}, {label}", name, 1e3, seconds, "ms") for name in candidates]
    if "native" in candidates:
        ratio = seconds["chunked"] / seconds["native"]
        rows.append(Row(f"native, {label}", 1e3 * seconds["native"], "ms", "chunked", ratio))
    return [
        *rows,
        *(_row(f"{name} peak memory, {label}", name, 1.0, peaks, "MiB") for name in candidates),
    ]


def _row(label: str, name: str, scale: float, values: dict[str, float], unit: str) -> Row:
    if name == "reference":
        return Row(label, scale * values[name], unit)
    return Row(label, scale * values[name], unit, BASELINE, values["reference"] / values[name])
