"""A run that began with another run's adapter goes on when that adapter is gone."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

LORA = ()
PISSA = ("peft.method=pissa", "peft.base_quant=int8", "peft.svd_niter=2")


def weights(out_dir, steps):
    return load_file(out_dir / "adapter" / f"step-{steps:08d}" / "adapter.safetensors")


@pytest.mark.parametrize("method", [LORA, PISSA], ids=["lora", "pissa"])
def test_the_checkpoint_holds_what_the_adapter_brought(run, tmp_path, method):
    settings = (*method, "optim.lr_init=1e-2", "optim.schedule=constant")
    first, whole, stopped = (tmp_path / name for name in ("first", "whole", "stopped"))
    assert run(f"out_dir={first}", *settings, "trainer.max_steps=2") == 0
    again = (*settings, "trainer.seed=3", f"peft.load_path={first}/adapter/step-00000002")
    assert run(f"out_dir={whole}", *again, "trainer.max_steps=4") == 0
    assert run(f"out_dir={stopped}", *again, "trainer.max_steps=2") == 0
    shutil.rmtree(first)
    assert run(f"out_dir={stopped}", *again, "trainer.max_steps=4") == 0
    want, found = weights(whole, 4), weights(stopped, 4)
    assert want.keys() == found.keys()
    assert all(torch.equal(want[name], found[name]) for name in want)
