"""What a peft section means for a model of given sizes: which layers get adapters, which parameters train.

Pure: reads no weights, so a mistake is found before the first gigabyte is.
"""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_accel.config.schema import PeftConfig
from rwkv_accel.errors import UserError
from rwkv_accel.model.config import RWKV7Config, Shape, parameter_shapes
from rwkv_accel.peft.base import AdapterLinear, AdapterSpec
from rwkv_accel.peft.dora import DoraLinear
from rwkv_accel.peft.groups import MATRICES
from rwkv_accel.peft.linear import LoraLinear, PissaLinear
from rwkv_accel.peft.miss import MissLinear
from rwkv_accel.peft.quant import Quant
from rwkv_accel.peft.targets import check_layer_range, in_layers, matches, part_of, rank_for, select

METHODS: dict[str, type[AdapterLinear]] = {
    layer.method: layer for layer in (LoraLinear, DoraLinear, PissaLinear, MissLinear)
}
"""Adapter layer of every peft.method that has one."""


@dataclass(frozen=True)
class Plan:
    """What applying a peft section will do."""

    adapters: dict[str, AdapterSpec]
    """Module name -> numbers of its adapter."""
    layer: type[AdapterLinear] | None
    """Adapter layer of the method."""
    trained: frozenset[str]
    """Base parameters that train."""
    state_blocks: tuple[int, ...]
    """Blocks whose initial WKV state trains."""
    quantised: frozenset[str]
    """Modules whose weight is stored quantised."""
    quant: Quant | None
    """How they are stored."""


def make_plan(config: RWKV7Config, peft: PeftConfig) -> Plan:
    """The plan for a model.

    Raises:
        UserError: a target, part or pattern matches nothing (names the nearest), a rank does not fit a
            matrix, two settings claim the same weight, or nothing at all would train.
    """
    check_layer_range(peft.layer_range, config.n_layer)
    shapes = trainable_shapes(config)
    adapters = _adapters(linear_shapes(shapes), peft)
    quant = None if peft.base_quant == "none" else Quant(peft.base_quant, peft.double_quant)
    quantised = {name.removesuffix(".weight") for name in shapes if quant and name.endswith(MATRICES)}
    trained = _trained(shapes, peft)
    for name in sorted(trained):
        module = name.removesuffix(".weight")
        if module in adapters:
            raise UserError(f"{module} has an adapter (peft.targets) and is trained itself; choose one of the two")
        if module in quantised:
            raise UserError(
                f"{name} cannot train: peft.base_quant {peft.base_quant} stores it quantised; give it an adapter "
                "through peft.targets, or set peft.base_quant none"
            )
    states = tuple(
        block
        for block in range(config.n_layer)
        if peft.trains_state and in_layers(f"blocks.{block}.", peft.layer_range)
    )
    if not (adapters or trained or states):
        raise UserError("nothing is trained: peft.layer_range and the freeze keys exclude everything; widen them")
    return Plan(adapters, METHODS.get(peft.method), frozenset(trained), states, frozenset(quantised), quant)


def adapter_spec(peft: PeftConfig, module_name: str) -> AdapterSpec:
    """Numbers of the adapter on a module."""
    return AdapterSpec(
        rank=rank_for(module_name, peft.rank, peft.rank_pattern),
        alpha=peft.alpha,
        rslora=peft.rslora,
        dropout=peft.dropout,
        svd_niter=peft.svd_niter,
        variant=peft.miss_variant,
    )


def trainable_shapes(config: RWKV7Config) -> dict[str, Shape]:
    """Base parameters by name; without layer 0's value matrices, which the model never reads."""
    unused = {f"blocks.0.att.v{i}" for i in range(3)}
    return {name: shape for name, shape in parameter_shapes(config).items() if name not in unused}


def linear_shapes(shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Module name -> (out, in) of the linear layers."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name == "head.weight" or name.endswith(MATRICES)
    }


def _adapters(modules: dict[str, Shape], peft: PeftConfig) -> dict[str, AdapterSpec]:
    if not peft.has_adapter:
        return {}
    targets = select(peft.targets, modules, key="peft.targets", what="linear layer")
    # Checked against the targets: a pattern for a layer without adapter is a mistake.
    select(tuple(peft.rank_pattern), targets, key="peft.rank_pattern", what="adapter")
    adapters = {name: adapter_spec(peft, name) for name in targets if in_layers(name, peft.layer_range)}
    for name, spec in adapters.items():
        out_features, in_features = modules[name]
        METHODS[peft.method].check_spec(spec, in_features, out_features)
    return adapters


def _trained(shapes: dict[str, Shape], peft: PeftConfig) -> set[str]:
    """Base parameters that train: the whole base or the chosen parts, in the layer range, less the frozen
    ones.
    """
    chosen = {name for name in shapes if peft.method == "full" or part_of(name) in peft.train_parts}
    chosen |= set(select(peft.train_patterns, shapes, key="peft.train_patterns", what="parameter"))
    chosen = {name for name in chosen if in_layers(name, peft.layer_range)}
    select(peft.freeze_patterns, shapes, key="peft.freeze_patterns", what="parameter")
    return {
        name
        for name in chosen
        if part_of(name) not in peft.freeze_parts
        and not any(matches(pattern, name) for pattern in peft.freeze_patterns)
    }
