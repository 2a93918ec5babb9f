"""Kernels are queued on the device of their tensors, which need not be the current one; tables get there unawaited."""

import importlib
from contextlib import contextmanager

import pytest
import torch

from rwkv_accel.model import layers
from rwkv_accel.model.layers import Documents
from rwkv_accel.ops import devices
from rwkv_accel.ops.elementwise import head_gate, relu_squared, shift_lerp, triton_common, wkv_inputs


def test_the_context_is_that_of_the_tensors_device(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device))
    devices.on_device(torch.device("cuda:1"))
    assert entered == [torch.device("cuda:1")]
    with devices.on_device(torch.device("cpu")):
        pass
    assert len(entered) == 1


def test_tables_are_copied_from_pinned_memory(monkeypatch):
    """A stand-in for what only a GPU can do."""
    log = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: log.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking=False: log.append(non_blocking) or self)
    x = torch.arange(3)
    assert devices.to_device(x, torch.device("cuda:0")) is x
    assert log == ["pinned", True]
    devices.to_device(x, "cpu")
    assert log == ["pinned", True, False]


def test_borders_of_a_packed_row_are_such_tables(monkeypatch):
    copied = []
    # By its name: the package has a function of the same name.
    for module in (layers, importlib.import_module("rwkv_accel.ops.elementwise.shift_lerp")):
        monkeypatch.setattr(module, "to_device", lambda x, device: copied.append(x) or x)
    Documents.from_cu_seqlens([0, 2, 5], torch.zeros(1, 5, dtype=torch.int64))
    assert [x.tolist() for x in copied] == [[0, 2, 5], [0, -1, 1, -1, -1]]


@pytest.fixture
def queued(monkeypatch):
    """(kernel, device that it is queued on), for tensors without data."""
    from triton.runtime.jit import JITFunction

    current, found = [None], []

    @contextmanager
    def on_device(device):
        current.append(device.type)
        yield
        current.pop()

    monkeypatch.setattr(triton_common, "on_device", on_device)
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, **__: found.append((kernel.fn.__name__, current[-1])))
    return found


def test_every_elementwise_kernel_is_queued_there(queued):
    def tensor(*shape):
        return torch.empty(shape, device="meta", requires_grad=True)

    h, vector = tensor(1, 32, 64), tensor(64)
    outs = [*wkv_inputs(h, h, h, (h, h), (vector,) * 4, head_size=32, backend="triton")]
    outs.append(head_gate(h, h, h, h, h, vector, vector, vector, head_size=32, eps=1e-5, backend="triton"))
    outs += [shift_lerp(h, tensor(6, 64), backend="triton"), relu_squared(h, backend="triton")]
    torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])
    names = [name for name, _ in queued]
    assert sorted(names) == [
        "head_gate_grad_kernel", "head_gate_kernel", "relu_squared_kernel", "relu_squared_kernel",
        "shift_lerp_grad_kernel", "shift_lerp_kernel", "shift_lerp_weights_kernel",
        "wkv_inputs_grad_kernel", "wkv_inputs_kernel",
    ]  # fmt: skip
    assert {device for _, device in queued} == {"meta"}
