"""Sizes of the Triton kernels: one table, chosen by architecture, dtype and head size, never by timing while training.

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
    inner: int | None = None
    """Keys (scan, transition), values (gradients) that products sum over at once; None: all, which the registers hold
    up to head size 64. Unused by the others."""

    def __post_init__(self) -> None:
        if self.inner is not None and self.num_stages > 1:
            raise ValueError("blocks of a state that the loop stores cannot be loaded ahead: inner needs num_stages 1")

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
    transition: Launch
    scan_backward: Launch
    gradients: Launch


LAUNCHES = ("invert", "scan", "transition", "scan_backward", "gradients")


@dataclass(frozen=True)
class Precision:
    """Operands of the products, and the dtype of what is kept between kernels."""

    products: str
    gradients: str
    inverse: str
    kept: torch.dtype


def family(device: torch.device) -> str:
    """Row of the table: hip (AMD), sm_90 (Hopper, whose matrix units read shared memory), cuda (any other NVIDIA).

    The interpreter, on a CPU, computes what Hopper computes.
    """
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "hip"
    return "sm_90" if torch.cuda.get_device_capability(device) == (9, 0) else "cuda"


def precision(family: str, dtype: torch.dtype, head_size: int) -> Precision:
    """fp16 data go through tf32 products: as many bits, and a range that holds exp of a chunk's decay.

    AMD's matrix units take fp32 as it is. On NVIDIA three tf32 products make one of fp32 where the operands fit into
    the registers three times over; elsewhere fp32 goes through the plain units.
    """
    three_fit = family == "sm_90" and head_size <= 64
    if family == "hip":
        wide = Precision("ieee", "ieee", "ieee", torch.float32)
    elif dtype == torch.float32:
        wide = Precision("tf32x3" if three_fit else "ieee", "ieee", "tf32x3", torch.float32)
    else:
        wide = Precision("tf32", "tf32", "tf32", torch.float32)
    return Precision("bf16", "bf16", wide.inverse, torch.bfloat16) if dtype == torch.bfloat16 else wide


def default_config(family: str, dtype: torch.dtype, head_size: int) -> Config:
    """The table: sizes that compile without spills on every architecture of the family."""
    chunk_size, scan, scan_backward, gradients, *transition = _TABLE[family, dtype][head_size]
    launches = (Launch(*pair) for pair in (scan, *(transition or [scan]), scan_backward, gradients))
    return Config(chunk_size, Launch(head_size, 2), *launches)


def obstacle(dtype: torch.dtype, head_size: int) -> str | None:
    """Why there are no kernels for such data, or None."""
    if dtype not in DTYPES:
        return f"the kernels compute in fp32 at most, not in {str(dtype).removeprefix('torch.')}"
    if head_size not in HEAD_SIZES:
        return f"head size {head_size} is none of {', '.join(map(str, HEAD_SIZES))}"
    return None


# (family, dtype) -> head size -> chunk, then (block, warps[, stages[, inner]]) of scan, backward scan and gradients; of
# the scan of transitions where it differs.
_TABLE: dict[tuple[str, torch.dtype], dict[int, tuple]] = {
    ("sm_90", torch.bfloat16): {
        16: (32, (16, 4), (16, 4), (16, 4)),
        32: (16, (32, 4), (32, 4), (32, 4)),
        64: (32, (64, 4, 2), (64, 4, 2), (64, 8), (64, 4)),
        128: (16, (64, 8), (64, 8), (64, 8, 1, 64)),
    },
    ("sm_90", torch.float16): {
        16: (16, (16, 4), (16, 4), (16, 4)),
        32: (16, (32, 4), (32, 4), (32, 4)),
        64: (16, (64, 8), (64, 8), (64, 8)),
        128: (16, (64, 8, 1, 32), (64, 8), (32, 8, 1, 64), (64, 8)),
    },
    ("sm_90", torch.float32): {
        16: (16, (16, 4), (16, 4), (16, 4)),
        32: (16, (16, 4), (16, 4), (16, 4)),
        64: (16, (16, 8, 2), (64, 8), (16, 8), (64, 8)),
        128: (16, (16, 8, 1, 64), (32, 8), (16, 8, 1, 64)),
    },
    ("cuda", torch.bfloat16): {
        16: (32, (16, 4), (16, 4), (16, 4)),
        32: (16, (32, 4), (32, 4), (32, 4)),
        64: (32, (32, 4), (64, 4), (64, 8)),
        128: (16, (64, 8), (64, 8), (64, 8, 1, 64)),
    },
    ("cuda", torch.float16): {
        16: (16, (16, 4), (16, 4), (16, 4)),
        32: (16, (32, 4), (32, 4), (32, 4)),
        64: (16, (32, 8), (32, 8), (64, 8)),
        128: (16, (32, 8, 1, 64), (64, 8), (32, 8, 1, 64), (32, 8)),
    },
    ("cuda", torch.float32): {
        16: (16, (16, 4), (16, 4), (16, 4)),
        32: (16, (16, 4), (16, 4), (16, 4)),
        64: (16, (16, 8), (16, 8), (16, 8), (32, 8)),
        128: (16, (16, 8, 1, 64), (32, 8), (16, 8, 1, 64)),
    },
    ("hip", torch.bfloat16): {
        16: (16, (16, 4), (16, 4), (16, 4)),
        32: (16, (32, 4), (32, 4), (32, 4)),
        64: (16, (64, 4), (64, 4), (64, 4)),
        128: (16, (32, 4), (32, 4), (16, 4)),
    },
    ("hip", torch.float32): {
        16: (16, (16, 4), (16, 4), (16, 4)),
        32: (16, (32, 4), (32, 4), (16, 4)),
        64: (16, (32, 4), (32, 4), (16, 4)),
        128: (16, (16, 4), (16, 4), (16, 4)),
    },
}
_TABLE["hip", torch.float16] = _TABLE["hip", torch.float32]


@cache
def choose_config(family: str, dtype: torch.dtype, head_size: int, device_name: str) -> Config:
    """Measured sizes for this device if there are any, else the table's. Read once per process."""
    path = tuned_path(device_name)
    if path.is_file():
        entries = json.loads(path.read_text(encoding="utf-8"))
        entry = entries.get(entry_name(dtype, head_size))
        if entry is not None:
            return config_from_dict(entry)
    return default_config(family, dtype, head_size)


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
    launches = {name: Launch(**entry[name]) for name in LAUNCHES}
    return Config(chunk_size=entry["chunk_size"], **launches)
