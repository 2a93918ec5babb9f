"""The inputs of recomputed blocks wait for the backward pass in the host's memory.

Copies run beside the computation, on a stream of their own: to pinned memory as soon as a block has its input, and back
while the block behind is recomputed, so that two inputs at most are on the device for it.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Mover(Protocol):
    """Copies between a kind of device and the host that may still be under way when a call returns."""

    def out(self, x: Tensor) -> Any:
        """Begin to copy to the host; x is free for other use once its copy is done. Returns what `back` takes."""

    def back(self, host: Any) -> Tensor:
        """Begin to copy to the device. Nothing may read the result before `arrived`."""

    def arrived(self, x: Tensor) -> None:
        """Let what the device is given to do from now on wait for x."""


class _CudaMover:
    """Pinned memory, and one stream for both directions: they never run at the same time."""

    def out(self, x: Tensor) -> tuple[Tensor, torch.device]:
        stream = _side_stream(x.device)
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            host.copy_(x, non_blocking=True)
        # The allocator gives x's memory to nobody before the stream has read it.
        x.record_stream(stream)
        return host, x.device

    def back(self, host: tuple[Tensor, torch.device]) -> Tensor:
        kept, device = host
        with torch.cuda.stream(_side_stream(device)):
            return kept.to(device, non_blocking=True)

    def arrived(self, x: Tensor) -> None:
        current = torch.cuda.current_stream(x.device)
        current.wait_stream(_side_stream(x.device))
        x.record_stream(current)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


MOVERS: dict[str, Mover] = {"cuda": _CudaMover()}
"""Device type -> how its tensors reach the host. A CPU has none: there is no other memory to move to."""


def offload_remark(checkpointing: str, device_type: str) -> str | None:
    """What to tell a user whose recipe asks for what this device cannot give."""
    if checkpointing != "offload" or device_type in MOVERS:
        return None
    return (
        f"trainer.gradient_checkpointing offload gains nothing on {device_type} and does what block does: it moves "
        "inputs of blocks from a GPU's memory to the host's"
    )


class Offload:
    """The inputs of the blocks of one forward pass."""

    def __init__(self) -> None:
        self._newest: weakref.ref[_Kept] | None = None

    def instead_of(self, x: Tensor) -> AbstractContextManager[Any]:
        """Context in which autograd, asked to keep x, keeps a copy on the host. Other tensors stay as they are."""
        mover = MOVERS.get(x.device.type)
        if mover is None:
            return nullcontext()
        key = x.untyped_storage()._cdata

        def pack(tensor: Tensor) -> Tensor | _Kept:
            if tensor.untyped_storage()._cdata != key:
                return tensor
            kept = _Kept(mover, mover.out(tensor), self._newest)
            self._newest = weakref.ref(kept)
            return kept

        return saved_tensors_hooks(pack, lambda packed: packed.take() if isinstance(packed, _Kept) else packed)


class _Kept:
    """One tensor on the host. Taking it back begins to bring back the one that was kept before it."""

    def __init__(self, mover: Mover, host: Any, before: weakref.ref[_Kept] | None) -> None:
        self._mover, self._host = mover, host
        # Weak, because autograd alone decides how long a tensor is kept.
        self._before = before
        self._coming: Tensor | None = None

    def take(self) -> Tensor:
        self._begin()
        x, self._coming = self._coming, None
        assert x is not None
        # First: what is begun after it must not be waited for.
        self._mover.arrived(x)
        before = self._before() if self._before is not None else None
        if before is not None:
            before._begin()
        return x

    def _begin(self) -> None:
        if self._coming is None:
            self._coming = self._mover.back(self._host)
