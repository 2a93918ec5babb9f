"""Checkpoint files of RWKV-7 models: lazy reading, strict loading tensor by tensor, atomic saving, digests.

The official format is a dict of official parameter names in a zip-format .pth; the same names in a
.safetensors file are equal in every respect.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_accel.errors import UserError
from rwkv_accel.model.checkpoint_file import Checkpoint, read_checkpoint
from rwkv_accel.model.config import RWKV7Config, Shape, parameter_shapes
from rwkv_accel.model.precision import Precision
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.progress import progress

__all__ = [
    "Checkpoint",
    "build_model",
    "checkpoint_digest",
    "load_model",
    "read_checkpoint",
    "save_checkpoint",
]

Transform = Callable[[str, str, Tensor], "Tensor | nn.Module | None"]
"""transform(module_name, parameter_name, tensor): see `build_model`."""

_DIGEST_THREADS = 8


def load_model(
    path: str | os.PathLike[str],
    precision: Precision,
    *,
    wkv_backend: str = "auto",
    transform: Transform | None = None,
    what: str = "loading the model",
) -> RWKV7:
    """Model of a checkpoint file on the CPU, every weight in `precision.frozen`; strict about names and
    shapes.

    Memory: one tensor at a time is read and cast. A tensor that already has its dtype is not copied: it stays
    a private copy-on-write mapping of the file, which the processes of a node share. Layer-0 value matrices
    and `time_state` are optional. `transform` and `what` as in `build_model`. Raises UserError naming the file and the
    remedy.
    """
    checkpoint = read_checkpoint(path)
    config = checkpoint.config
    _check_names_and_shapes(checkpoint, config)
    return build_model(config, checkpoint, precision, wkv_backend=wkv_backend, transform=transform, what=what)


def build_model(
    config: RWKV7Config,
    tensors: Mapping[str, Tensor],
    precision: Precision,
    *,
    wkv_backend: str = "auto",
    transform: Transform | None = None,
    what: str = "loading the model",
) -> RWKV7:
    """Model filled from `tensors`, which hold every name of `parameter_shapes(config)` (and perhaps
    time_state).

    The model starts on the meta device and takes one tensor at a time, so `tensors` may be lazy. For each of
    them, `transform("blocks.0.att.key", "weight", tensor)` may return

    - None: the default, the tensor in `precision.frozen`;
    - a Tensor: taken as it is, for instance in `precision.trainable` for a weight that will be trained;
    - an nn.Module: takes the place of the whole module (one with a single parameter, such as a Linear). This
      is how weights are quantised while streaming: build the quantised layer from `tensor` and return it; the
      full-width tensor is dropped before the next one is read.

    `what` names the work in the progress display.
    """
    with torch.device("meta"):
        model = RWKV7(config, compute_dtype=precision.compute, wkv_backend=wkv_backend)
    names = list(parameter_shapes(config)) + _time_state_names(tensors)
    for name in progress(names, what, unit="tensors"):
        module_name, _, parameter_name = name.rpartition(".")
        tensor = tensors[name]
        value = transform(module_name, parameter_name, tensor) if transform else None
        if isinstance(value, nn.Module):
            assert len(list(model.get_submodule(module_name).parameters())) == 1, name
            model.set_submodule(module_name, value, strict=True)
            continue
        if value is None:
            value = tensor.to(precision.frozen)
        owner = model.get_submodule(module_name)
        if parameter_name in owner._buffers:
            owner.register_buffer(parameter_name, value)
        else:
            owner.register_parameter(parameter_name, nn.Parameter(value))
    unfilled = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not unfilled, f"a transform left {unfilled[:3]} without data"
    return model


def save_checkpoint(state_dict: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Write tensors under their names, .pth or .safetensors by the file name; atomic, returns the path.

    Raises UserError for another suffix, OSError where the disk refuses the file, and ValueError for an empty tensor
    (a sharded parameter that nobody gathered).
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise UserError(f"cannot save a checkpoint as {path}: use the suffix .pth or .safetensors")
    tensors = {}
    for name, tensor in state_dict.items():
        if tensor.numel() == 0 or tensor.is_meta:
            raise ValueError(f"`{name}` has no data to save; gather sharded parameters first")
        tensor = tensor.detach().cpu().contiguous()
        # A view would drag its whole storage into the file.
        is_view = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
        tensors[name] = tensor.clone() if is_view else tensor
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        if path.suffix == ".pth":
            _save_pth(tensors, temporary)
        else:
            save_safetensors(tensors, temporary)
        _fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(path.parent)
    return path


def _save_pth(tensors: dict[str, Tensor], path: Path) -> None:
    # Opened here: given a path, torch hides why the disk refused it.
    try:
        with open(path, "wb") as file:
            torch.save(tensors, file)
    except RuntimeError as error:
        # Closing the archive failed as well, and hides the first error behind one about positions.
        first: BaseException | None = error
        while first is not None and not isinstance(first, OSError):
            first = first.__context__
        raise first or error from None


def save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a .safetensors file as transformers reads it. Raises OSError where the disk refuses it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from None


def checkpoint_digest(path: str | os.PathLike[str]) -> str:
    """`sha256:...` of a checkpoint's content: names, dtypes, shapes and bytes of its tensors.

    Independent of the container (.pth or .safetensors), of the order of the keys and of a `_forward_module.`
    prefix.
    """
    checkpoint = read_checkpoint(path)
    names = sorted(checkpoint)

    def line(name: str) -> str:
        tensor = checkpoint[name].contiguous()
        # Bytes are hashed in place, straight from the mapped file; hashlib lets other threads run meanwhile.
        content = hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy()).hexdigest()
        return f"{name} {tensor.dtype} {list(tensor.shape)} {content}\n"

    with ThreadPoolExecutor(_DIGEST_THREADS) as pool:
        hashed = progress(pool.map(line, names), f"hashing {checkpoint.path.name}", total=len(names), unit="tensors")
        lines = "".join(hashed)
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _time_state_names(names: Mapping[str, Tensor]) -> list[str]:
    return [name for name in names if name.endswith(".att.time_state")]


def _check_names_and_shapes(checkpoint: Checkpoint, config: RWKV7Config) -> None:
    expected: dict[str, Shape] = parameter_shapes(config)
    if _time_state_names(checkpoint):
        for layer in range(config.n_layer):
            heads = (config.n_head, config.head_size, config.head_size)
            expected[f"blocks.{layer}.att.time_state"] = heads
    shapes = checkpoint.shapes
    missing = [name for name in expected if name not in shapes]
    unknown = [name for name in shapes if name not in expected]
    misshapen = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of a wrong shape", misshapen))
        if names
    ]
    if not problems:
        return
    if any("lora_" in name for name in unknown):
        remedy = "it contains adapter weights: merge them into the base first"
    else:
        remedy = "take an unmodified RWKV-7 (x070) checkpoint, or download the file again"
    raise UserError(f"{checkpoint.path}: tensors do not form one RWKV-7 model: {'; '.join(problems)}; {remedy}")
