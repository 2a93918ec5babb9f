"""Which dtype arithmetic, frozen weights and trained weights have. Nothing here uses torch.autocast."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Dtypes of a run: of the activations (`compute`), of frozen and of trained parameters."""

    compute: torch.dtype
    frozen: torch.dtype
    trainable: torch.dtype

    @classmethod
    def from_name(cls, name: str) -> Precision:
        """Dtypes of a `trainer.precision` name: 32-true, bf16-mixed, 16-mixed, bf16-true. ValueError for others."""
        if name not in _BY_NAME:
            raise ValueError(f"unknown precision {name!r}; use one of {', '.join(_BY_NAME)}")
        return cls(*_BY_NAME[name])


_BY_NAME = {
    "32-true": (torch.float32, torch.float32, torch.float32),
    "bf16-mixed": (torch.bfloat16, torch.bfloat16, torch.float32),
    "16-mixed": (torch.float16, torch.float16, torch.float32),
    "bf16-true": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of norms, decay and WKV state for activations of `dtype`: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
