"""Merging adapters into their base, tensor by tensor in fp32, and the proof that the merged model is the same model.

Shapes: I in_features, O out_features, B batch, T tokens, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rwkv_accel.errors import UserError
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.io import build_model
from rwkv_accel.model.precision import Precision
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.peft.adapter_file import AdapterMeta, check_finite
from rwkv_accel.peft.base import AdapterLinear, frozen_linear
from rwkv_accel.peft.plan import Plan, make_plan
from rwkv_accel.progress import progress

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float64: 1e-4}
"""Largest accepted difference of the logits, by the dtype that the merged weights are stored in: its RMS over the
standard deviation of the logits. It covers the rounding of the stored weights."""


@dataclass
class Loaded:
    """An adapter read from disk, and its weight in a sum of several."""

    meta: AdapterMeta
    tensors: Mapping[str, Tensor]
    config: RWKV7Config
    weight: float = 1.0
    onto_original: bool = False
    """Merge onto the base as it is in the file, although the adapter was trained on a quantised one."""
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        peft = self.meta.config
        if self.onto_original:
            peft = peft.model_copy(update={"base_quant": "none", "double_quant": False})
        self.plan = make_plan(self.config, peft)
        known = {f"{module}.{name}" for module in self.plan.adapters for name in self._names()}
        known |= self.plan.trained | {f"blocks.{block}.att.time_state" for block in self.plan.state_blocks}
        for words, names in (("lacks", known - set(self.tensors)), ("has a surplus", set(self.tensors) - known)):
            if names:
                raise UserError(f"the adapter {words} tensor {min(names)}; it is incomplete or for another model size")

    def _names(self) -> tuple[str, ...]:
        layer = self.plan.layer
        return () if layer is None else layer.adapter_names + layer.frozen_names

    def layer(self, module: str, weight_OI: Tensor, frozen: torch.dtype) -> AdapterLinear | None:
        """The adapter layer on a module, as it was when it was saved; None where it has none."""
        spec = self.plan.adapters.get(module)
        if spec is None:
            return None
        assert self.plan.layer is not None
        own = {name: self.tensors[f"{module}.{name}"].float() for name in self._names()}
        quant = self.plan.quant if module in self.plan.quantised else None
        layer = self.plan.layer(weight_OI.shape[1], weight_OI.shape[0], spec, quant)
        for name, shape in layer.adapter_shapes(weight_OI.shape[1], weight_OI.shape[0], spec).items():
            if own[name].shape != shape:
                raise UserError(
                    f"the adapter's {module}.{name} is {list(own[name].shape)}, this base needs {list(shape)}; "
                    "it is for a model of another size"
                )
        layer.set_up(weight_OI, frozen, torch.float32, 0, module, {name: own[name] for name in layer.frozen_names})
        layer.set_adapter(own)
        return layer.eval()


def merged_tensors(
    base: Mapping[str, Tensor], adapters: Sequence[Loaded], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Official name -> merged tensor, one at a time; `dtype` None keeps the base's. W + sum of weight * change.

    Raises:
        UserError: a merged value is not finite.
    """
    for name in progress(base, "merging", unit="tensors"):
        tensor = base[name]
        merged = _merged(name, tensor, adapters)
        if merged is not None:
            check_finite({name: merged}, "the merged model")
        yield name, (tensor if merged is None else merged).to(dtype or tensor.dtype)
    for name in time_state_names(adapters):
        if name not in base:
            # Always fp32, as every runtime computes with it.
            yield name, combined_state(name, adapters, None)


def time_state_names(adapters: Sequence[Loaded]) -> list[str]:
    """Names of the initial states of all blocks, if any adapter trains one: a state file has all of them."""
    if not any(adapter.plan.state_blocks for adapter in adapters):
        return []
    return [f"blocks.{block}.att.time_state" for block in range(adapters[0].config.n_layer)]


