"""torch.compile of the blocks computes what the plain blocks do, or is refused."""

import copy
import shutil

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from rwkv_accel.config.schema import ModelConfig, PeftConfig
from rwkv_accel.errors import UserError
from rwkv_accel.model import compiled
from rwkv_accel.model.compiled import check_compiler, compile_blocks
from rwkv_accel.peft.apply import load_model_and_apply_peft
from tests.helpers import tiny_checkpoint

BASE = {"method": "full"}
LORA = {"method": "lora", "rank": 4}


@pytest.fixture
def model_of(tmp_path):
    """Two blocks with adapters whose start values do not make them neutral."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    base = tiny_checkpoint(tmp_path / "base.pth", vocab_size=37)

    def build(**peft):
        model = load_model_and_apply_peft(ModelConfig(path=str(base)), PeftConfig(**peft))
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param += 0.05 * torch.randn(param.shape, generator=noise)
        return model

    yield build
    torch._dynamo.reset()


def compare(plain, backend, batches, tolerance=1e-6, checkpointing="none"):
    """The compiled blocks of a copy give the loss and gradients of the model itself, each from one graph."""
    plain.gradient_checkpointing = checkpointing
    model = copy.deepcopy(plain)
    compile_blocks(model, backend)
    for batch in batches:
        losses = []
        for m in (model, plain):
            torch.manual_seed(0)
            m.zero_grad()
            loss = m(**batch)
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)
        check_gradients(model, plain, tolerance)
    assert list(model.state_dict()) == list(plain.state_dict())
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


def check_gradients(model, plain, tolerance=1e-6):
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (not ours.requires_grad), name
        assert (theirs.grad is None) == (not theirs.requires_grad), name
        if ours.grad is not None:
            error = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-6)
            assert error <= 20 * tolerance, name


def batch_of(rows, length, borders=None):
    ids = torch.randint(37, (rows, length), generator=torch.Generator().manual_seed(length))
    return {"ids_BT": ids, "labels_BT": ids, "cu_seqlens": borders}


CASES = {
    "every parameter": (BASE, "none", [batch_of(2, 19)]),
    "lora on nf4, packed, selective": ({**LORA, "base_quant": "nf4"}, "selective", [batch_of(1, 40, [0, 7, 40])]),
}
MORE = {
    "lora, packed": (LORA, "none", [batch_of(1, 40, [0, 7, 40])]),
    "lora on nf4, dropout, block": ({**LORA, "base_quant": "nf4", "dropout": 0.2}, "block", [batch_of(2, 19)]),
    "dora on int8": ({**LORA, "method": "dora", "base_quant": "int8"}, "none", [batch_of(2, 19)]),
    "dora on nf4, double": (
        {**LORA, "method": "dora", "base_quant": "nf4", "double_quant": True},
        "none",
        [batch_of(2, 19)],
    ),
    "miss": ({"method": "miss", "rank": 4}, "none", [batch_of(2, 19)]),
    "pissa": ({**LORA, "method": "pissa"}, "none", [batch_of(2, 19)]),
    "state, packed, selective": ({"method": "state"}, "selective", [batch_of(1, 40, [0, 7, 40])]),
    "several lengths": (BASE, "none", [batch_of(2, length) for length in (19, 12, 33)]),
    "several borders": (LORA, "none", [batch_of(1, 70, borders) for borders in ([0, 70], [0, 7, 70], [0, 33, 34, 70])]),
}


@pytest.mark.parametrize("case", CASES)
def test_compiled_blocks_are_one_graph_with_the_same_gradients(model_of, case):
    peft, checkpointing, batches = CASES[case]
    compare(model_of(**peft), "aot_eager", batches, checkpointing=checkpointing)


def test_recomputed_blocks_are_one_graph_each_way(model_of):
    peft = {**LORA, "base_quant": "nf4", "dropout": 0.2}
    compare(model_of(**peft), "eager", [batch_of(2, 19)], checkpointing="block")


@pytest.mark.long
@pytest.mark.parametrize("case", MORE)
def test_more_methods_are_one_graph(model_of, case):
    peft, checkpointing, batches = MORE[case]
    compare(model_of(**peft), "aot_eager", batches, checkpointing=checkpointing)


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, compiled.COMPILERS)), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "case", ["every parameter", "lora on nf4, packed, selective", "several lengths", "several borders"]
)
def test_fused_blocks(model_of, case):
    peft, checkpointing, batches = {**CASES, **MORE}[case]
    compare(model_of(**peft), "inductor", batches, tolerance=1e-5, checkpointing=checkpointing)


def test_a_batch_of_other_borders_needs_no_other_graph(model_of):
    model = model_of(**LORA)
    compile_blocks(model, "eager")
    graphs = []
    for borders in ([0, 7, 40], [0, 9, 40], [0, 33, 40]):
        model(**batch_of(1, 40, borders)).backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 3


def test_data_parallel_takes_the_gradients_of_compiled_blocks(model_of):
    """The other process of two is feigned and adds nothing: the mean of each gradient is half of it. Real ones are in
    the long suite of tests/distributed/test_strategies.py."""

    def mean(_state, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer().div_(2))
        return future

    plain = model_of(**LORA)
    model = copy.deepcopy(plain)
    compile_blocks(model, "eager")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model, init_sync=False)
        parallel.register_comm_hook(None, mean)
        (2 * parallel(**batch_of(2, 19))).backward()
    finally:
        torch.distributed.destroy_process_group()
    plain(**batch_of(2, 19)).backward()
    check_gradients(model, plain)


def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        check_compiler("inductor", "cpu", "single")
    check_compiler("aot_eager", "cpu", "single")
    check_compiler("none", "cpu", "zero3")


def test_no_triton_on_a_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    check_compiler("inductor", "cpu", "ddp")
    with pytest.raises(UserError, match="needs the package triton"):
        check_compiler("inductor", "cuda", "ddp")


@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload"])
def test_gathered_weights_and_compile_exclude_each_other(strategy):
    with pytest.raises(UserError, match=strategy):
        check_compiler("aot_eager", "cuda", strategy)
    check_compiler("aot_eager", "cuda", "fsdp2")
