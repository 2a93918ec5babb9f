"""Sizes of the Triton kernels: one table, chosen by vendor, arithmetic and head size, never by timing while training.

The same inputs give the same bits on every rank and in every run of one kind of device. Measured choices replace the
table's where `python -m rwkv_accel.bench wkv7 --tune` has left its file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

HEAD_SIZES = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched."""

    block: int
    """Values of a slice (scans), keys of a block (gradients); unused by the inverse."""
    num_warps: int
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton's compiler is told. Contraction to fused multiply-adds is on whatever its version's default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Config:
    """Sizes of all kernels of one call; forward and backward agree on the chunk."""

    chunk_size: int
    invert: Launch
    scan: Launch
    scan_backward: Launch
    gradients: Launch


@dataclass(frozen=True)
class Precision:
    """Operands of the products, and the dtype of what is kept between kernels."""

    products: str
    inverse: str
    kept: torch.dtype


def vendor(device: torch.device) -> str:
    """cuda or hip; the interpreter (on a CPU) computes what NVIDIA's devices compute."""
    return "hip" if device.type == "cuda" and torch.version.hip else "cuda"


def precision(vendor: str, dtype: torch.dtype) -> Precision:
    """fp16 data go through tf32 products: as many bits, and a range that holds exp of a chunk's decay.

    AMD's matrix units take fp32 as it is.
    """
    if vendor == "hip":
        wide = Precision("ieee", "ieee", torch.float32)
    elif dtype == torch.float32:
        wide = Precision("tf32x3", "tf32x3", torch.float32)
    else:
        wide = Precision("tf32", "tf32", torch.float32)
    return Precision("bf16", wide.inverse, torch.bfloat16) if dtype == torch.bfloat16 else wide


def default_config(vendor: str, dtype: torch.dtype, head_size: int) -> Config:
    """The table."""
    narrow = dtype == torch.bfloat16
    small = min(head_size, 32)
    return Config(
        chunk_size=32 if narrow and head_size <= 64 else 16,
        invert=Launch(head_size, 2),
        scan=Launch(small, 4),
        scan_backward=Launch(small, 4),
        gradients=Launch(small, 4),
    )


@cache
def choose_config(vendor: str, dtype: torch.dtype, head_size: int, device_name: str) -> Config:
    """Measured sizes for this device if there are any, else the table's. Read once per process."""
    path = tuned_path(device_name)
    if path.is_file():
        entries = json.loads(path.read_text(encoding="utf-8"))
        entry = entries.get(entry_name(dtype, head_size))
        if entry is not None:
            return config_from_dict(entry)
    return default_config(vendor, dtype, head_size)


def tuned_path(device_name: str) -> Path:
    """File of measured sizes for a kind of device."""
    from rwkv_accel.runtime import cache_folder

    safe = "".join(c if c.isalnum() else "-" for c in device_name)
    return cache_folder() / f"wkv7-{safe}.json"


def entry_name(dtype: torch.dtype, head_size: int) -> str:
    return f"{str(dtype).removeprefix('torch.')}-{head_size}"


def config_to_dict(config: Config) -> dict[str, object]:
    return asdict(config)


def config_from_dict(entry: dict) -> Config:
    launches = {name: Launch(**entry[name]) for name in ("invert", "scan", "scan_backward", "gradients")}
    return Config(chunk_size=entry["chunk_size"], **launches)
