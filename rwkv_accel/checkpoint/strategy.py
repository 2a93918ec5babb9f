"""Trained parameters and optimizer moments by name: out of any strategy, into any strategy.

Frozen weights never appear here. A parameter counts as trained when it requires a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rwkv_accel.checkpoint.format import TensorFile
from rwkv_accel.checkpoint.layouts import Entry, FullySharded, Layout, OnHost, Replicated
from rwkv_accel.errors import UserError
from rwkv_accel.host_adamw import HostAdamW
from rwkv_accel.runtime import unwrap

if TYPE_CHECKING:
    from accelerate import Accelerator

# Other implementations of the same update, with the same moments.
SAME_OPTIMIZER = {"DeepSpeedCPUAdam": "AdamW", "FusedAdam": "AdamW", "HostAdamW": "AdamW"}
MAX_NAMES_SHOWN = 4


@dataclass
class TrainedTensors:
    """Everything trained, on the CPU. Tensors are present on the main process only."""

    optimizer: str
    """Kind of optimizer, the same for all implementations of one update."""
    params: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    """`<moment>/<parameter>`; nothing for a parameter that was never updated."""
    steps: dict[str, int] = field(default_factory=dict)
    """The optimizer's count of updates, for optimizers that keep one."""


def gather_trained(accelerator: Accelerator, model: Any, optimizer: Any) -> TrainedTensors:
    """Collect trained parameters and moments on the main process. Collective."""
    layout = layout_of(accelerator, model, optimizer)
    named = trained_parameters(accelerator, model)
    trained = TrainedTensors(_kind(layout))
    entries: list[Entry] = [(param, None) for param in named.values()]
    places = [(trained.params, name) for name in named]
    for name, param in named.items():
        for key in layout.moment_keys(param):
            entries.append((param, key))
            places.append((trained.moments, f"{key}/{name}"))
        step = layout.step(param)
        if step is not None:
            trained.steps[name] = step
    for (target, key), value in zip(places, layout.gather(entries)):
        if value is not None:
            target[key] = value
    return trained


def scatter_trained(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    *,
    kind: str,
    params: TensorFile,
    moments: Mapping[str, Tensor],
    steps: Mapping[str, int],
) -> None:
    """Put saved values into a prepared model and optimizer, whatever strategy wrote them. Collective.

    Args:
        kind: the optimizer that they come from.
        params: full values by name. All ranks give the same.
        moments: as TrainedTensors.moments.

    Raises:
        UserError: parameters are missing, unknown or of another shape, or the optimizer is another one.
    """
    layout = layout_of(accelerator, model, optimizer)
    named = trained_parameters(accelerator, model)
    _check_names(set(params), set(named))
    _check_shapes(layout, named, params)
    if kind != _kind(layout):
        raise UserError(f"the checkpoint holds moments of {kind}, this run uses {_kind(layout)}; set optim.optimizer")

    keys_of: dict[str, list[str]] = {name: [] for name in named}
    for key in moments:
        moment, _, name = key.partition("/")
        if name not in keys_of:
            raise UserError(f"the checkpoint holds a moment of {name!r}, which is not among its parameters")
        keys_of[name].append(moment)
    keys: dict[Tensor, list[str]] = {}
    slot_steps: dict[Tensor, int] = {}
    for name, param in named.items():
        slot = layout.slot(param)
        # Parameters may share a slot: it gets every moment that any of them has, and the largest step.
        keys[slot] = sorted({*keys.get(slot, []), *keys_of[name]})
        if name in steps:
            slot_steps[slot] = max(steps[name], slot_steps.get(slot, 0))
    layout.reset_moments(keys, slot_steps)
    for name, param in named.items():
        layout.write(param, None, params[name])
        for key in keys_of[name]:
            layout.write(param, key, moments[f"{key}/{name}"])
    name_of = {param: name for name, param in named.items()}
    layout.finish(list(name_of), lambda param: params[name_of[param]])


def trained_parameters(accelerator: Accelerator, model: Any) -> dict[str, Tensor]:
    """Trained parameters by their official names, in the model's order."""
    plain = unwrap(model)
    return {name: param for name, param in plain.named_parameters() if param.requires_grad}


def layout_of(accelerator: Accelerator, model: Any, optimizer: Any) -> Layout:
    """The layout of a model and optimizer that went through accelerator.prepare together.

    Raises:
        UserError: a strategy that checkpoints do not cover.
    """
    from accelerate.utils import DistributedType

    wrapped = optimizer.optimizer
    if accelerator.distributed_type == DistributedType.DEEPSPEED and model.zero_optimization_stage() > 0:
        from rwkv_accel.checkpoint.zero import Zero3, Zero12

        return (Zero3 if model.zero_optimization_stage() == 3 else Zero12)(accelerator, wrapped)
    if accelerator.distributed_type == DistributedType.FSDP:
        if accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise UserError("checkpoints cover FSDP2 only; set fsdp_version: 2 in the Accelerate config")
        return FullySharded(accelerator, wrapped)
    return (OnHost if isinstance(wrapped, HostAdamW) else Replicated)(accelerator, wrapped)


def _kind(layout: Layout) -> str:
    name = type(layout.optimizer).__name__
    return SAME_OPTIMIZER.get(name, name)


def _check_names(saved: set[str], wanted: set[str]) -> None:
    problems = []
    if wanted - saved:
        problems.append(f"lacks {_some(wanted - saved)}")
    if saved - wanted:
        problems.append(f"holds {_some(saved - wanted)}, which this model does not train")
    if problems:
        raise UserError(
            f"the checkpoint does not fit the model: it {' and '.join(problems)}; continue with the peft "
            "section of the run that wrote it"
        )


def _check_shapes(layout: Layout, named: Mapping[str, Tensor], params: TensorFile) -> None:
    wrong = [
        f"{name} is {list(params.shape(name))} there and {list(layout.shape(param))} here"
        for name, param in named.items()
        if params.shape(name) != layout.shape(param)
    ]
    if wrong:
        more = f" and {len(wrong) - MAX_NAMES_SHOWN} more" if len(wrong) > MAX_NAMES_SHOWN else ""
        raise UserError(
            f"the checkpoint does not fit the model: {', '.join(wrong[:MAX_NAMES_SHOWN])}{more}; continue "
            "with the model and peft sections of the run that wrote it"
        )


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:MAX_NAMES_SHOWN])
    return f"{shown} and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else shown
