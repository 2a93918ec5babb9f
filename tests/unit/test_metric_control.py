"""Plateau factor against torch's scheduler, early stop and best on hand-made series, and the way through a resume."""

import json
import math
import random

import pytest
import torch

from rwkv_accel.config.schema import EvalConfig
from rwkv_accel.metric_control import MetricControl


def series(seed):
    rng = random.Random(seed)
    loss, out = 3.0, []
    for _ in range(60):
        loss *= rng.choice([0.9, 0.99, 0.9999, 1.0, 1.05])
        out.append(loss)
    return out


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("patience", "cooldown", "threshold", "floor"), [(0, 0, 1e-4, 0), (2, 3, 1e-2, 0.05)])
def test_factor_follows_torchs_scheduler(seed, patience, cooldown, threshold, floor):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, cooldown=cooldown, threshold=threshold, min_lr=floor
    )
    config = EvalConfig(
        path="x", plateau_factor=0.5, plateau_patience=patience, plateau_cooldown=cooldown,
        plateau_threshold=threshold, plateau_min_factor=floor,
    )  # fmt: skip
    ours = MetricControl()
    factors = []
    for step, loss in enumerate(series(seed)):
        theirs.step(loss)
        ours.update(loss, step, config)
        # A resume after every evaluation must change nothing.
        ours = MetricControl.from_state_dict(json.loads(json.dumps(ours.state_dict())))
        assert ours.lr_factor == optimizer.param_groups[0]["lr"]
        factors.append(ours.lr_factor)
    assert len(set(factors)) > 2


def test_without_a_factor_the_rate_stays():
    control = MetricControl()
    for step in range(20):
        control.update(1.0, step, EvalConfig(path="x"))
    assert control.lr_factor == 1.0


def test_early_stop_counts_evaluations_without_enough_gain():
    config = EvalConfig(path="x", early_stop_patience=1, early_stop_min_delta=0.1)
    control, stops = MetricControl(), []
    for step, loss in enumerate([2.0, 1.8, 1.75, 1.69, 1.65, 1.64]):
        control.update(loss, step, config)
        stops.append(control.wants_stop(config))
    assert stops == [False, False, False, False, False, True]
    assert not control.wants_stop(EvalConfig(path="x"))


def test_best_is_the_lowest_and_nan_is_never_better():
    config, control = EvalConfig(path="x"), MetricControl()
    for step, loss in enumerate([2.0, math.nan, 1.0, 1.5]):
        control.update(loss, step, config)
    assert (control.best, control.best_step) == (1.0, 2)
