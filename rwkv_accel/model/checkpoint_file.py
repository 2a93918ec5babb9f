"""Opening a checkpoint file without reading it into memory, and saying what is wrong with a foreign one."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_accel.errors import UserError
from rwkv_accel.model.config import RWKV7Config, Shape

_PREFIX = "_forward_module."
_WRAPPERS = ("model", "state_dict", "module")

_FOREIGN = (
    # (part of a name that gives the format away, what it is)
    (".lora_A", "an adapter without its base model; give the base here and the adapter as peft.load_path"),
    ("ffn.s_emb", "an RWKV-7 DeepEmbed model (x070a/x070b), another architecture than the plain x070"),
    ("att.time_maa_", "an RWKV-6 model (x060)"),
    ("att.ln_x.", "an RWKV-5 model (x052)"),
    ("att.time_decay", "an RWKV-4 model"),
    ("att.time_state", "a state-tuning file without its base model"),
    (".attn.r_proj.", "an RWKV-7 model in Hugging Face (FLA) names; convert it to the official names"),
)


class Checkpoint(Mapping[str, Tensor]):
    """Tensors of a file by official name; each access maps or reads one tensor, nothing is held."""

    def __init__(self, path: Path, shapes: dict[str, Shape], dtypes: dict[str, str], fetch: Callable[[str], Tensor]):
        self.path = path
        self.shapes = shapes
        self._fetch = fetch
        if not shapes:
            raise UserError(f"{path}: the file holds no tensors; give an RWKV-7 checkpoint")
        for name, dtype in dtypes.items():
            if dtype not in ("float64", "float32", "float16", "bfloat16"):
                raise UserError(
                    f"{path}: `{name}` has dtype {dtype}; give an unquantised checkpoint (bf16, fp16 or fp32)"
                )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._fetch(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def config(self) -> RWKV7Config:
        """Sizes of the model in this file. Raises UserError when it is another architecture or incomplete."""
        for part, what in _FOREIGN:
            foreign = any(part in name for name in self.shapes)
            if foreign and (part == "ffn.s_emb" or "blocks.0.att.r_k" not in self.shapes):
                raise UserError(f"{self.path}: this is {what}; only RWKV-7 (x070) checkpoints can be used")
        try:
            return RWKV7Config.from_shapes(self.shapes)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a .pth (memory-mapped, tensors only) or .safetensors file; `_forward_module.` prefixes are
    stripped.

    Raises UserError for a missing, truncated, foreign or old-format file, and for tensors that are not
    floating point.
    """
    path = Path(path)
    _check_readable(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return _open_pth(path)


def _check_readable(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the checkpoint file itself (.pth or .safetensors)")
    if not path.exists():
        near = [p.name for p in (path.with_name(path.name + s) for s in (".pth", ".safetensors")) if p.exists()]
        hint = f"did you mean {near[0]}?" if near else "check the path"
        raise UserError(f"checkpoint {path} does not exist; {hint}")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"{path} is a web page, not a checkpoint; download the file itself (its raw link)")


def _truncated(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"{path} ({path.stat().st_size} bytes) is truncated or damaged: {reason[:160]}; copy or download it again"
    )


def _open_pth(path: Path) -> Checkpoint:
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic[:1] == b"\x80":
        raise UserError(
            f"{path} has the pickle format of PyTorch before 1.6, which cannot be memory-mapped; "
            "rewrite it once: "
            f"python -c \"import torch; p = '{path}'; "
            "torch.save(torch.load(p, map_location='cpu', weights_only=True), p + '.new.pth')\""
        )
    if magic and not magic.startswith(b"PK"):
        raise UserError(f"{path} is no checkpoint (it begins with {magic!r}); give a .pth or .safetensors file")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds Python objects other than tensors and is not opened, because that would run "
            "code from the file; save only the model's state_dict"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise _truncated(path, error) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of tensors; save the model's state_dict")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{path}: entry `{name}` is a {type(value).__name__}, not a tensor; save the model's state_dict alone"
            )
    tensors = {str(name).removeprefix(_PREFIX): value for name, value in content.items()}
    return Checkpoint(
        path,
        shapes={name: tuple(value.shape) for name, value in tensors.items()},
        dtypes={name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()},
        fetch=lambda name: tensors[name].contiguous(),
    )


_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _open_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise _truncated(path, error) from error
    names: list[str] = file.keys()
    stored = {name.removeprefix(_PREFIX): name for name in names}
    slices = {name: file.get_slice(key) for name, key in stored.items()}
    return Checkpoint(
        path,
        shapes={name: tuple(piece.get_shape()) for name, piece in slices.items()},
        dtypes={n: _SAFETENSORS_DTYPES.get(s.get_dtype(), s.get_dtype()) for n, s in slices.items()},
        fetch=lambda name: file.get_tensor(stored[name]),
    )
