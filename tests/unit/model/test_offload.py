"""Inputs of recomputed blocks leave their device and come back in time.

A stand-in for an accelerator moves the tensors of the CPU: what it brings back holds no value until it has arrived.
"""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from rwkv_accel.model import offload
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.init import init_state_dict
from rwkv_accel.model.rwkv7 import RWKV7


class Mover:
    def __init__(self):
        self.log, self.left, self.under_way = [], [], {}

    def out(self, x):
        self.left.append(StorageWeakRef(x.untyped_storage()))
        self.log.append(("out", len(self.left) - 1))
        return len(self.left) - 1, x.clone()

    def back(self, host):
        number, values = host
        self.log.append(("back", number))
        x = torch.full_like(values, float("nan"))
        self.under_way[x.data_ptr()] = host
        return x

    def arrived(self, x):
        number, values = self.under_way.pop(x.data_ptr())
        self.log.append(("arrived", number))
        x.copy_(values)


@pytest.fixture
def mover(monkeypatch):
    mover = Mover()
    monkeypatch.setitem(offload.MOVERS, "cpu", mover)
    return mover


def model_of(num_blocks=3):
    config = RWKV7Config.for_new_model(num_blocks, 64, 37, 32)
    model = RWKV7(config)
    model.load_state_dict(init_state_dict(config, seed=0, dtype=torch.float32))
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        for param in model.parameters():
            param += 0.05 * torch.randn(param.shape, generator=noise)
    return model


def update(model, seed=0):
    ids = torch.randint(37, (2, 19), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    loss = model(ids, ids)
    loss.backward()
    return [loss.detach(), *(param.grad for param in model.parameters())]


def test_same_loss_and_gradients(mover):
    model = model_of()
    model.gradient_checkpointing = "block"
    expected = update(model)
    assert mover.log == []
    model.gradient_checkpointing = "offload"
    for ours, theirs in zip(update(model), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_each_input_leaves_and_the_one_before_is_on_its_way_back(mover):
    model = model_of()
    model.gradient_checkpointing = "offload"
    for first in (0, 3):
        mover.log.clear()
        update(model)
        a, b, c = range(first, first + 3)
        assert mover.log == [
            ("out", a), ("out", b), ("out", c),
            ("back", c), ("arrived", c), ("back", b), ("arrived", b), ("back", a), ("arrived", a),
        ]  # fmt: skip


def test_nothing_of_them_stays_behind(mover):
    model = model_of()
    model.gradient_checkpointing = "offload"
    ids = torch.randint(37, (2, 19))
    loss = model(ids, ids)
    assert [storage.expired() for storage in mover.left] == [True] * 3
    del loss
    # A graph that is dropped takes its copies along: the next one's first has nothing before it.
    mover.log.clear()
    update(model)
    assert ("back", 2) not in mover.log


def test_without_gradients_nothing_moves(mover):
    model = model_of()
    model.gradient_checkpointing = "offload"
    with torch.no_grad():
        model(torch.randint(37, (2, 19)))
    model.requires_grad_(False)
    model(torch.randint(37, (2, 19)))
    assert mover.log == []


def test_on_a_cpu_it_is_block():
    model = model_of()
    model.gradient_checkpointing = "block"
    expected = update(model)
    model.gradient_checkpointing = "offload"
    for ours, theirs in zip(update(model), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_inputs_leave_its_memory():
    model = model_of(6).cuda()
    kept, found = {}, {}
    ids = torch.randint(37, (2, 512), device="cuda")
    for model.gradient_checkpointing in ("block", "offload"):
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        loss = model(ids, ids)
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")  # the allocator looks at its next call which copies are done
        kept[model.gradient_checkpointing] = torch.cuda.memory_allocated() - before
        loss.backward()
        found[model.gradient_checkpointing] = [param.grad.clone() for param in model.parameters()]
    row_bytes = 2 * 512 * 64 * 4
    assert kept["offload"] <= kept["block"] - 5 * row_bytes
    for ours, theirs in zip(found["offload"], found["block"], strict=True):
        assert torch.equal(ours, theirs)
