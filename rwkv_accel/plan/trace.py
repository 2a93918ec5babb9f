"""Memory of a training step, read off the model's own code: it runs on the meta device, where tensors have no data.

Blocks of the full width are run, forward and backward. Of a stretch of blocks in which the same trains, two are, and
then three: the difference is what every further one costs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkv_accel.config.schema import PeftConfig
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.offload import MOVERS
from rwkv_accel.model.precision import Precision
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.ops.elementwise.backend import STANDS_FOR
from rwkv_accel.ops.wkv7 import BACKENDS, layout, select_backend
from rwkv_accel.ops.wkv7.pieces import build_pieces
from rwkv_accel.ops.wkv7.triton_config import obstacle
from rwkv_accel.peft.apply import count_parameters
from rwkv_accel.peft.base import FrozenLinear, frozen_linear
from rwkv_accel.peft.plan import Plan, make_plan
from rwkv_accel.peft.state_tuning import add_time_states
from rwkv_accel.plan.stretches import first_reached, shortened, stretches_of

FEW = 2
"""Blocks of a stretch that are run at first."""
COUNTED = "triton, without its kernels"
"""Backend of the recurrence that allocates what the Triton one does, and computes nothing."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a whole model's parameters, by what they are for."""

    frozen: int
    quantised: int
    trained: int
    num_trained: int
    """Values that train."""
    num_params: int
    """Values in all, quantised ones counted whole."""
    largest_trained: int
    """Bytes of the largest trained tensor."""
    head_trained: int
    """Bytes of what trains behind the blocks: its gradients come first in the backward pass."""
    largest_block: int
    """Bytes of the parameters of one block."""
    outside_blocks: int
    """Bytes of the parameters outside the blocks."""

    @property
    def all(self) -> int:
        return self.frozen + self.quantised + self.trained


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch takes beside the weights, gradients of weights left out."""

    kept: int
    """Alive between forward and backward."""
    forward_peak: int
    backward_peak: int
    one_block_peak: int
    """The backward peak in a model of one block: what is alive when the backward pass reaches the first block."""
    on_host: int = 0
    """Alive in the host's memory between forward and backward; moved there and back."""


@dataclass(frozen=True)
class Work:
    """One micro-batch of a process."""

    rows: int
    tokens: int
    """Per row."""
    packed: bool = True
    """Rows side by side with document borders, here one document per row."""
    checkpointing: str = "none"
    loss_chunk_rows: int = 512
    device_type: str = "cuda"
    """Where it will run; decides how much of the recurrence is worked on at a time."""


def weights_of(config: RWKV7Config, peft: PeftConfig, precision: Precision) -> Weights:
    """Parameters of a model with its adapters."""
    model = meta_model(config, make_plan(config, peft), precision)
    sizes = {"frozen": 0, "quantised": 0, "trained": 0}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, param in model.named_parameters():
        kind = "trained" if name in trained else "quantised" if ".weight_" in name else "frozen"
        sizes[kind] += _bytes(param)
    blocks = [sum(map(_bytes, block.parameters())) for block in model.blocks]
    return Weights(
        **sizes,
        num_trained=sum(p.numel() for p in trained.values()),
        num_params=count_parameters(model)[0],
        largest_trained=max(map(_bytes, trained.values())),
        head_trained=sum(_bytes(p) for name, p in trained.items() if name.startswith(("head.", "ln_out."))),
        largest_block=max(blocks),
        outside_blocks=sum(sizes.values()) - sum(blocks),
    )


def activations_of(config: RWKV7Config, peft: PeftConfig, precision: Precision, work: Work) -> Activations:
    """What a micro-batch takes, with every token a target."""
    plan = make_plan(config, peft)
    stretches = stretches_of(config, plan)

    @cache
    def run(*blocks: int) -> tuple[int, int, int, int]:
        return _run(replace(config, n_layer=len(blocks)), shortened(plan, blocks), precision, work)

    few = [blocks[:FEW] for blocks in stretches]
    base = run(*chain(*few))
    found = list(base)
    for number, blocks in enumerate(stretches):
        if len(blocks) > FEW:
            one_more = run(*chain(*few[:number], blocks[: FEW + 1], *few[number + 1 :]))
            found = [n + (len(blocks) - FEW) * (b - a) for n, a, b in zip(found, base, one_more)]
    last = first_reached(config, plan)
    kept, forward, backward, on_host = found
    reached = run(*(block for block in chain(*few) if block <= last))
    return Activations(kept, forward, backward, reached[2], on_host)


