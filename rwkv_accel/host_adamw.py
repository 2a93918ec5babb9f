"""AdamW whose moments lie in the host's memory, with an fp32 copy of trained weights that are narrower.

An update brings them to the device a few million values at a time, computes there as `torch.optim.AdamW` does, and
takes them back. On a GPU copies run in both directions beside the computation, from and to pinned memory, and the host
never waits. Between updates the device holds nothing but the weights and their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

LOAD_VALUES = 1 << 22
"""Values that are on the device at a time, in each of the slots: 16 MiB for each of two moments and the copy."""
SLOTS = 2
"""While one load is computed on, the next arrives."""
SLAB_VALUES = 1 << 24
"""Values of one allocation: pinned memory is given out in powers of two."""


def device_bytes(num_trained: int) -> int:
    """Most memory that an update takes on the device."""
    gradients = 1  # of one load, made wide
    return 4 * (3 * SLOTS + gradients) * min(LOAD_VALUES, num_trained)


@dataclass(frozen=True)
class _Part:
    """Consecutive values of a parameter that are on the device together."""

    param: Tensor
    group: dict[str, Any]
    values: slice
    is_last: bool
    """The parameter has no values behind these."""

    def __len__(self) -> int:
        return self.values.stop - self.values.start

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1)[self.values]


class HostAdamW(Optimizer):
    """The update of `torch.optim.AdamW` with its state in the host's memory. For whole parameters, not sharded ones."""

    _step_supports_amp_scaling = True  # found_inf is looked at on the device, as by torch's fused optimizers

    def __init__(self, params: Any, *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.masters: dict[Tensor, Tensor] = {}
        """Parameter -> fp32 copy, for parameters in a narrower dtype that have been updated."""
        self._lanes: _Lanes | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        found_inf = getattr(self, "found_inf", None)
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not trained:
            return
        self.start({p: 0 for p in trained if p not in self.state})
        lanes = self._lanes_of(trained[0].device)
        buffers = [lanes.memory(min(LOAD_VALUES, sum(p.numel() for p in trained))) for _ in range(SLOTS)]
        lanes.begin()
        for number, load in enumerate(_loads(self.param_groups)):
            slot = number % SLOTS
            on_device = [_cut(buffer, load) for buffer in buffers[slot]]
            with lanes.bringing(slot):
                for part, *here in zip(load, *on_device):
                    for target, source in zip(here, self._host_tensors(part.param)):
                        target.copy_(part.of(source), non_blocking=True)
            lanes.arrived()
            self._update(load, on_device, found_inf)
            with lanes.taking(slot):
                for part, *here in zip(load, *on_device):
                    for source, target in zip(here, self._host_tensors(part.param)):
                        part.of(target).copy_(source, non_blocking=True)
            lanes.taken(slot)
        lanes.end()

    def start(self, steps: dict[Tensor, int]) -> None:
        """Make the state of parameters: moments of zero, as after this many updates."""
        for slab in _slabs(steps):
            count, device = sum(p.numel() for p in slab), slab[0].device
            narrow = any(p.dtype != torch.float32 for p in slab)
            flat = [_host_zeros(count, device) for _ in range(3 if narrow else 2)]
            offset = 0
            for p in slab:
                views = [x[offset : offset + p.numel()].view(p.shape) for x in flat]
                offset += p.numel()
                step = torch.tensor(float(steps[p]), device=device)
                self.state[p] = {"step": step, "exp_avg": views[0], "exp_avg_sq": views[1]}
                if p.dtype != torch.float32:
                    self.masters[p] = views[2].copy_(p.detach())

    def restart(self, steps: dict[Tensor, int]) -> None:
        """Forget all state; then `start`."""
        self.settle()
        self.state.clear()
        self.masters.clear()
        self.start(steps)

    def settle(self) -> None:
        """Wait until the host's memory holds what the last update computed."""
        if self._lanes is not None:
            self._lanes.wait()

    def _lanes_of(self, device: torch.device) -> _Lanes:
        if self._lanes is None:
            self._lanes = _CudaLanes(device) if device.type == "cuda" else _Lanes(device)
        return self._lanes

    def _host_tensors(self, p: Tensor) -> Iterator[Tensor]:
        """Both moments, and the copy of a narrow parameter."""
        yield self.state[p]["exp_avg"]
        yield self.state[p]["exp_avg_sq"]
        if p in self.masters:
            yield self.masters[p]

    def _update(self, load: list[_Part], on_device: list[list[Tensor]], found_inf: Tensor | None) -> None:
        moments, squares, copies = on_device
        group = load[0].group
        weights = [copy if part.param in self.masters else part.of(part.param) for part, copy in zip(load, copies)]
        grads = [part.param.grad.reshape(-1)[part.values].float() for part in load]
        # One count per parameter: its last values alone move it on.
        counts = [self.state[part.param]["step"] for part in load]
        steps = [count if part.is_last else count.clone() for part, count in zip(load, counts)]
        adamw(
            weights, grads, moments, squares, [], steps,
            fused=True, found_inf=found_inf, amsgrad=False, maximize=False,
            beta1=group["betas"][0], beta2=group["betas"][1],
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
        for part, weight in zip(load, weights):
            if part.param in self.masters:
                part.of(part.param).copy_(weight)


class _Lanes:
    """The ways between host and device. On a CPU there is one memory, and nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def memory(self, count: int) -> Tensor:
        return torch.empty(3, count, device=self.device)

    def begin(self) -> None:
        """Before an update: what is brought must have been taken, and its memory must be free."""

    def bringing(self, slot: int) -> Any:
        """Context of copies to the device, once the slot is free."""
        return nullcontext()

    def arrived(self) -> None:
        """Computation waits for what was brought."""

    def taking(self, slot: int) -> Any:
        """Context of copies to the host, once all is computed that was queued."""
        return nullcontext()

    def taken(self, slot: int) -> None:
        """The slot is free once the copies are done."""

    def end(self) -> None:
        """After an update: its memory is given to nobody before the copies are done."""

    def wait(self) -> None:
        """The host waits for all copies."""


class _CudaLanes(_Lanes):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._free: dict[int, torch.cuda.Event] = {}

    def begin(self) -> None:
        self._in.wait_stream(torch.cuda.current_stream(self.device))
        self._in.wait_stream(self._out)

    def bringing(self, slot: int) -> Any:
        if slot in self._free:
            self._in.wait_event(self._free[slot])
        return torch.cuda.stream(self._in)

    def arrived(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self._in)

    def taking(self, slot: int) -> Any:
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._out)

    def taken(self, slot: int) -> None:
        self._free[slot] = self._out.record_event()

    def end(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self._out)

    def wait(self) -> None:
        self._out.synchronize()


def _host_zeros(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, pin_memory=device.type == "cuda")


def _slabs(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one dtype whose state is allocated together."""
    slab: list[Tensor] = []
    for p in params:
        count = sum(q.numel() for q in slab)
        if slab and (count + p.numel() > SLAB_VALUES or p.dtype != slab[0].dtype):
            yield slab
            slab = []
        slab.append(p)
    if slab:
        yield slab


def _loads(groups: list[dict[str, Any]]) -> Iterator[list[_Part]]:
    """What has a gradient, cut into loads of one group."""
    for group in groups:
        load: list[_Part] = []
        room = LOAD_VALUES
        for p in group["params"]:
            start = 0 if p.grad is not None else p.numel()
            while start < p.numel():
                stop = min(start + room, p.numel())
                load.append(_Part(p, group, slice(start, stop), stop == p.numel()))
                room -= stop - start
                start = stop
                if room == 0:
                    yield load
                    load, room = [], LOAD_VALUES
        if load:
            yield load


def _cut(buffer: Tensor, load: list[_Part]) -> list[Tensor]:
    """The parts' places in a flat buffer."""
    return list(buffer[: sum(map(len, load))].split([len(part) for part in load]))
