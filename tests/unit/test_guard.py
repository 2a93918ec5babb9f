"""The guard's decisions against a loop in plain Python, and torch.amp.GradScaler."""

import math
import random

import pytest
import torch

from rwkv_accel import guard as guard_module
from rwkv_accel.config.schema import TrainerConfig
from rwkv_accel.guard import APPLIED, MEAN_DECAY, NONFINITE, OVERFLOW, SPIKE, Health, UpdateGuard

CPU = torch.device("cpu")


def decide(guard, loss, norm=1.0):
    """Verdict on an update with this loss and norm."""
    factor = guard.weigh(torch.tensor(loss, dtype=torch.float64))
    guard.judge((torch.tensor(norm) * factor).isfinite())
    return int(guard.verdict)


def trained(fused, poisoned):
    """Parameters, moments and step counts after three updates, of which those poisoned have a NaN gradient."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(7))
    optimizer = torch.optim.AdamW([param], lr=0.1, weight_decay=0.1, fused=fused)
    guard = UpdateGuard(TrainerConfig(), Health(), CPU)
    for step in range(3):
        grad = torch.randn(7)
        if step in poisoned:
            if poisoned[step] == "omit":
                continue
            grad[3] = poisoned[step]
        param.grad = grad
        guard.weigh(torch.tensor(1.0))
        guard.step(optimizer, grad.norm())
        assert int(guard.verdict) == (NONFINITE if step in poisoned else APPLIED)
    state = optimizer.state[param]
    return param.detach(), state["exp_avg"], state["exp_avg_sq"], torch.as_tensor(state["step"])


@pytest.mark.parametrize("fused", [False, True], ids=["host", "on device"])
def test_skipped_update_leaves_no_trace(fused):
    got, expected = trained(fused, {1: torch.nan}), trained(fused, {1: "omit"})
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected))
    assert float(got[3]) == 2
    assert not torch.equal(got[0], trained(fused, {})[0])


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_poor_loss_poisons_the_gradient(loss):
    guard = UpdateGuard(TrainerConfig(), Health(), CPU)
    assert torch.isnan(guard.weigh(torch.tensor(loss)))
    assert guard.weigh(torch.tensor(3.0)) == 1


def test_spikes_against_plain_python():
    rng = random.Random(1)
    trainer = TrainerConfig(spike_guard_factor=1.5)
    health = Health()
    guard = UpdateGuard(trainer, health, CPU)
    mean, num, seen = None, 0, []
    for step in range(300):
        loss = rng.uniform(2, 3) * (8 if step % 37 == 36 else 1) * (2 if step > 200 else 1)
        bad = step % 50 == 49
        spike = num >= 20 and loss > 1.5 * mean and not bad
        if not bad:
            clipped = loss if mean is None else min(loss, 1.5 * mean)
            mean = clipped if mean is None else clipped + MEAN_DECAY * (mean - clipped)
            num += 1
        verdict = decide(guard, math.nan if bad else loss)
        assert verdict == (NONFINITE if bad else SPIKE if spike else APPLIED), step
        seen.append(verdict)
        # A new guard from the numbers of the old one goes on exactly.
        guard.read(health)
        assert (health.mean_loss, health.num_losses) == (pytest.approx(mean, rel=1e-12), num)
        guard = UpdateGuard(trainer, Health.from_state_dict(health.state_dict()), CPU)
    assert seen.count(SPIKE) > 10
    assert seen[-30:].count(SPIKE) <= 1  # a lasting rise is accepted


def test_counts():
    health = Health()
    for verdict in (NONFINITE, NONFINITE, OVERFLOW, NONFINITE):
        health.count(verdict)
    assert (health.nonfinite_in_row, health.nonfinite_steps, health.overflow_steps) == (3, 3, 1)
    health.count(SPIKE)
    assert (health.nonfinite_in_row, health.spike_steps, health.nonfinite_steps) == (0, 1, 3)


def test_scale_follows_torch_grad_scaler(monkeypatch):
    monkeypatch.setattr(guard_module, "GROWTH_INTERVAL", 4)
    rng = random.Random(0)
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=guard_module.INITIAL_SCALE, growth_interval=4)
    health = Health()
    trainer = TrainerConfig(precision="16-mixed")
    guard = UpdateGuard(trainer, health, CPU)
    scales = []
    for _ in range(200):
        overflows = rng.random() < 0.2
        param.grad = scaler.scale(torch.tensor([torch.inf if overflows else 1.0]))
        scaler.step(optimizer)
        scaler.update()
        assert decide(guard, 1.0, torch.inf if overflows else 1.0) == (OVERFLOW if overflows else APPLIED)
        assert float(guard.loss_scale) == scaler.get_scale()
        scales.append(scaler.get_scale())
        guard.read(health)
        guard = UpdateGuard(trainer, Health.from_state_dict(health.state_dict()), CPU)
    assert min(scales) < guard_module.INITIAL_SCALE < max(scales)


def test_overflow_at_the_floor_is_not_finite():
    guard = UpdateGuard(TrainerConfig(precision="16-mixed"), Health(loss_scale=4.0), CPU)
    verdicts = [decide(guard, 1.0, torch.inf) for _ in range(4)]
    assert verdicts == [OVERFLOW, OVERFLOW, NONFINITE, NONFINITE]
    assert float(guard.loss_scale) == 1.0


def test_unscale_takes_the_scale_out_exactly():
    guard = UpdateGuard(TrainerConfig(precision="16-mixed"), Health(), CPU)
    param = torch.nn.Parameter(torch.zeros(5))
    grad = torch.randn(5)
    param.grad = grad * float(guard.loss_scale)
    guard.unscale([param])
    assert torch.equal(param.grad, grad)


def test_decisions_do_not_wait_for_the_device():
    """On tensors without values, which nobody can look at, under every reason there is."""
    meta = torch.device("meta")
    guard = UpdateGuard(TrainerConfig(precision="16-mixed", spike_guard_factor=2.0), Health(), meta)
    param = torch.nn.Parameter(torch.zeros(5, device=meta))
    param.grad = torch.zeros(5, device=meta)

    class Fused:
        _step_supports_amp_scaling = True
        flags: tuple = ()

        def step(self):
            self.flags = (self.grad_scale, self.found_inf.device)

    optimizer = Fused()
    assert guard.weigh(torch.zeros((), device=meta)).device == meta
    guard.unscale([param])
    guard.step(optimizer, param.grad.norm())
    assert optimizer.flags == (None, meta)
    assert guard.verdict.device == meta