def combined_state(name: str, adapters: Sequence[Loaded], own: Tensor | None) -> Tensor:
    """Weighted initial state [H, value, key] of a block in fp32; `own` is the base's, None for zero."""
    config = adapters[0].config
    start = torch.zeros(config.n_head, config.head_size, config.head_size) if own is None else own.float()
    change = torch.zeros_like(start)
    for adapter in adapters:
        if name in adapter.tensors:
            change += adapter.weight * (adapter.tensors[name].float() - start)
    return start + change


def _merged(name: str, tensor: Tensor, adapters: Sequence[Loaded]) -> Tensor | None:
    """fp32 tensor with the adapters' changes; None where nothing changes."""
    if name.endswith(".time_state"):
        return combined_state(name, adapters, tensor)
    module = name.removesuffix(".weight")
    whole, change = None, None
    for adapter in adapters:
        merged = None
        if name in adapter.plan.trained:
            whole, merged = tensor.float(), adapter.tensors[name].float()
        elif (layer := adapter.layer(module, tensor, torch.float32)) is not None:
            whole, merged = layer.whole_weight(), layer.merged_weight()
        elif adapter.plan.quant is not None and module in adapter.plan.quantised:
            whole = _plain(adapter.plan, tensor).base_weight(torch.float32)
        if merged is not None:
            delta = adapter.weight * (merged - whole)
            change = delta if change is None else change + delta
    if change is None:
        return whole
    return whole + change


def _plain(plan: Plan, tensor: Tensor) -> nn.Module:
    assert plan.quant is not None
    layer = frozen_linear(tensor.shape[1], tensor.shape[0], plan.quant)
    layer.set_base(tensor, torch.float32)
    return layer


class SummedLinear(nn.Module):
    """x W^T plus the weighted changes that several adapter layers make: the adapters as they run, not merged."""

    def __init__(self, layers: Sequence[AdapterLinear], weights: Sequence[float]) -> None:
        super().__init__()
        self.layers, self.weights = nn.ModuleList(layers), tuple(weights)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        if len(self.layers) == 1 and self.weights == (1.0,):
            return self.layers[0](x)
        whole = nn.functional.linear(x, self.layers[0].whole_weight().to(x.dtype))
        out = whole
        for layer, weight in zip(self.layers, self.weights):
            out = out + weight * (layer(x) - whole)
        return out


def running_model(
    config: RWKV7Config, base: Mapping[str, Tensor], adapters: Sequence[Loaded], frozen: torch.dtype
) -> RWKV7:
    """The base with its adapters running beside it, fp32 arithmetic; what the merged model is compared with."""
    states = {name: combined_state(name, adapters, base.get(name)) for name in time_state_names(adapters)}
    tensors = _Lazy(base, states)

    def transform(module: str, parameter: str, tensor: Tensor) -> Tensor | nn.Module | None:
        name = f"{module}.{parameter}"
        layers = [(layer, a.weight) for a in adapters if (layer := a.layer(module, tensor, frozen)) is not None]
        if layers:
            return SummedLinear([layer for layer, _ in layers], [weight for _, weight in layers])
        if adapters and module in adapters[0].plan.quantised:
            return _plain(adapters[0].plan, tensor)
        trained = [a for a in adapters if name in a.plan.trained]
        if not trained:
            return None
        start = tensor.float()
        return start + sum(a.weight * (a.tensors[name].float() - start) for a in trained)

    precision = Precision(compute=torch.float32, frozen=frozen, trainable=torch.float32)
    return build_model(config, tensors, precision, transform=transform).eval()


class _Lazy(Mapping[str, Tensor]):
    """The base with the combined states on top, still read one tensor at a time."""

    def __init__(self, base: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
        self.base, self.states = base, states

    def __getitem__(self, name: str) -> Tensor:
        return self.states[name] if name in self.states else self.base[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.base
        yield from (name for name in self.states if name not in self.base)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@torch.no_grad()
def logits_of(model: RWKV7, ids: Sequence[int]) -> Tensor:
    """fp32 logits [T, V] of one row of tokens."""
    return model(torch.tensor([list(ids)]))[0].float()


def relative_error(reference_TV: Tensor, other_TV: Tensor) -> float:
    """RMS difference of logits over the standard deviation of the reference."""
    return float((other_TV - reference_TV).square().mean().sqrt() / reference_TV.std())
