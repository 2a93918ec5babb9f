"""Schedules against the official trainer's logged rates, torch's schedulers and hand-computed values."""

import math

import pytest
import torch

from rwkv_accel.config.schema import OptimConfig
from rwkv_accel.schedules import lr_at, wd_at


def test_official_logged_learning_rates():
    # RWKV-LM MiniPile run: 1498226207 tokens, ctx 512, batch 16, 2520 steps per mini-epoch, warmup 10.
    optim = OptimConfig(lr_init=6e-4, lr_final=6e-5, warmup_steps=10, schedule="cosine")
    total = 1498226207 / (512 * 16)
    rates = [round(lr_at(2520 * epoch - 1, total, optim), 8) for epoch in (1, 2, 3, 12)]
    assert rates == [0.00059975, 0.00059899, 0.00059773, 0.00056441]


def torch_rates(scheduler_class, steps, lr, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = scheduler_class(optimizer, **kwargs)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_linear_and_exponential_equal_torch():
    schedulers = torch.optim.lr_scheduler
    for name, theirs in {
        "cosine": torch_rates(schedulers.CosineAnnealingLR, 50, 0.3, T_max=50, eta_min=0.03),
        "linear": torch_rates(schedulers.LinearLR, 50, 0.3, start_factor=1.0, end_factor=0.1, total_iters=50),
        "exponential": torch_rates(schedulers.ExponentialLR, 50, 0.3, gamma=0.1 ** (1 / 50)),
    }.items():
        optim = OptimConfig(lr_init=0.3, lr_final=0.03, schedule=name)
        assert [lr_at(s, 50, optim) for s in range(50)] == pytest.approx(theirs, rel=1e-9), name


def test_wsd_is_stable_then_decays_to_lr_final():
    optim = OptimConfig(lr_init=1.0, lr_final=0.2, schedule="wsd", wsd_decay_share=0.25, warmup_steps=4)
    rates = [lr_at(s, 104, optim) for s in range(105)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[4:80] == [1.0] * 76
    assert rates[79] == 1.0
    assert rates[80] < 1.0
    assert rates[104] == pytest.approx(0.2)
    steps = [a - b for a, b in zip(rates[80:], rates[81:])]
    assert max(steps) == pytest.approx(min(steps))


def test_warmup_is_the_official_ramp():
    optim = OptimConfig(lr_init=2.0, schedule="constant", warmup_steps=10)
    assert [lr_at(s, 100, optim) for s in (0, 5, 9, 10)] == pytest.approx([0.02, 2 * 0.505, 2 * 0.901, 2.0])


def test_weight_decay_moves_exponentially():
    optim = OptimConfig(weight_decay=0.1, weight_decay_final=0.001)
    assert wd_at(0, 10, optim) == pytest.approx(0.1)
    assert wd_at(5, 10, optim) == pytest.approx(math.sqrt(0.1 * 0.001))
    assert wd_at(10, 10, optim) == pytest.approx(0.001)
    assert wd_at(7, 10, OptimConfig(weight_decay=0.1)) == 0.1


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd", "exponential"])
def test_every_schedule_starts_at_init_and_never_leaves_its_range(name):
    final = 1e-3 if name == "constant" else 1e-5
    optim = OptimConfig(lr_init=1e-3, lr_final=final, schedule=name)
    rates = [lr_at(s, 30, optim) for s in range(40)]
    assert rates[0] == 1e-3
    assert rates[30:] == pytest.approx([final] * 10)
    assert all(a >= b for a, b in zip(rates, rates[1:]))


def test_warmup_longer_than_the_run():
    optim = OptimConfig(lr_init=1.0, schedule="cosine", lr_final=0.0, warmup_steps=50)
    assert lr_at(10, 20, optim) == pytest.approx(0.01 + 0.99 * 10 / 50)
