"""Timing that holds on a noisy machine: candidates take turns, and only ratios within one run are compared."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    repeats: int
    threads: int
    device: str
    tune: bool = False
    """Measure the sizes of the GPU kernels first, and keep them for training."""


@dataclass(frozen=True)
class Row:
    """One measured number."""

    name: str
    value: float
    unit: str
    baseline: str = ""
    """What the ratio compares with, measured in the same run."""
    ratio: float | None = None
    """How many times better than the baseline (faster, or less memory)."""
    note: str = ""


class ParityError(AssertionError):
    """Candidates disagree: a speed-up of something that computes something else is not reported."""


def check_parity(what: str, got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    """Raise ParityError unless each tensor is within `tolerance` of its twin, relative to the twin's norm."""
    assert len(got) == len(want)
    for index, (x, y) in enumerate(zip(got, want)):
        error = float((x.double() - y.double()).norm() / y.double().norm())
        # Not `error > tolerance`: a NaN must not pass.
        if not error <= tolerance:
            raise ParityError(f"{what}: result {index} is off by {error:.1e} (relative), allowed {tolerance:.0e}")


def interleaved(
    candidates: Mapping[str, Callable[[], object]], repeats: int, wait: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Median seconds of each candidate; they run in turn, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def device_wait(device: str) -> Callable[[], None]:
    """Waits for the device's queued work; nothing on a CPU."""
    if device == "cpu":
        return lambda: None
    import torch

    return torch.cuda.synchronize


def in_fresh_process(
    module: str, arguments: Mapping[str, object], variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run `python -m module JSON`, with added environment variables, and read the JSON of its last line.

    For peak memory, which only ever grows within a process, and for packages that read switches at import.
    """
    prefix = ["env", *(f"{key}={value}" for key, value in (variables or {}).items())]
    command = [*prefix, sys.executable, "-m", module, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {arguments}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_memory_mib() -> float:
    """Largest resident memory of this process so far. (getrusage would count what the parent had before exec.)"""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def peak_tensor_mib(run: Callable[[], object], device: str) -> float:
    """Most memory that the tensors of one run hold at once, counted by torch's allocator, without its inputs."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = run()
        del result
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**20


def hardware(options: Options) -> str:
    """One line about what the numbers were measured on."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}{gpu}, {options.threads} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
