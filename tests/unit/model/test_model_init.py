"""Official initialisation: printed check values, orthogonality and gains, determinism, the file on disk."""

import pytest
import torch

from rwkv_accel.model.config import RWKV7Config, parameter_shapes
from rwkv_accel.model.init import generate_init_weight, init_state_dict
from rwkv_accel.model.io import load_model, read_checkpoint
from rwkv_accel.model.precision import Precision

FP32 = Precision.from_name("32-true")


@pytest.fixture(scope="module")
def official():
    """12 layers of 768 channels with a small vocabulary, below as one layer's worth of matrices where it can."""
    config = RWKV7Config.for_new_model(n_layer=12, n_embd=768, vocab_size=16)
    slim = RWKV7Config(**{**config.__dict__, "dim_ffn": 32, "decay_rank": 2, "gate_rank": 2, "iclr_rank": 2})
    return init_state_dict(slim, seed=0)


def test_printed_check_values(official):
    def at(name, *channels):
        return [official[name].flatten()[channel].item() for channel in channels]

    def near(*values):
        return pytest.approx(list(values), abs=1e-6)

    assert at("blocks.0.att.w0", 0, 1, 63, 64, 767) == near(-8.0, -7.835967, -2.507171, -7.499348, 3.0)
    assert at("blocks.5.att.w0", 63) == near(-2.931469)
    assert at("blocks.3.att.a0", 0, 1, 63, 767) == near(-0.69, -0.670733, -0.057145, 0.31)
    assert at("blocks.4.att.v0", 0, 767) == near(0.93, 0.53)
    assert at("blocks.2.att.k_k", 0, 767) == near(0.76, 0.66)
    assert at("blocks.0.att.x_r", 1) == at("blocks.0.att.x_g", 1) == near(0.735194)
    assert at("blocks.0.att.x_w", 1) == at("blocks.0.att.x_a", 1) == near(0.99747)
    assert at("blocks.0.att.x_k", 1) == at("blocks.0.att.x_v", 1) == near(0.990445)
    assert at("blocks.5.ffn.x_k", 1) == near(0.536652)
    assert [official[f"blocks.{i}.att.ln_x.weight"][7].item() for i in (0, 5, 11)] == near(0.17562, 0.615572, 1)
    assert official["blocks.7.att.k_a"].unique().tolist() == near(1.02)
    assert official["blocks.7.att.r_k"].unique().tolist() == near(-0.04)


def test_zero_and_one_parameters(official):
    for name in ("att.w1", "att.a1", "att.v1", "att.g1", "att.output.weight", "ffn.value.weight", "ln1.bias"):
        assert not official[f"blocks.1.{name}"].any(), name
    for name in ("blocks.0.ln0.weight", "blocks.1.ln1.weight", "blocks.1.ln2.weight", "ln_out.weight"):
        assert official[name].eq(1).all(), name


def _gain(matrix):
    """g when the shorter side of the matrix is orthogonal with norm g."""
    tall = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().T
    gram = tall.T @ tall
    gain = gram.diagonal().mean().sqrt().item()
    torch.testing.assert_close(gram, torch.eye(len(gram)).double() * gain**2, rtol=0, atol=1e-5 * gain**2)
    return gain


def test_orthogonal_gains():
    config = RWKV7Config.for_new_model(n_layer=2, n_embd=64, vocab_size=400, head_size=32)
    tensors = init_state_dict(config, seed=3)
    gains = {
        "att.receptance.weight": 1.0,
        "att.value.weight": 1.0,
        "att.key.weight": 0.1,
        "ffn.key.weight": 1.0,
        "att.w2": 0.1,
        "att.a2": 0.1,
        "att.v2": 0.1,
        "att.g2": 0.1,
    }
    for name, gain in gains.items():
        assert _gain(tensors[f"blocks.1.{name}"]) == pytest.approx(gain, rel=1e-4), name
    assert _gain(tensors["head.weight"]) == pytest.approx(0.5 * (400 / 64) ** 0.5, rel=1e-4)
    assert 0.9e-4 < tensors["emb.weight"].abs().max().item() <= 1e-4
    assert abs(tensors["emb.weight"].mean().item()) < 2e-6


def test_head_smaller_than_the_width_has_gain_one_half():
    config = RWKV7Config.for_new_model(n_layer=1, n_embd=64, vocab_size=10, head_size=32)
    assert _gain(init_state_dict(config, seed=0)["head.weight"]) == pytest.approx(0.5, rel=1e-4)


def test_one_layer_takes_the_values_of_a_first_layer():
    single = init_state_dict(RWKV7Config.for_new_model(1, 64, 10, 32), seed=0)
    double = init_state_dict(RWKV7Config.for_new_model(2, 64, 10, 32), seed=0)
    assert all(tensor.isfinite().all() for tensor in single.values())
    assert torch.equal(single["blocks.0.att.w0"], double["blocks.0.att.w0"])


def test_every_name_shape_and_dtype_and_the_seed():
    config = RWKV7Config.for_new_model(2, 64, 10, 32)
    first = init_state_dict(config, seed=5, dtype=torch.bfloat16)
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == parameter_shapes(config)
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    again, other = init_state_dict(config, 5, torch.bfloat16), init_state_dict(config, 6, torch.bfloat16)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("emb.weight", "head.weight", "blocks.1.att.key.weight", "blocks.0.att.w2"):
        assert not torch.equal(first[name], other[name]), name


def test_written_file_loads_and_starts_at_the_uniform_loss(tmp_path):
    config = RWKV7Config.for_new_model(2, 64, 50, 32)
    path = generate_init_weight(config, tmp_path / "new" / "rwkv-init.pth", seed=0, dtype=torch.bfloat16)
    assert [p.name for p in path.parent.iterdir()] == ["rwkv-init.pth"]
    assert read_checkpoint(path).config == config
    model = load_model(path, FP32, wkv_backend="reference")
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        loss = model(ids, (ids + 1) % 50).item() / ids.numel()
    # The head starts with orthogonal rows of gain 0.5: logits of about 0.5, so close to log V and not at it.
    assert loss == pytest.approx(torch.log(torch.tensor(50.0)).item(), abs=0.3)
