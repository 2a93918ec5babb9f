"""From a recipe's model and peft sections to a model that is ready to train.

The base streams from its file one tensor at a time; each is quantised, decomposed or wrapped as it passes,
so the whole model is never in memory at full width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_accel.config.schema import ModelConfig, PeftConfig
from rwkv_accel.errors import UserError
from rwkv_accel.model.io import checkpoint_digest, load_model, read_checkpoint
from rwkv_accel.model.precision import Precision
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.peft.adapter_file import (
    TRAINING_ONLY,
    AdapterMeta,
    check_base,
    check_names,
    peft_section,
    read_adapter,
)
from rwkv_accel.peft.base import AdapterLinear, FrozenLinear, frozen_linear
from rwkv_accel.peft.foreign import FOREIGN, FOREIGN_IDENTITY, read_any_adapter
from rwkv_accel.peft.groups import DECAYED, GROUPS, group_of
from rwkv_accel.peft.plan import Plan, make_plan
from rwkv_accel.peft.state_tuning import add_time_states, start_from_prompt
from rwkv_accel.peft.targets import part_of

FP32 = Precision.from_name("32-true")


def load_model_and_apply_peft(
    model_config: ModelConfig,
    peft_config: PeftConfig,
    *,
    precision: Precision = FP32,
    seed: int = 0,
    frozen_tensors: Mapping[str, Tensor] | None = None,
    encode: Callable[[str], list[int]] | None = None,
) -> RWKV7:
    """The base model with the recipe's adapters, on the CPU; exactly what the recipe trains has
    requires_grad.

    Trained parameters are `precision.trainable`, all others `precision.frozen` or quantised. Every process
    gets the same start values, from the seed and the parameters' names. `frozen_tensors` are those of a
    checkpoint that the run will resume from (see `adapter_buffers`): PiSSA takes its A0, B0 from there and
    does no SVD. With `peft_config.load_path` that adapter is loaded. `encode` (text -> token ids) is needed
    for `peft_config.state_prompt`. Not collective.

    Raises:
        UserError: the base cannot be loaded, a target matches nothing, a rank is too large, or the adapter
            does not belong to this base or this peft section.
    """
    if model_config.path is None:
        raise ValueError("model.init has to be written to a file first (generate_init_weight); set model.path to it")
    path, loaded = Path(model_config.path), None
    plan = make_plan(read_checkpoint(path).config, peft_config)
    if peft_config.load_path is not None:
        meta, loaded = read_any_adapter(peft_config.load_path, method=peft_config.method, alpha=peft_config.alpha)
        check_same_peft(meta, peft_config)
        if meta.base_digest:
            check_base(meta, checkpoint_digest(path), peft_config.load_path, path)
        frozen_tensors = frozen_tensors or loaded
    apply = Applier(plan, precision, seed, frozen_tensors or {})
    model = load_model(
        path, precision, wkv_backend=model_config.wkv_backend, transform=apply, what=_work(path, plan, peft_config)
    )
    add_time_states(model, plan.state_blocks, precision.trainable)
    if peft_config.state_prompt is not None and loaded is None:
        if encode is None:
            raise ValueError("peft.state_prompt needs the tokenizer's encode function")
        start_from_prompt(model, encode(peft_config.state_prompt), plan.state_blocks)
    for name, param in model.named_parameters():
        param.requires_grad_(name in plan.trained)
    for name in adapter_names(model):
        model.get_parameter(name).requires_grad_(True)
    for block in plan.state_blocks:
        model.blocks[block].att.time_state.requires_grad_(True)
    if loaded is not None:
        set_adapter_tensors(model, loaded, str(peft_config.load_path))
    return model


def _work(path: Path, plan: Plan, peft: PeftConfig) -> str:
    """What happens to the base while it is loaded, for the progress display."""
    work = [f"loading {path.name}"]
    if plan.quant is not None:
        work.append(f"quantising to {plan.quant.kind}")
    if peft.method == "pissa":
        work.append("decomposing for pissa")
    return ", ".join(work)


class Applier:
    """The transform that model.io calls with every tensor of the base."""

    def __init__(self, plan: Plan, precision: Precision, seed: int, frozen_tensors: Mapping[str, Tensor]) -> None:
        self.plan, self.precision, self.seed, self.frozen_tensors = plan, precision, seed, frozen_tensors

    def __call__(self, module_name: str, parameter_name: str, tensor: Tensor) -> Tensor | nn.Module | None:
        quant = self.plan.quant if module_name in self.plan.quantised else None
        spec = self.plan.adapters.get(module_name)
        if spec is not None:
            assert self.plan.layer is not None
            layer = self.plan.layer(tensor.shape[1], tensor.shape[0], spec, quant)
            dtypes = self.precision.frozen, self.precision.trainable
            layer.set_up(tensor, *dtypes, self.seed, module_name, self.kept(layer, module_name))
            return layer
        if quant is not None:
            frozen = frozen_linear(tensor.shape[1], tensor.shape[0], quant)
            frozen.set_base(tensor, self.precision.frozen)
            return frozen
        if f"{module_name}.{parameter_name}" in self.plan.trained:
            # A copy: the tensor may be a mapping of the file.
            return tensor.to(self.precision.trainable, copy=True)
        return None

    def kept(self, layer: AdapterLinear, name: str) -> dict[str, Tensor]:
        if not self.frozen_tensors:
            return {}
        keys = {f"{name}.{key}": key for key in layer.frozen_names}
        kept = {key: tensor for key, tensor in self.frozen_tensors.items() if key in keys}
        check_names(kept, keys, "the saved adapter", "it was made with other peft.targets")
        return {keys[key]: tensor for key, tensor in kept.items()}


def mark_only_lora_as_trainable(model: nn.Module, train_parts: Sequence[str] = ()) -> int:
    """Freeze everything but adapters, trained states and the named parts; returns the number of trained
    values.

    Raises:
        ValueError: nothing would train.
    """
    adapters = adapter_names(model)
    count = 0
    for name, param in model.named_parameters():
        trains = name in adapters or name.endswith(".time_state") or part_of(name) in train_parts
        param.requires_grad_(trains)
        count += param.numel() if trains else 0
    if count == 0:
        raise ValueError("the model has no adapter and no part was named: nothing would train")
    return count


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that trains: adapters and trained parts of the base.

    The only list of what a PEFT-only save holds, together with `adapter_buffers`. Pass the unwrapped model.
    Under ZeRO-3 the tensors are partitioned; gather them before saving.
    """
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def adapter_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> CPU tensor of what never trains but must be in every save (PiSSA's A0, B0). The same on
    every process.
    """
    return {
        f"{module_name}.{key}": tensor
        for module_name, module in model.named_modules()
        if isinstance(module, AdapterLinear)
        for key, tensor in module.frozen_tensors().items()
    }


def load_adapter(model: RWKV7, folder: str | Path, *, base_digest: str, base_path: str | Path = "") -> AdapterMeta:
    """Put the tensors of an adapter folder into a model that was built with the same peft section. Not
    collective.

    Raises:
        UserError: wrong base, a missing or surplus tensor, a wrong shape, a damaged file; the model is
            unchanged then.
    """
    meta, tensors = read_adapter(folder)
    check_base(meta, base_digest, folder, base_path)
    set_adapter_tensors(model, tensors, str(folder))
    return meta


@torch.no_grad()
def set_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy whole tensors into the trained parameters; strict on names and shapes, before anything is changed.

    Raises:
        UserError: the tensors do not fit this model, or its PiSSA residual was built from other factors.
    """
    params, frozen = adapter_parameters(model), adapter_buffers(model)
    expected: dict[str, Tensor] = {**params, **frozen}
    check_names(tensors, expected, where, "build the model with the peft section of the adapter")
    for name, own in expected.items():
        if tensors[name].shape != own.shape:
            raise UserError(
                f"{where}: {name} is {list(tensors[name].shape)}, the model needs {list(own.shape)}; "
                "the adapter is for a model of another size or was made with another peft.rank"
            )
    for name, own in frozen.items():
        if not torch.equal(own.cpu(), tensors[name].cpu().to(own.dtype)):
            raise UserError(
                f"{where}: {name} differs from the factors that the model's residual was built with; "
                "build the model with peft.load_path, or pass frozen_tensors"
            )
    for name, param in params.items():
        param.copy_(tensors[name])


def check_same_peft(meta: AdapterMeta, peft_config: PeftConfig) -> None:
    """Raises UserError when the adapter was made with other settings than the recipe has.

    Adapters of other programs say less about themselves; there the strict match of their tensors does the
    rest.
    """
    ours = peft_section(peft_config)
    keys = FOREIGN_IDENTITY if meta.created_by.startswith(FOREIGN) else sorted(set(ours) - TRAINING_ONLY)
    for key in keys:
        value = meta.peft.get(key, PeftConfig.model_fields[key].default)
        if ours[key] != value:
            raise UserError(
                f"peft.load_path {peft_config.load_path} holds an adapter with {key} {value!r}, the recipe "
                f"says {ours[key]!r}; set peft.{key}={value}"
            )


def print_model_param(model: nn.Module) -> None:
    """Print what `describe_parameters` says. Call it on the main process."""
    print(describe_parameters(model))  # noqa: T201


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(in all, trained). Quantised and sharded parameters count whole."""
    stored = _stored_counts(model)
    total = trained = 0
    for name, param in model.named_parameters():
        count = getattr(param, "ds_numel", param.numel())
        total += stored.get(name, count)
        trained += count if param.requires_grad else 0
    return total, trained


def describe_parameters(model: nn.Module) -> str:
    """Numbers of parameters: in all, trained, per group, and bytes per dtype. Sharded parameters count
    whole.
    """
    total, trained = count_parameters(model)
    groups, dtypes = Counter[str](), Counter[str]()
    for name, param in model.named_parameters():
        count = getattr(param, "ds_numel", param.numel())
        dtypes[str(param.dtype).removeprefix("torch.")] += count * param.element_size()
        if param.requires_grad:
            groups[group_of(name)] += count
    lines = [f"parameters: {total:,} in all, {trained:,} trained ({100 * trained / max(total, 1):.3f}%)"]
    lines += [
        f"  trained, group {name}: {groups[name]:,}{' (decays)' if name in DECAYED else ''}"
        for name in GROUPS
        if groups[name]
    ]
    lines.append("  bytes: " + ", ".join(f"{name} {size:,}" for name, size in sorted(dtypes.items())))
    return "\n".join(lines)


def _stored_counts(model: nn.Module) -> dict[str, int]:
    """Values that the tensors of quantised weights stand for."""
    return {
        f"{module_name}.{name}": module.in_features * module.out_features if name == "weight_codes" else 0
        for module_name, module in model.named_modules()
        if isinstance(module, FrozenLinear)
        for name in module.stored_names
    }


def adapter_names(model: nn.Module) -> set[str]:
    """Full names of the adapters' own trained tensors."""
    return {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, AdapterLinear)
        for name in module.adapter_names
    }
