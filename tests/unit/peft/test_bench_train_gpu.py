"""Both candidates of the GPU training benchmark are one model: small, on a CPU, with a stand-in for the other op."""

import math

import pytest
import torch

from rwkv_accel.bench import train_gpu
from rwkv_accel.bench.harness import Options
from rwkv_accel.config.schema import OptimConfig
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.ops.wkv7 import BACKENDS, select_backend
from rwkv_accel.ops.wkv7.chunked import wkv7_chunked
from rwkv_accel.optim import build_optimizer
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
        arguments = {"who": who, "base": base, "quant": "none", "small": False, "device": "cpu"}
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


def test_a_step_with_the_settings_that_take_least(base, monkeypatch, capsys):
    """What runs in a process of its own on a GPU, with stand-ins for what only a GPU can tell."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr(train_gpu, "VOCAB", 257)
    arguments = {"who": train_gpu.OURS, "base": base, "quant": "nf4", "small": True, "device": "cpu"}
    model = train_gpu.build(arguments)
    assert (model.gradient_checkpointing, model.loss_chunk_rows) == ("block", 128)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.bfloat16}
    found = train_gpu._run({**arguments, "ctx": 24, "repeats": 1})
    assert found["peak_mib"] == 3
    assert found["tokens_per_second"] > 0
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    adapters = sum(2 * p.numel() for p in trained)
    assert found["base_mib"] * 2**20 == everything - adapters


def test_weights_without_an_initialisation(base, tmp_path):
    train_gpu.random_checkpoint(RWKV7Config.for_new_model(2, 64, 257, 32), tmp_path / "random.pth")
    arguments = {"who": train_gpu.OURS, "base": str(tmp_path / "random.pth"), "quant": "none", "small": True}
    model = train_gpu.build({**arguments, "device": "cpu"})
    assert model.head.weight.dtype == torch.bfloat16
    ids_BT = torch.randint(1, 257, (1, 25), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert train_gpu.training_step(model, optimizer, ids_BT) == pytest.approx(math.log(257), rel=0.1)


def test_rows_of_a_gpu(base, monkeypatch, tmp_path):
    monkeypatch.setattr(train_gpu, "SHAPES", {"0.1B": (1, 64), "1.5B": (2, 64)})
    monkeypatch.setattr(train_gpu, "find_spec", lambda name: object())
    monkeypatch.setattr(train_gpu, "random_checkpoint", lambda *_: None)
    monkeypatch.setattr(train_gpu, "counted", lambda *_: (0.5, "parts"))
    asked = []

    def elsewhere(module, arguments):
        asked.append(arguments)
        speed = 300.0 if arguments["who"] == train_gpu.OURS else 100.0
        return {"tokens_per_second": speed, "peak_mib": 2000.0, "base_mib": 1000.0}

    monkeypatch.setattr(train_gpu, "in_fresh_process", elsewhere)
    rows = list(train_gpu.measure(Options(2, 1, "cuda")))
    assert [(a["small"], a["quant"], a["ctx"]) for a in asked] == [
        (True, "none", 1024), (True, "nf4", 1024),
        (False, "none", 4096), (False, "none", 4096), (True, "none", 1024), (True, "nf4", 1024),
    ]  # fmt: skip
    faster = next(row for row in rows if row.name.endswith("ours"))
    assert (faster.value, faster.ratio, faster.baseline) == (300.0, 3.0, train_gpu.THEIRS)
    small = [row for row in rows if "above the base's weights" in row.name]
    assert len(small) == 4
    assert {(row.value, row.unit, row.baseline) for row in small} == {(1000 * 2**20 / 1e9, "GB", "by count")}
    assert small[0].ratio == pytest.approx(0.5 / 1.048576)


def test_their_adapters_are_multiplied_in_bf16(base, monkeypatch):
    arguments = {"who": train_gpu.THEIRS, "base": base, "quant": "none", "small": False, "device": "cpu"}
    model = train_gpu.build(arguments, lambda *tensors: wkv7_chunked(*tensors, None, None))
    seen = []
    layer = model.blocks[1].ffn.key
    layer.lora_A.default.register_forward_hook(lambda module, given, out: seen.append((module.weight.dtype, out.dtype)))
    out = layer(torch.ones(2, layer.in_features, dtype=torch.bfloat16))
    assert seen == [(torch.float32, torch.bfloat16)]
    assert out.dtype == torch.bfloat16
    build_optimizer(model, OptimConfig())


def test_a_process_that_fails_leaves_the_rows_of_the_others(base, monkeypatch):
    monkeypatch.setattr(train_gpu, "SHAPES", {"1.5B": (2, 64)})
    monkeypatch.setattr(train_gpu, "find_spec", lambda name: object())
    monkeypatch.setattr(train_gpu, "random_checkpoint", lambda *_: None)
    monkeypatch.setattr(train_gpu, "counted", lambda *_: (0.5, "parts"))

    def elsewhere(module, arguments):
        if arguments["who"] == train_gpu.THEIRS or (arguments["quant"] == "none" and arguments["small"]):
            raise RuntimeError(f"out of memory, {arguments['who']}")
        return {"tokens_per_second": 300.0, "peak_mib": 2000.0, "base_mib": 1000.0}

    monkeypatch.setattr(train_gpu, "in_fresh_process", elsewhere)
    rows = []
    with pytest.raises(RuntimeError, match=f"out of memory, {train_gpu.THEIRS}"):
        rows.extend(train_gpu.measure(Options(2, 1, "cuda")))
    speed, memory = rows
    assert (speed.value, speed.ratio, speed.note) == (300.0, None, "baseline not measured: it failed")
    assert "base nf4" in memory.name


def test_the_baseline_refuses_what_it_does_not_compute(base):
    arguments = {"who": train_gpu.THEIRS, "base": base, "quant": "none", "small": False, "device": "cpu"}
    model = train_gpu.build(arguments, lambda *tensors: wkv7_chunked(*tensors, None, None))
    with pytest.raises(ValueError, match="plain rows only"):
        model(torch.ones(1, 6, dtype=torch.int64), cu_seqlens=(0, 2, 6))
