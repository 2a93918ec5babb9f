import pytest
import torch

from rwkv_accel.host_adamw import HostAdamW
from tests.unit.checkpoint.checkpoint_helpers import TinyModel


@pytest.fixture(scope="session")
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.fixture
def make_run(accelerator):
    def make(optimizer: str = "adamw", rank: int = 3, dtype: torch.dtype = torch.float32):
        torch.manual_seed(11)
        model = TinyModel(rank).to(dtype)
        trained = [p for p in model.parameters() if p.requires_grad]
        if optimizer == "adamw":
            built = torch.optim.AdamW([{"params": trained[:1]}, {"params": trained[1:]}], lr=1e-2)
        elif optimizer == "adamw, offload":
            built = HostAdamW([{"params": trained[:1]}, {"params": trained[1:]}], betas=(0.9, 0.999), eps=1e-8)
        else:
            built = torch.optim.SGD(trained, lr=1e-2, momentum=0.9 if optimizer == "sgd-momentum" else 0.0)
        return accelerator.prepare(model, built)

    return make
