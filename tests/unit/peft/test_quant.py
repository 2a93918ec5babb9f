"""NF4 and int8 against bitsandbytes, bit for bit, and the layers that store their weight so."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_accel.peft import quant
from rwkv_accel.peft.base import Int8Linear, NF4Linear
from rwkv_accel.peft.quant import NF4_CODE, Quant, dequantize_nf4, pack, quantize_nf4, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes").functional


def random_weight(index: int) -> torch.Tensor:
    """Odd sizes, all dtypes, large and small scales, zero blocks, zero matrices."""
    generator = torch.Generator().manual_seed(index)
    rows, columns = (int(torch.randint(1, high, (), generator=generator)) for high in (90, 300))
    weight = torch.randn(rows, columns, generator=generator) * 10 ** float(torch.randn((), generator=generator))
    if index % 7 == 0:
        weight.view(-1)[: rows * columns // 2] = 0
    if index % 20 == 0:
        weight.zero_()
    return weight.to(DTYPES[index % 3])


def reference_dequantize(packed, absmax, shape, dtype, code):
    """By the definition: bitsandbytes' code table, high nibble first, one maximum per 64 values."""
    count = shape[0] * shape[1]
    nibbles = [n for byte in packed.view(-1).tolist() for n in (byte >> 4, byte & 15)][:count]
    values = code[torch.tensor(nibbles)] * absmax[torch.arange(count) // 64]
    return values.view(shape).to(dtype)


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_nf4_codes_absmax_and_values_equal_bitsandbytes(first, bnb):
    code = bnb.get_4bit_type("nf4", device="cpu")
    assert torch.equal(code, torch.tensor(NF4_CODE))
    for index in range(first, first + 20):
        weight = random_weight(index)
        expected_codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        codes, absmax = quantize_nf4(weight)
        assert torch.equal(codes, expected_codes), (index, weight.shape)
        assert torch.equal(absmax, state.absmax)
        for dtype in DTYPES:
            values = dequantize_nf4(codes, absmax, tuple(weight.shape), dtype)
            assert torch.equal(values, reference_dequantize(codes, absmax, weight.shape, dtype, code))
            if weight.shape[1] % 64 == 0:
                assert torch.equal(values, bnb.dequantize_4bit(codes, state).to(dtype))


@pytest.mark.parametrize("shape", [(3, 64), (17, 128), (65, 192)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_kernel_gives_the_same_bits(shape, dtype, bnb):
    codes, absmax = quantize_nf4(torch.randn(shape))
    by_kernel = quant.dequantize_by_bitsandbytes(codes, absmax, shape, dtype)
    assert torch.equal(by_kernel, dequantize_nf4(codes, absmax, shape, dtype))


def test_double_quantisation_follows_bitsandbytes(bnb):
    assert torch.equal(quant.dynamic_map(), bnb.create_dynamic_map())
    total = differing = 0
    for index in range(1, 20):
        weight = torch.randn(64, 40 * index + 1, generator=torch.Generator().manual_seed(index))
        _, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        absmax = quantize_nf4(weight)[1]
        codes, scales = quant.quantize_absmax(absmax)
        assert torch.equal(scales[:-1], state.state2.absmax)
        assert torch.equal(scales[-1], state.offset)
        # Its CPU kernel misses the nearest code when a value is within 1e-4 of the middle between two; ours never.
        total, differing = total + codes.numel(), differing + int((codes != state.absmax).sum())
        theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(quant.dequantize_absmax(state.absmax, scales), theirs)
        ours = quant.dequantize_absmax(codes, scales)
        assert ((ours - absmax).abs() <= (theirs - absmax).abs() + 1e-7).all()
    assert differing < total / 200


@pytest.mark.parametrize("index", range(1, 12))
def test_int8_codes_and_scales_equal_bitsandbytes(index, bnb):
    weight = random_weight(index).half()
    codes, absmax = quant.quantize_int8(weight)
    expected_codes, expected_absmax, _ = bnb.int8_vectorwise_quant(weight)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(absmax, expected_absmax)
    restored = quant.dequantize_int8(codes, absmax, torch.float32)
    assert ((restored - weight.float()).abs() <= absmax[:, None] / 254 * 1.001).all()


@pytest.mark.parametrize(
    ("layer", "bits"), [(NF4Linear(192, 80), 4.5), (NF4Linear(192, 80, double=True), 4.5), (Int8Linear(192, 80), 8.2)]
)
def test_layer_computes_with_the_stored_weight(layer, bits):
    weight = torch.randn(80, 192)
    layer.set_base(weight, torch.bfloat16)
    assert sum(p.numel() * p.element_size() for p in layer.parameters()) * 8 / weight.numel() <= bits
    x = torch.randn(2, 5, 192, requires_grad=True)
    reference = x.detach().clone().requires_grad_()
    dense = layer.base_weight(torch.float32)
    assert (dense - weight).norm() < 0.1 * weight.norm()
    out, expected = layer(x), F.linear(reference, dense)
    assert torch.allclose(out, expected, atol=1e-5)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    assert torch.allclose(x.grad, reference.grad, atol=1e-4)


def test_the_dense_weight_is_not_kept_for_the_backward():
    layer = NF4Linear(256, 256)
    layer.set_base(torch.randn(256, 256), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 256, requires_grad=True))
    assert sum(t.numel() * t.element_size() for t in kept) < 256 * 256


@pytest.mark.parametrize("kind", [Quant("nf4"), Quant("nf4", double=True), Quant("int8")])
def test_engines_that_cast_a_model_do_not_touch_the_scales(kind):
    weight = torch.randn(64, 64)
    stored = pack(weight, kind)
    cast = {name: t.bfloat16() if t.is_floating_point() else t for name, t in stored.items()}
    expected = unpack(stored, kind, (64, 64), torch.float32)
    assert torch.equal(unpack(cast, kind, (64, 64), torch.float32), expected)


def test_chunks_do_not_change_the_bits(monkeypatch):
    weight = torch.randn(37, 77)
    whole = [*quantize_nf4(weight), *quant.quantize_int8(weight)]
    values = dequantize_nf4(*whole[:2], (37, 77), torch.bfloat16)
    monkeypatch.setattr(quant, "CHUNK", 640)
    again = [*quantize_nf4(weight), *quant.quantize_int8(weight)]
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    assert torch.equal(dequantize_nf4(*again[:2], (37, 77), torch.bfloat16), values)


def test_short_last_block_is_right_at_the_borders_between_codes(bnb):
    """A short block is divided and not multiplied by a reciprocal, which shows only next to a border."""
    code = torch.tensor(NF4_CODE)
    borders = (code[:-1] + code[1:]) / 2
    for seed in range(50):
        row = torch.randn(1, 63, generator=torch.Generator().manual_seed(seed))
        row[0, 20] = largest = row.abs().max()
        row[0, :15] = borders * largest
        expected, _ = bnb.quantize_4bit(row, blocksize=64, quant_type="nf4")
        assert torch.equal(quantize_nf4(row)[0], expected)
