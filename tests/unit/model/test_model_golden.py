"""A model of sines in fp64 against printed numbers that another implementation of the formulas produced."""

import math

import pytest
import torch

from rwkv_accel.model.config import RWKV7Config, parameter_shapes
from rwkv_accel.model.rwkv7 import RWKV7

CONFIG = RWKV7Config(
    vocab_size=8,
    n_embd=128,
    n_layer=2,
    head_size=64,
    dim_ffn=512,
    decay_rank=8,
    iclr_rank=8,
    value_rank=8,
    gate_rank=8,
)
IDS = torch.tensor([[1, 5, 2, 7, 0, 3]])
LABELS = torch.tensor([[5, 2, 7, 0, 3, 4]])
LOGITS_0 = (-7.396894, -7.970916, 8.426169, 6.882855, -9.314944, -5.680027, 10.048400, 4.382488)
LOGITS_5 = (2.614884, 3.393200, -3.053044, -2.998964, 3.440297, 2.554722, -3.770186, -2.067882)
GRADIENT_NORMS = {
    "emb.weight": 3.42815553e-1,
    "blocks.0.att.a1": 1.44181494e-1,
    "blocks.0.att.r_k": 2.12920601,
    "blocks.0.att.k_a": 1.24446317e-1,
    "blocks.1.att.v2": 2.68902346e-1,
    "blocks.1.ffn.key.weight": 33.2359103,
    "blocks.0.att.w0": 2.79036254e-5,
}


def _names():
    names = ["emb.weight", "ln_out.weight", "ln_out.bias", "head.weight"]
    for layer in range(2):
        norms = (["ln0"] if layer == 0 else []) + ["ln1", "ln2"]
        names += [f"blocks.{layer}.{norm}.{kind}" for norm in norms for kind in ("weight", "bias")]
        att = ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "w1", "w2", "a0", "a1", "a2"]
        att += (["v0", "v1", "v2"] if layer else []) + ["g1", "g2", "k_k", "k_a", "r_k"]
        att += [f"{part}.weight" for part in ("receptance", "key", "value", "output", "ln_x")] + ["ln_x.bias"]
        names += [f"blocks.{layer}.att.{name}" for name in att]
        names += [f"blocks.{layer}.ffn.{name}" for name in ("x_k", "key.weight", "value.weight")]
    return names


def _value(name, shape, position):
    s = torch.sin(0.7 * torch.arange(math.prod(shape), dtype=torch.float64) + 1.3 * position).view(shape)
    last = name.rpartition(".")[2]
    if last == "bias":
        return 0.1 * s
    if ".ln" in f".{name}":
        return 1 + 0.2 * s
    scaled = {"w0": -2 + 2 * s, "a0": 0.5 * s, "v0": 0.5 * s, "r_k": 0.1 * s, "k_k": 0.8 + 0.3 * s}
    scaled["k_a"] = scaled["k_k"]
    if last in scaled:
        return scaled[last]
    if last.startswith("x_"):
        return 0.5 + 0.5 * s
    if last[1:] in ("1", "2"):
        return 0.2 * s
    return s if name == "emb.weight" else 1.5 * s / math.sqrt(shape[-1])


@pytest.fixture(scope="module")
def tensors():
    shapes = parameter_shapes(CONFIG)
    names = _names()
    assert len(names) == 69
    assert set(names) == set(shapes)
    return {name: _value(name, shapes[name], position) for position, name in enumerate(names)}


@pytest.fixture(params=["reference", "chunked"])
def model(request, tensors):
    model = RWKV7(CONFIG, compute_dtype=torch.float64, wkv_backend=request.param).double()
    model.load_state_dict(tensors)
    model.l2wrap = 0.0
    return model


def printed(value, digits):
    """A number printed with `digits` significant digits is right to half a unit of the last one."""
    return pytest.approx(value, rel=0.51 * 10.0 ** (1 - digits))


def test_the_vector_itself(tensors):
    assert tensors["blocks.1.att.w0"].flatten()[:2].tolist() == [
        printed(-2.21903891, 9),
        printed(-3.44821518, 9),
    ]
    assert tensors["blocks.0.att.key.weight"][0, 0].item() == printed(-0.12771942, 8)


def test_logits_and_states(model):
    logits_BTV, state = model(IDS, return_state=True)
    assert logits_BTV[0, 0].tolist() == pytest.approx(LOGITS_0, abs=5.1e-7)
    assert logits_BTV[0, 5].tolist() == pytest.approx(LOGITS_5, abs=5.1e-7)
    wkv_0, wkv_1 = (wkv[0] for wkv in state.wkv)
    assert wkv_0.sum().item() == pytest.approx(99.576927, abs=5.1e-7)
    assert wkv_0.abs().sum().item() == pytest.approx(323486.051593, abs=5.1e-7)
    assert wkv_0[0, 1, 2].item() == pytest.approx(28.88530450, abs=5.1e-9)
    assert wkv_0[0, 2, 1].item() == pytest.approx(-31.48156687, abs=5.1e-9)
    assert wkv_1.sum().item() == pytest.approx(-197.847845, abs=5.1e-7)
    assert wkv_1[0, 1, 2].item() == pytest.approx(34.95211077, abs=5.1e-9)
    assert wkv_1[0, 2, 1].item() == pytest.approx(-64.08346944, abs=5.1e-9)


def test_loss_and_gradient_norms(model):
    loss = model(IDS, LABELS) / LABELS.numel()
    assert loss.item() == pytest.approx(5.1419690402, abs=5.1e-11)
    loss.backward()
    norms = {name: model.get_parameter(name).grad.norm().item() for name in GRADIENT_NORMS}
    assert norms == {name: printed(value, 9) for name, value in GRADIENT_NORMS.items()}
