"""Parameter groups and the optimizer.

The groups follow RWKV-LM (train_temp/src/model.py): `att.w0` learns at twice the rate, weight decay touches only the
large `.weight` matrices, and nothing else. Adapters never decay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from rwkv_accel.config.schema import OptimConfig
from rwkv_accel.errors import UserError
from rwkv_accel.host_adamw import HostAdamW
from rwkv_accel.peft.groups import DECAYED, group_of


def param_groups(named: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups of the trainable parameters, none empty, with `name`, `lr_scale` and `wd_scale`."""
    members: dict[str, list[nn.Parameter]] = {}
    for name, param in named:
        if param.requires_grad:
            members.setdefault(group_of(name), []).append(param)
    if not members:
        raise UserError("nothing is trainable: choose peft.targets, peft.train_parts or peft.method full")
    scales = optim.lr_scale.model_dump()
    return [
        {
            "name": group,
            "params": members[group],
            "lr_scale": scales.get(group, 1.0),
            "wd_scale": 1.0 if group in DECAYED else 0.0,
            "lr": optim.lr_init * scales.get(group, 1.0),
            "weight_decay": optim.weight_decay if group in DECAYED else 0.0,
        }
        for group in sorted(members)
    ]


def check_offload_strategy(optim: OptimConfig, strategy: str) -> None:
    """Raises UserError where optim.offload cannot do what it says."""
    if not optim.offload or strategy in ("single", "ddp"):
        return
    remedy = "take accelerate_configs/zero2_offload.yaml" if strategy.startswith("zero") else "take ddp"
    raise UserError(
        f"optim.offload does not go with {strategy}, which shards what is updated; {remedy}, or set optim.offload=false"
    )


def build_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer:
    """The optimizer over the trainable parameters of the model."""
    groups = param_groups(model.named_parameters(), optim)
    if optim.optimizer == "sgd":
        return SGD(groups)
    if optim.offload:
        return HostAdamW(groups, betas=optim.betas, eps=optim.eps)
    # Fused where that saves launches; it can also leave out an update without waiting for the device.
    return AdamW(groups, betas=optim.betas, eps=optim.eps, fused=torch.cuda.is_available() or None)
