"""WKV-7 as an operator of torch's dispatcher is the same function, and keeps the dispatcher's contract."""

import pytest
import torch

from rwkv_accel.ops.wkv7 import available_backends, opaque, wkv7
from tests.unit.ops.wkv7_cases import make_inputs, results


def opaque_wkv7(*inputs, state, cu_seqlens=None, backend):
    return opaque.wkv7_opaque(inputs, state, cu_seqlens, backend)


BACKENDS = [name for name in available_backends("cpu", 16) if name not in ("reference", "triton")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("borders", [None, [0, 33, 34, 50]], ids=str)
def test_the_operator_is_the_function(borders, backend):
    *inputs, state = make_inputs(1, 50, 2, 16, dtype=torch.float32)
    borders = None if borders is None else torch.tensor(borders)
    given = [*inputs, state if borders is None else state.repeat(3, 1, 1, 1)]
    expected = results(wkv7, given, cu_seqlens=borders, backend=backend)
    found = results(opaque_wkv7, given, cu_seqlens=borders, backend=backend)
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dispatchers_contract(backend):
    """No aliases, no hidden writes, right shapes without data."""
    *inputs, state = [x.requires_grad_() for x in make_inputs(1, 20, 1, 16, dtype=torch.float32)]
    torch.library.opcheck(opaque._forward, (inputs, state, None, backend, True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [(0,), (1, 7), (6,), (2, 3, 4, 5)], ids=str)
def test_gradients_of_nothing_but_what_asks_for_them(trained, backend):
    inputs = make_inputs(1, 20, 1, 16, dtype=torch.float32)
    *inputs, state = [x.requires_grad_(i in trained) for i, x in enumerate(inputs)]
    out, final, _ = opaque._forward(inputs, state, None, backend, True)
    (out.sum() + final.sum()).backward()
    assert [i for i, x in enumerate([*inputs, state]) if x.grad is not None] == list(trained)


def test_nothing_is_kept_without_gradients():
    inputs = make_inputs(1, 20, 1, 16, dtype=torch.float32)
    assert opaque._forward(inputs[:7], inputs[7], None, "auto", False)[2] == []


def test_bad_inputs_are_named():
    inputs = make_inputs(1, 20, 1, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match="end at the number of tokens 20, got 19"):
        opaque_wkv7(*inputs[:7], state=None, cu_seqlens=torch.tensor([0, 19]), backend="auto")
