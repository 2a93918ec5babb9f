"""torch.compile of the blocks computes what the plain blocks do, or is refused."""

import copy
import shutil

import pytest
import torch

from rwkv_accel.errors import UserError
from rwkv_accel.model import compiled
from rwkv_accel.model.compiled import check_compiler, compile_blocks
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.init import init_state_dict
from rwkv_accel.model.rwkv7 import RWKV7


def model_of(n_layer):
    config = RWKV7Config.for_new_model(n_layer, 64, 37, 32)
    model = RWKV7(config)
    model.load_state_dict(init_state_dict(config, seed=0, dtype=torch.float32))
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        for param in model.parameters():
            param += 0.05 * torch.randn(param.shape, generator=noise)
    return model


def compare(backend, lengths=(19, 12), tolerance=1e-5):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = model_of(2)
    plain = copy.deepcopy(model)
    names = list(model.state_dict())
    compile_blocks(model, backend)
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        ids, labels = torch.randint(37, (2, 2, length), generator=generator)
        losses = []
        for m in (model, plain):
            m.zero_grad()
            loss = m(ids, labels)
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            error = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-6)
            assert error < 20 * tolerance, name
    assert list(model.state_dict()) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_compiled_blocks_give_the_same_loss_and_gradients():
    compare("aot_eager", lengths=(19,))


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, compiled.COMPILERS)), reason="needs a C++ compiler")
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled_blocks_at_several_lengths(backend):
    compare(backend, lengths=(19, 12, 33))


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


@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload", "fsdp2"])
def test_gathered_weights_and_compile_exclude_each_other(strategy):
    with pytest.raises(UserError, match=strategy):
        check_compiler("aot_eager", "cuda", strategy)
