"""Triton's kernels are queued on the device of their tensors, which need not be the current one."""

from contextlib import contextmanager

import pytest
import torch

from rwkv_accel.ops import triton_device
from rwkv_accel.ops.elementwise import head_gate, relu_squared, shift_lerp, triton_common, wkv_inputs


def test_the_context_is_that_of_the_tensors_device(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device))
    triton_device.on_device(torch.device("cuda:1"))
    assert entered == [torch.device("cuda:1")]
    with triton_device.on_device(torch.device("cpu")):
        pass
    assert len(entered) == 1


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