def meta_model(config: RWKV7Config, plan: Plan, precision: Precision, wkv_backend: str = "chunked") -> RWKV7:
    """The model that a plan makes, without data."""
    with torch.device("meta"):
        model = RWKV7(config, compute_dtype=precision.compute, wkv_backend=wkv_backend)
    packed: dict[tuple[int, int], FrozenLinear] = {}
    for name, module in list(model.named_modules()):
        quant = plan.quant if name in plan.quantised else None
        if name not in plan.adapters and quant is None:
            for key, param in module.named_parameters(prefix=name, recurse=False):
                dtype = precision.trainable if key in plan.trained else precision.frozen
                value = nn.Parameter(param.to(dtype), requires_grad=key in plan.trained)
                module.register_parameter(key.rpartition(".")[2], value)
            continue
        assert isinstance(module, nn.Linear)
        sizes = module.in_features, module.out_features
        if name in plan.adapters:
            assert plan.layer is not None
            layer: Any = plan.layer(*sizes, plan.adapters[name], quant)
            layer.set_adapter({key: getattr(layer, key).to(precision.trainable) for key in layer.adapter_names})
        else:
            assert quant is not None
            layer = frozen_linear(*sizes, quant)
        if quant is None or sizes not in packed:
            layer.set_base(module.weight.detach(), precision.frozen)
            packed[sizes] = layer
        else:  # quantising takes long even without data, and gives the same shapes
            layer.stored_names = packed[sizes].stored_names
            for key in layer.stored_names:
                layer.register_parameter(key, nn.Parameter(getattr(packed[sizes], key).clone(), requires_grad=False))
        model.set_submodule(name, layer, strict=True)
    with torch.device("meta"):
        add_time_states(model, plan.state_blocks, precision.trainable)
    return model


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that come to life inside and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in _meta_tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _meta_tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._known:
                self._enter(storage)
        return out

    def _enter(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _run(config: RWKV7Config, plan: Plan, precision: Precision, work: Work) -> tuple[int, int, int, int]:
    """(kept between forward and backward, forward's peak, backward's peak, kept on the host) of a model."""
    backend = wkv_backend_of(config, precision, work.device_type)
    model = meta_model(config, plan, precision, backend)
    model.gradient_checkpointing, model.loss_chunk_rows = work.checkpointing, work.loss_chunk_rows
    for param in model.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(_drop_grad)
    num_tokens = work.rows * work.tokens
    shape = (1, num_tokens) if work.packed else (work.rows, work.tokens)
    ids_BT = torch.empty(shape, dtype=torch.int64, device="meta")
    rows_R = torch.empty(num_tokens, dtype=torch.int64, device="meta")
    borders = range(0, num_tokens + 1, work.tokens) if work.packed else None
    with _in_place_of(work.device_type), _moving() as host, _Live() as count:
        loss = model(ids_BT, ids_BT, target_rows=rows_R, cu_seqlens=None if borders is None else list(borders))
        kept, forward_peak, count.peak = count.live, count.peak, 0
        loss.backward()
    return kept, forward_peak, count.peak, host.moved


def _drop_grad(param: Tensor) -> None:
    param.grad = None


def wkv_backend_of(config: RWKV7Config, precision: Precision, device_type: str) -> str:
    """Backend of the recurrence whose memory is counted: what "auto" takes on a CPU, or on a GPU of compute
    capability 9."""
    if device_type == "cpu":
        return select_backend("auto", device_type, config.head_size, precision.compute)[0]
    if device_type != "cuda" or find_spec("triton") is None:
        return "chunked"
    return "chunked" if obstacle(precision.compute, config.head_size) else COUNTED


@contextmanager
def _in_place_of(device_type: str) -> Iterator[None]:
    """Tensors without data are worked on as those of a device are: by the same operators, in the same segments.

    Triton's kernels are left out; what they read and write is allocated around them.
    """
    size = layout.SEGMENT_BYTES.get(device_type, layout.DEFAULT_SEGMENT_BYTES)
    with ExitStack() as undo:
        for tables in (layout.build_layout, build_pieces):
            # Those of an earlier trace would not be counted.
            tables.cache_clear()
            undo.callback(tables.cache_clear)
        undo.enter_context(_entry(layout.SEGMENT_BYTES, "meta", size))
        undo.enter_context(_entry(STANDS_FOR, "meta", device_type))
        if device_type == "cuda" and find_spec("triton") is not None:
            undo.enter_context(_without_kernels())
        yield


@contextmanager
def _without_kernels() -> Iterator[None]:
    from rwkv_accel.ops.wkv7.triton_forward import scan_pieces
    from rwkv_accel.ops.wkv7.triton_op import wkv7_triton

    kernels: Any = type(scan_pieces)
    plain, kernels.run = kernels.run, lambda *_, **__: None
    try:
        with _entry(BACKENDS, COUNTED, wkv7_triton):
            yield
    finally:
        kernels.run = plain


@contextmanager
def _entry(table: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    """A value in a table, for a while."""
    table[key] = value
    try:
        yield
    finally:
        del table[key]


class _Host:
    """Takes the data of tensors that have none, and counts their bytes."""

    def __init__(self) -> None:
        self.moved = 0

    def out(self, x: Tensor) -> tuple[torch.Size, torch.dtype]:
        self.moved += _bytes(x)
        return x.shape, x.dtype

    def back(self, host: tuple[torch.Size, torch.dtype]) -> Tensor:
        shape, dtype = host
        return torch.empty(shape, dtype=dtype, device="meta")

    def arrived(self, x: Tensor) -> None:
        pass


@contextmanager
def _moving() -> Iterator[_Host]:
    """What a device would move to the host is counted."""
    host = _Host()
    with _entry(MOVERS, "meta", host):
        yield host


def _meta_tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
