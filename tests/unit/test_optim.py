"""Parameter groups by the official rule, and what the batch-start hook writes into them."""

import pytest
import torch
from torch import nn

from rwkv_accel.config.schema import LrScale, OptimConfig
from rwkv_accel.errors import UserError
from rwkv_accel.optim import build_optimizer, param_groups
from rwkv_accel.peft.groups import group_of
from rwkv_accel.schedules import lr_at, wd_at

NAMES = {
    "emb.weight": ((7, 4), "emb"),
    "head.weight": ((7, 4), "head"),
    "ln_out.weight": ((4,), "other"),
    "blocks.0.ln1.bias": ((4,), "other"),
    "blocks.0.att.w0": ((1, 1, 4), "w0"),
    "blocks.0.att.x_r": ((1, 1, 4), "other"),
    "blocks.0.att.w1": ((4, 2), "other"),
    "blocks.0.att.r_k": ((2, 2), "other"),
    "blocks.0.att.key.weight": ((4, 4), "matrix"),
    "blocks.0.ffn.value.weight": ((4, 16), "matrix"),
    "blocks.0.att.key.lora_A": ((2, 4), "lora_A"),
    "blocks.0.att.key.lora_B": ((4, 2), "lora_B"),
    "blocks.0.att.time_state": ((2, 2, 2), "state"),
}


def named():
    return [(name, nn.Parameter(torch.ones(shape))) for name, (shape, _) in NAMES.items()]


def test_group_names():
    assert {name: group_of(name) for name, p in named()} == {name: g for name, (_, g) in NAMES.items()}


def test_only_large_matrices_decay_and_w0_learns_twice_as_fast():
    groups = {g["name"]: g for g in param_groups(named(), OptimConfig(lr_init=0.1, weight_decay=0.5))}
    assert {n for n, g in groups.items() if g["wd_scale"]} == {"emb", "head", "matrix"}
    assert {n: g["weight_decay"] for n, g in groups.items() if g["weight_decay"]} == {
        "emb": 0.5,
        "head": 0.5,
        "matrix": 0.5,
    }
    assert groups["w0"]["lr"] == pytest.approx(0.2)
    assert len(groups["matrix"]["params"]) == 2
    assert sum(len(g["params"]) for g in groups.values()) == len(NAMES)


def test_lora_plus_ratio_is_a_recipe_value():
    optim = OptimConfig(lr_init=0.1, lr_scale=LrScale(lora_B=16))
    groups = {g["name"]: g["lr"] for g in param_groups(named(), optim)}
    assert groups["lora_B"] == pytest.approx(1.6)
    assert groups["lora_A"] == pytest.approx(0.1)


def test_every_scale_is_that_of_its_group_alone():
    scales = {"w0": 3.0, "emb": 5.0, "head": 7.0, "lora_A": 11.0, "lora_B": 13.0, "state": 17.0}
    optim = OptimConfig(lr_init=0.1, lr_scale=LrScale(**scales))
    rates = {g["name"]: g["lr"] for g in param_groups(named(), optim)}
    assert rates == pytest.approx({**{name: 0.1 * s for name, s in scales.items()}, "matrix": 0.1, "other": 0.1})


def test_frozen_parameters_make_no_group():
    params = named()
    for name, param in params:
        param.requires_grad_(name.endswith("lora_A"))
    (group,) = param_groups(params, OptimConfig())
    assert group["name"] == "lora_A"
    for _, param in params:
        param.requires_grad_(False)
    with pytest.raises(UserError, match="nothing is trainable"):
        param_groups(params, OptimConfig())


def test_optimizer_takes_betas_and_eps():
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.ones(3)))
    optimizer = build_optimizer(model, OptimConfig(betas=(0.8, 0.95), eps=1e-18))
    assert (type(optimizer).__name__, optimizer.defaults["betas"], optimizer.defaults["eps"]) == (
        "AdamW",
        (0.8, 0.95),
        1e-18,
    )
    assert type(build_optimizer(model, OptimConfig(optimizer="sgd"))).__name__ == "SGD"


def test_batch_start_writes_the_schedule_into_every_group():
    from rwkv_accel.hooks import on_batch_start
    from rwkv_accel.state import TrainState

    optim = OptimConfig(
        lr_init=0.1,
        lr_final=0.01,
        weight_decay=0.5,
        weight_decay_final=0.1,
        warmup_steps=3,
        schedule="cosine",
    )
    model = nn.Module()
    for name, param in named():
        model.register_parameter(name.replace(".", "/"), param)
    optimizer = torch.optim.AdamW(param_groups(named(), optim))
    for step in (0, 2, 3, 11, 19):
        on_batch_start(TrainState(step=step), optimizer, optim, 20)
        for group in optimizer.param_groups:
            assert group["lr"] == lr_at(step, 20, optim) * group["lr_scale"]
            assert group["weight_decay"] == wd_at(step, 20, optim) * group["wd_scale"]
