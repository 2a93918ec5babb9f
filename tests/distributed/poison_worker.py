"""Worker of test_skipped.py: a whole run in which some updates are spoilt.

main(recipe, poison, expect, fused)
    poison   {step: kind}; step counts from 1
             loss      the last rank's loss is NaN in its first micro-batch
             gradient  the first rank's gradient is infinite, its loss is not
             spike     every loss is 100 times larger
             omit      the update is not tried at all: what a skipped one is compared with
    expect   part of the error that the run must end with, or None
    fused    take the fused AdamW, which is left out of an update on the device
"""

import os
from functools import partial, wraps

import torch

from rwkv_accel import guard, loop, optim
from rwkv_accel.config.load import load_config
from rwkv_accel.errors import UserError
from rwkv_accel.guard import NONFINITE
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.run import StepStats
from rwkv_accel.runtime import set_environment_defaults, world_size


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, torch.inf)


def main(recipe, poison, expect=None, fused=False):
    set_environment_defaults()
    guard.MIN_LOSSES = guard.GROWTH_INTERVAL = 3
    spoil(poison)
    if fused:
        optim.AdamW = partial(torch.optim.AdamW, fused=True)
    try:
        loop.train(load_config(recipe))
    except UserError as error:
        print(error)
        return expect is not None and expect in str(error)
    return expect is None


def spoil(poison):
    rank = int(os.environ.get("RANK", "0"))
    now = {"kind": None, "forward": 0}
    on_batch_start, train_window, forward = loop.on_batch_start, loop.train_window, RWKV7.forward

    def start(state, *args):
        now.update(kind=poison.get(state.step + 1), forward=0)
        on_batch_start(state, *args)

    def window(run, batches):
        if now["kind"] != "omit":
            return train_window(run, batches)
        nothing = torch.tensor(torch.nan, dtype=torch.float64)
        counts = torch.tensor([sum(b.num_targets for b in batches), sum(b.num_tokens for b in batches)]).double()
        counts = run.accelerator.reduce(counts, "sum")
        verdict, rows = torch.tensor(float(NONFINITE)), [()] * len(batches)
        return StepStats(nothing, nothing, counts[0], counts[1], verdict, [nothing] * len(batches), rows)

    @wraps(forward)
    def spoilt(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if not self.training:
            return out
        now["forward"] += 1
        if now["kind"] == "loss" and rank == world_size() - 1 and now["forward"] == 1:
            return out * torch.nan
        if now["kind"] == "gradient" and rank == 0:
            return InfiniteGradient.apply(out)
        return out * 100 if now["kind"] == "spike" else out

    loop.on_batch_start, loop.train_window, RWKV7.forward = start, window, spoilt
