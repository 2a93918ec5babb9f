"""The Triton form of the elementwise ops against the plain formulas in fp64: values, all gradients, memory."""

import pytest
import torch

from rwkv_accel.ops.elementwise import triton_common, triton_gate, triton_inputs, triton_relu, triton_shift
from tests.unit.ops.elementwise_cases import CASES, results

# Rounded once: half a unit in the last place of each dtype, and some for the outer gradients' products in fp32.
TOLERANCE = {torch.float32: 5e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}
GUARD = 2048
MARK = 12345.0
MODULES = (triton_gate, triton_inputs, triton_relu, triton_shift)


@pytest.fixture(autouse=True)
def few_tiles_per_program(monkeypatch):
    """The interpreter takes its time for every tile, also for those behind the last token."""
    for module in MODULES:
        monkeypatch.setattr(module, "SUM_STEPS", 2, raising=False)


def sizes_of(name, head_size=32, T=21):
    """More tokens than tiles hold, and channels that are no multiple of a block where any number is allowed."""
    if name.startswith("shift"):
        return {"T": T, "C": 140}
    return {"shape": (3, 5, 97)} if name == "relu_squared" else {"N": head_size, "T": T, "H": 2}


def check(name, dtype, device, needed=None, **sizes):
    op, plain, inputs = CASES[name](dtype=dtype, device=device, **sizes)
    for index, x in enumerate(inputs):
        x.requires_grad_(needed is None or index in needed)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    found, expected = results(op("triton"), inputs), results(plain, exact)
    tolerance = TOLERANCE[dtype]
    if device.type == "cuda":
        tolerance = max(tolerance, 2e-6)  # its exponentials, roots and divisions are a few units off
    for got, want in zip(found, expected, strict=True):
        assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtype, device):
    check(name, dtype, device, **sizes_of(name))


@pytest.mark.parametrize("head_size", [16, 64, 128])
@pytest.mark.parametrize("name", ["wkv_inputs", "head_gate"])
def test_head_sizes(name, head_size, device):
    check(name, torch.float32, device, **sizes_of(name, head_size))


@pytest.mark.parametrize(("name", "vectors"), [("wkv_inputs", 5), ("head_gate", 5), ("shift_lerp packed", 1)])
def test_frozen_vectors(name, vectors, device):
    check(name, torch.float32, device, needed=range(vectors), **sizes_of(name))


@pytest.mark.parametrize("T", [1, 16, 17, 70])
def test_lengths(T, device):
    for name in ("shift_lerp carried", "wkv_inputs", "head_gate"):
        check(name, torch.float32, device, **sizes_of(name, T=T))


@pytest.mark.parametrize("name", CASES)
def test_strided_and_expanded_inputs(name, device):
    op, _, inputs = CASES[name](dtype=torch.float32, device=device, **sizes_of(name, 16, 5))
    spread = [x.detach()[:1].expand_as(x) if x.dim() == 1 else x.detach() for x in inputs]
    dense = [x.contiguous().requires_grad_() for x in spread]
    strided = [x if x.dim() == 1 else x.mT.contiguous().mT for x in spread]
    assert not any(x.is_contiguous() for x in strided)
    for got, want in zip(*(results(op("triton"), given) for given in ([x.requires_grad_() for x in strided], dense))):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", CASES)
def test_guard_bands_stay_and_all_within_is_written(name, device, monkeypatch):
    bands = []

    def guarded(x, dtype=None):
        count = x.numel()
        whole = torch.full((count + 2 * GUARD,), MARK, dtype=dtype or x.dtype, device=x.device)
        inside = whole[GUARD : GUARD + count].view(x.shape)
        inside.fill_(float("nan"))
        bands.append(whole)
        return inside

    for module in MODULES:
        monkeypatch.setattr(module, "empty_like", guarded)
        if hasattr(module, "empty_sums"):
            sums = lambda blocks, values, like: guarded(torch.empty(blocks, values, device=like.device))  # noqa: E731
            monkeypatch.setattr(module, "empty_sums", sums)
    check(name, torch.float32, device, **sizes_of(name))
    assert len(bands) >= 2
    for whole in bands:
        assert (whole[:GUARD] == MARK).all()
        assert (whole[-GUARD:] == MARK).all()
        assert not whole[GUARD:-GUARD].isnan().any()


def test_head_sizes_that_are_no_power_of_two_are_refused(device):
    with pytest.raises(ValueError, match="head sizes 16, 32, 64, 128 and 256, got 48"):
        triton_common.head_tile(48)
