"""RWKV7State: rows in, rows out, and the official flat order."""

import pytest
import torch

from rwkv_accel.model.state import RWKV7State


@pytest.fixture
def state(tiny_config):
    """Three rows; row b of every tensor holds b + 1, plus a tenth per layer."""
    zeros = RWKV7State.zeros(tiny_config, 3)
    for layer in range(tiny_config.n_layer):
        for group in (zeros.att_shift, zeros.wkv, zeros.ffn_shift):
            rows = torch.arange(1.0, 4.0).view(-1, *[1] * (group[layer].dim() - 1))
            group[layer] = group[layer] + rows + layer / 10
    return zeros


def test_zeros(tiny_config):
    state = RWKV7State.zeros(tiny_config, 2, dtype=torch.bfloat16)
    assert state.batch_size == 2
    assert [t.shape for t in state.layer(2)] == [(2, 64), (2, 2, 32, 32), (2, 64)]
    assert [t.dtype for t in state.layer(0)] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert RWKV7State.zeros(tiny_config, 1, dtype=torch.float64).wkv[0].dtype == torch.float64
    assert len(state.att_shift) == len(state.wkv) == len(state.ffn_shift) == 3
    assert not any(t.any() for i in range(3) for t in state.layer(i))


def test_select_repeats_and_reorders_rows_into_new_memory(state):
    chosen = state.select([2, 0, 2])
    assert chosen.att_shift[0][:, 5].tolist() == pytest.approx([3, 1, 3])
    assert chosen.wkv[1][:, 1, 7, 9].tolist() == pytest.approx([3.1, 1.1, 3.1])
    chosen.wkv[0].zero_()
    assert state.wkv[0].min() == 1
    assert state.select(torch.tensor([1])).ffn_shift[2][0, 0].item() == pytest.approx(2.2)


def test_cat_undoes_select(state):
    joined = RWKV7State.cat([state.select([0]), state.select([1, 2])])
    for layer in range(3):
        assert all(torch.equal(a, b) for a, b in zip(joined.layer(layer), state.layer(layer)))


def test_flat_list_has_the_official_order(state):
    flat = state.to_flat(row=1)
    assert [t.shape for t in flat[:3]] == [(64,), (2, 32, 32), (64,)]
    assert len(flat) == 9
    assert torch.equal(flat[7], state.wkv[2][1])
    assert torch.equal(flat[5], state.ffn_shift[1][1])
    back = RWKV7State.from_flat(flat)
    assert all(torch.equal(a, b[1:2]) for i in range(3) for a, b in zip(back.layer(i), state.layer(i)))
    with pytest.raises(ValueError, match="3 tensors per layer, got 8"):
        RWKV7State.from_flat(flat[:8])


def test_clone_and_detach(state):
    state.wkv[0].requires_grad_(True)
    grown = state.clone()
    assert grown.wkv[0].requires_grad
    assert not grown.detach().wkv[0].requires_grad
    grown.att_shift[1].zero_()
    assert state.att_shift[1].any()
    assert state.to("cpu").wkv[1].device.type == "cpu"
