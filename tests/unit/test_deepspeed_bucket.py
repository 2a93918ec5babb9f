"""DeepSpeed allocates its gradient bucket whole; it holds the gradients that there are."""

from types import SimpleNamespace

import pytest
import torch

from rwkv_accel.config.schema import TrainerConfig
from rwkv_accel.runtime import prepare


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, 12), ({"reduce_bucket_size": "auto"}, 12), ({"reduce_bucket_size": 7}, 7)],
    ids=["nothing", "auto", "a number of the user"],
)
def test_bucket_fits_what_is_trained(given, expected):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 5))
    model[1].requires_grad_(False)
    config = {"zero_optimization": {"stage": 2, **given}}
    accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)),
        distributed_type="NO",
        prepare=lambda model, optimizer: (model, optimizer),
    )
    prepare(accelerator, model, None, TrainerConfig(), 1)
    assert config["zero_optimization"]["reduce_bucket_size"] == expected
