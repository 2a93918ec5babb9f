"""Both candidates of the GPU training benchmark are one model: small, on a CPU, with a stand-in for the other op."""

import pytest
import torch

from rwkv_accel.bench import train_gpu
from rwkv_accel.ops.wkv7 import BACKENDS, select_backend
from rwkv_accel.ops.wkv7.chunked import wkv7_chunked
from tests.helpers import tiny_checkpoint


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpu, "RANK", 4)
    yield str(tiny_checkpoint(tmp_path / "base.pth"))
    BACKENDS.pop("baseline", None)
    select_backend.cache_clear()


def test_both_train_the_same_model(base):
    calls = []

    def op(*tensors):
        calls.append(tensors[0].dtype)
        return wkv7_chunked(*tensors, None, None)

    ids_BT = torch.randint(1, 257, (1, 25), generator=torch.Generator().manual_seed(0))
    losses, trained = {}, {}
    for who in (train_gpu.OURS, train_gpu.THEIRS):
        arguments = {"who": who, "base": base, "quant": "none", "recompute": "none", "device": "cpu"}
        model = train_gpu.build(arguments, op)
        parameters = [p for p in model.parameters() if p.requires_grad]
        trained[who] = sorted(tuple(p.shape) for p in parameters)
        assert {p.dtype for p in parameters} == {torch.float32}
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
        losses[who] = [train_gpu.training_step(model, optimizer, ids_BT) for _ in range(4)]
    assert calls.count(torch.bfloat16) == 8  # two layers, four steps
    assert trained[train_gpu.OURS] == trained[train_gpu.THEIRS]
    ours, theirs = losses[train_gpu.OURS], losses[train_gpu.THEIRS]
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    assert ours[-1] < ours[0] - 0.05
    assert theirs[-1] < theirs[0] - 0.05


def test_the_baseline_refuses_what_it_does_not_compute(base):
    arguments = {"who": train_gpu.THEIRS, "base": base, "quant": "none", "recompute": "none", "device": "cpu"}
    model = train_gpu.build(arguments, lambda *tensors: wkv7_chunked(*tensors, None, None))
    with pytest.raises(ValueError, match="plain rows only"):
        model(torch.ones(1, 6, dtype=torch.int64), cu_seqlens=(0, 2, 6))
