"""A packed batch of the loader through the model: as if each document had been run alone."""

import pytest
import torch

from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.init import init_state_dict
from rwkv_accel.model.rwkv7 import RWKV7
from tests.helpers import needs_compiler

from .conftest import make_loader

CHAT = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes"}]
RECORDS = [{"text": "a"}, {"text": "twenty-one characters"}, {"messages": CHAT}, {"text": "x" * 40}, {"text": "bcd"}]


def make_model(backend, dtype):
    config = RWKV7Config.for_new_model(2, 64, 257, 32)
    generator = torch.Generator().manual_seed(0)
    # The official init has zero matrices, through which nothing could leak.
    weights = {
        name: tensor.to(dtype) + 0.05 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, tensor in init_state_dict(config, 0).items()
    }
    model = RWKV7(config).to(dtype)
    model.load_state_dict(weights)
    model.compute_dtype, model.wkv_backend = dtype, backend
    return model


BACKENDS = [
    ("reference", torch.float64, 1e-9),
    ("reference", torch.float32, 1e-5),
    ("chunked", torch.float64, 1e-9),
    ("chunked", torch.float32, 1e-5),
    pytest.param("native", torch.float32, 1e-5, marks=needs_compiler),
]


def loss_and_gradients(model, batches):
    model.zero_grad(set_to_none=True)
    total = sum(model(b.ids_BT, b.labels_BT, cu_seqlens=b.cu_seqlens) for b in batches)
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def batches_of(path, **settings):
    loader = make_loader(path, ctx_len=64, shuffle=False, **settings)
    return [b for w in loader.windows(0, 0) for b in w.batches]


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
def test_loss_and_gradients(write_jsonl, backend, dtype, tolerance):
    path = write_jsonl(RECORDS)
    packed = batches_of(path, trainer={"micro_batch_size": 8})
    separate = batches_of(path, packing="pad")
    assert (len(packed), len(separate)) == (1, 5)
    model = make_model(backend, dtype)
    want_loss, want = loss_and_gradients(model, separate)
    loss, gradients = loss_and_gradients(model, packed)
    assert abs(loss - want_loss) / want_loss < tolerance
    assert set(gradients) == set(want)
    for name, gradient in gradients.items():
        error = (gradient - want[name]).norm() / want[name].norm().clamp_min(1e-12)
        assert error < tolerance, name


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
def test_logits(write_jsonl, backend, dtype, tolerance):
    path = write_jsonl(RECORDS)
    (packed,) = batches_of(path, trainer={"micro_batch_size": 8})
    model = make_model(backend, dtype)
    with torch.no_grad():
        together = model(packed.ids_BT, cu_seqlens=packed.cu_seqlens)[0]
        alone = torch.cat([model(b.ids_BT)[0] for b in batches_of(path, packing="pad")])
        leaking = model(packed.ids_BT)[0]
    assert (together - alone).norm() / alone.norm() < tolerance
    assert (leaking - alone).abs().max() > 1e-3
