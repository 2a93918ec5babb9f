"""Where the kernels write: nothing outside of their results, every value of them, and beyond 2^31 values."""

import pytest
import torch

from rwkv_accel.ops.wkv7 import triton_op, wkv7
from rwkv_accel.ops.wkv7.pieces import Pieces
from tests.kernels.cases.test_wkv7_triton import allowed, typed
from tests.unit.ops.wkv7_cases import assert_close, make_inputs, results

GUARD = 4096
"""Values in front of and behind each piece of memory: more than a chunk's row of any test here."""
MARK = 12345.0


@pytest.fixture
def guarded(monkeypatch):
    """Every result and intermediate lies between guard bands and starts as NaN. Yields them, whole."""
    bands = []

    def empty(shape, dtype, device):
        count = torch.Size(shape).numel()
        whole = torch.full((count + 2 * GUARD,), MARK, dtype=dtype, device=device)
        inside = whole[GUARD:-GUARD].view(shape)
        inside.fill_(float("nan"))
        bands.append(whole)
        return inside

    monkeypatch.setattr(triton_op, "_empty", empty)
    return bands


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize(
    ("T", "N", "dtype"),
    [(1, 64, torch.bfloat16), (45, 32, torch.float32), (33, 128, torch.bfloat16), (20, 128, torch.float16)],
    ids=str,
)
def test_guard_bands_stay_and_all_within_is_written(T, N, dtype, cut, guarded, device, programs):
    programs(16 if cut else 1)
    inputs = typed(make_inputs(1, T, 2, N), dtype, device)
    found = results(wkv7, inputs, backend="triton")
    expected = results(wkv7, [x.cpu().double() for x in inputs], backend="reference")
    assert len(guarded) >= 14
    for whole in guarded:
        assert (whole[:GUARD] == torch.tensor(MARK, dtype=whole.dtype)).all()
        assert (whole[-GUARD:] == torch.tensor(MARK, dtype=whole.dtype)).all()
        assert not whole[GUARD:-GUARD].isnan().any()
    assert_close({name: x.cpu() for name, x in found.items()}, expected, allowed(dtype, device))


def test_inputs_are_left_alone(device):
    inputs = typed(make_inputs(1, 40, 1, 32), torch.bfloat16, device)
    before = [x.clone() for x in inputs]
    results(wkv7, inputs, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


@pytest.mark.long
def test_offsets_beyond_two_to_the_31(device, monkeypatch):
    """The last tokens of inputs with more than 2^31 values; the rest of them is memory that nobody touches."""
    if device.type == "cpu":
        # It would copy whole tensors back onto themselves.
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    heads, size, here = 2, 64, 40
    num_tokens = 2**31 // (heads * size) + here
    small = typed(make_inputs(1, here, heads, size), torch.bfloat16, device)
    large = []
    for x in small[:6]:
        whole = torch.empty(1, num_tokens, heads, size, dtype=x.dtype, device=device)
        whole[:, -here:] = x
        large.append(whole)
    large.append(small[6])
    first = num_tokens - here
    tables = [[[first, here, 0]], [[first, 32], [first + 32, here - 32]], [[0, 1]], [0]]
    plain = triton_op.choose_setup(device, torch.bfloat16, tuple(small[0].shape), None)
    setup = plain._replace(pieces=Pieces(*(torch.tensor(table, device=device) for table in tables)))
    d_out = torch.ones_like(small[3])

    def run(inputs, d_out, setup):
        out, final, extra = triton_op.run_forward(inputs, small[7], setup, True)
        *grads, d_state = triton_op.run_backward(inputs, d_out, final, extra, setup)
        return [x[:, -here:] for x in (out, *grads[:6])] + [grads[6], final, d_state]

    whole = torch.empty_like(large[3])
    whole[:, -here:] = d_out
    assert plain.config.chunk_size == 32
    for one, two in zip(run(small[:7], d_out, plain), run(large, whole, setup)):
        assert torch.equal(one, two)
