"""Where the values of a trained parameter and of its optimizer moments lie, for each way to spread them.

A layout hides the strategy behind four verbs: gather values to the main process, reset the optimizer's
moments, write one value, and finish. The key of a value is None for the parameter itself (the optimizer's
master copy) or the name of a moment, such as `exp_avg`. All ranks call the same verbs in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwkv_accel.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

Entry = tuple[Tensor, str | None]
STEP_KEY = "step"


class Layout(ABC):
    """How one strategy keeps trained parameters and moments."""

    def __init__(self, accelerator: Accelerator, optimizer: Optimizer) -> None:
        self.accelerator = accelerator
        self.optimizer = optimizer
        """The torch (or DeepSpeed CPU) optimizer inside all wrappers: it owns the moments."""

    def shape(self, param: Tensor) -> torch.Size:
        """Full shape of the parameter."""
        return param.shape

    @abstractmethod
    def slot(self, param: Tensor) -> Tensor:
        """The tensor under which the optimizer keeps the moments of this parameter."""

    @abstractmethod
    def gather(self, entries: list[Entry]) -> Iterator[Tensor | None]:
        """Full values on the CPU of the main process in the order asked for; None elsewhere. Collective."""

    @abstractmethod
    def write(self, param: Tensor, key: str | None, value: Tensor) -> None:
        """Put this rank's part of a full CPU value in its place. Collective under no layout."""

    @abstractmethod
    def finish(self, params: list[Tensor], value_of: Callable[[Tensor], Tensor]) -> None:
        """After all writes: bring what the forward pass reads in line with the master copies. Collective."""

    def moment_keys(self, param: Tensor) -> list[str]:
        """Names of the moments that exist for this parameter: none before its first update."""
        slot = self.slot(param)
        keys = []
        for key, value in self._state(slot).items():
            if key == STEP_KEY or value is None:
                continue
            if not isinstance(value, Tensor) or value.shape != slot.shape:
                raise UserError(
                    f"{type(self.optimizer).__name__} keeps {key!r} in a form that checkpoints cannot carry; "
                    "use optim.optimizer adamw or sgd"
                )
            keys.append(key)
        return sorted(keys)

    def step(self, param: Tensor) -> int | None:
        """The optimizer's own count of updates of this parameter, where it keeps one."""
        step = self._state(self.slot(param)).get(STEP_KEY)
        return None if step is None else int(step)

    def reset_moments(self, keys: Mapping[Tensor, list[str]], steps: Mapping[Tensor, int]) -> None:
        """Forget all moments, then create zeroed ones under each slot that has keys, with the slot's step."""
        self.optimizer.state.clear()
        # Not the wrapper's own lazy start: it happens inside step(), which would move the parameters.
        for slot, names in keys.items():
            state: dict[str, Any] = {key: torch.zeros_like(slot) for key in names}
            if slot in steps:
                state[STEP_KEY] = self._new_step(slot, steps[slot])
            if state:
                self.optimizer.state[slot] = state

    def _new_step(self, slot: Tensor, step: int) -> Any:
        if type(self.optimizer).__name__ == "DeepSpeedCPUAdam":
            return step
        # One tensor per slot, never shared: the optimizer counts up in place.
        on_device = self.optimizer.defaults.get("fused") or self.optimizer.defaults.get("capturable")
        return torch.tensor(float(step), device=slot.device if on_device else "cpu")

    def _state(self, slot: Tensor) -> dict[str, Any]:
        return self.optimizer.state.get(slot, {})  # [slot] would create an entry


class Replicated(Layout):
    """Every rank has everything: one process, DDP, DeepSpeed without ZeRO."""

    def slot(self, param: Tensor) -> Tensor:
        return param

    def gather(self, entries: list[Entry]) -> Iterator[Tensor | None]:
        for param, key in entries:
            value = self._value(param, key).detach()
            yield value.to("cpu", copy=True) if self.accelerator.is_main_process else None

    def write(self, param: Tensor, key: str | None, value: Tensor) -> None:
        self._value(param, key).detach().copy_(value)

    def finish(self, params: list[Tensor], value_of: Callable[[Tensor], Tensor]) -> None:
        """Nothing to do: the forward pass reads the parameters that the optimizer updates."""

    def _value(self, param: Tensor, key: str | None) -> Tensor:
        return param if key is None else self.optimizer.state[param][key]


class OnHost(Replicated):
    """The same with moments, and fp32 copies of narrow parameters, in the host's memory (HostAdamW)."""

    def gather(self, entries: list[Entry]) -> Iterator[Tensor | None]:
        self.optimizer.settle()
        return super().gather(entries)

    def reset_moments(self, keys: Mapping[Tensor, list[str]], steps: Mapping[Tensor, int]) -> None:
        self.optimizer.restart({param: steps.get(param, 0) for param, names in keys.items() if names})

    def write(self, param: Tensor, key: str | None, value: Tensor) -> None:
        super().write(param, key, value)
        if key is None:
            param.detach().copy_(value)

    def _value(self, param: Tensor, key: str | None) -> Tensor:
        return self.optimizer.masters.get(param, param) if key is None else super()._value(param, key)


class FullySharded(Replicated):
    """FSDP2: parameters and moments are DTensors."""

    def gather(self, entries: list[Entry]) -> Iterator[Tensor | None]:
        from torch.distributed.tensor import DTensor

        for param, key in entries:
            value = self._value(param, key).detach()
            full = value.full_tensor() if isinstance(value, DTensor) else value
            yield full.to("cpu", copy=True) if self.accelerator.is_main_process else None

    def write(self, param: Tensor, key: str | None, value: Tensor) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        target = self._value(param, key).detach()
        if not isinstance(target, DTensor):
            target.copy_(value)
            return
        local = target.to_local()
        # src_data_rank None: each rank cuts its shard from its own copy of the file, nothing is sent.
        value = value.to(local.device)
        shard = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        local.copy_(shard.to_local())
