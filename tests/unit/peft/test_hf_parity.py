"""Layers against HF peft's own, given the same tensors; exported folders loaded by HF peft."""

import pytest
import torch
from torch import nn

from rwkv_accel.config.schema import ModelConfig, PeftConfig
from rwkv_accel.peft.apply import adapter_buffers, adapter_parameters, load_model_and_apply_peft
from rwkv_accel.peft.base import AdapterSpec
from rwkv_accel.peft.dora import DoraLinear
from rwkv_accel.peft.hf_peft import read_hf_peft, write_hf_peft
from rwkv_accel.peft.linear import LoraLinear, PissaLinear
from rwkv_accel.peft.miss import MissLinear
from rwkv_accel.peft.plan import make_plan

hf = pytest.importorskip("peft")
IN, OUT = 48, 80

LAYERS = {
    "lora": (LoraLinear, AdapterSpec(8, 12.0), lambda: hf.LoraConfig(r=8, lora_alpha=12)),
    "rslora": (
        LoraLinear,
        AdapterSpec(8, 12.0, rslora=True),
        lambda: hf.LoraConfig(r=8, lora_alpha=12, use_rslora=True),
    ),
    "dora": (DoraLinear, AdapterSpec(8, 12.0), lambda: hf.LoraConfig(r=8, lora_alpha=12, use_dora=True)),
    "miss": (MissLinear, AdapterSpec(8), lambda: hf.MissConfig(r=8)),
    "miss uneven": (MissLinear, AdapterSpec(7), lambda: hf.MissConfig(r=7)),
    "miss bat": (MissLinear, AdapterSpec(8, variant="bat"), lambda: hf.MissConfig(r=8, init_weights="bat")),
}
THEIR_NAMES = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight", "miss_D": "miss_block.default"}


def theirs_for(config, weight):
    model = nn.ModuleDict({"key": nn.Linear(IN, OUT, bias=False)})
    model["key"].weight.data = weight.clone()
    config.target_modules = ["key"]
    return hf.get_peft_model(model, config).base_model.model["key"]


@pytest.mark.parametrize("case", LAYERS)
def test_layer_equals_hf_peft(case):
    layer_class, spec, make_config = LAYERS[case]
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN)
    ours, theirs = layer_class(IN, OUT, spec), theirs_for(make_config(), weight)
    ours.set_up(weight, torch.float32, torch.float32, 0, "key")
    named = dict(theirs.named_parameters())
    magnitude = next((name for name in named if "magnitude" in name), None)
    pairs = {name: named[magnitude if name == "lora_m" else THEIR_NAMES[name]] for name in ours.adapter_names}
    with torch.no_grad():
        for name, other in pairs.items():
            param = getattr(ours, name)
            assert param.shape == other.shape
            param += 0.3 * torch.randn(param.shape)
            other.copy_(param)
    x = torch.randn(3, 5, IN, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = ours(x), theirs(y)
    scale = expected.abs().max()
    assert (out - expected).abs().max() < 1e-5 * scale
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    assert (x.grad - y.grad).abs().max() < 1e-5 * y.grad.abs().max()
    for name, other in pairs.items():
        assert (getattr(ours, name).grad - other.grad).abs().max() < 1e-5 * other.grad.abs().max(), name
    theirs.merge()
    assert (ours.merged_weight() - theirs.base_layer.weight).abs().max() < 1e-5 * weight.abs().max()


def test_pissa_starts_like_hf_peft():
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN)
    ours = PissaLinear(IN, OUT, AdapterSpec(8, 12.0))
    ours.set_up(weight, torch.float32, torch.float32, 0, "key")
    theirs = theirs_for(hf.LoraConfig(r=8, lora_alpha=12, init_lora_weights="pissa"), weight)
    # Singular vectors have a free sign; the product and the residual have not.
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    assert (ours.lora_B @ ours.lora_A - product).abs().max() < 1e-5 * product.abs().max()
    assert (ours.weight - theirs.base_layer.weight).abs().max() < 1e-5


def test_fast_svd_is_close_to_the_exact_one():
    torch.manual_seed(0)
    # A spectrum that falls, as trained matrices have; niter 0 would be visibly worse on it.
    left, right = torch.linalg.qr(torch.randn(OUT, IN))[0], torch.linalg.qr(torch.randn(IN, IN))[0]
    weight = left @ torch.diag(0.8 ** torch.arange(IN)) @ right.T
    residuals = {}
    for niter in (None, 0, 8):
        layer = PissaLinear(IN, OUT, AdapterSpec(8, svd_niter=niter))
        layer.set_up(weight, torch.float32, torch.float32, 0, "key")
        residuals[niter] = float(layer.weight.detach().norm())
    assert residuals[8] < 1.001 * residuals[None]
    assert residuals[0] > 1.01 * residuals[None]


EXPORTS = {
    "lora": {"method": "lora", "alpha": 16},
    "rslora": {"method": "lora", "alpha": 16, "rslora": True},
    "no alpha, ranks": {"method": "lora", "rank_pattern": {"att.key": 4, "blocks.1.ffn.value": 16}},
    "alpha, ranks": {"method": "dora", "alpha": 16, "rank_pattern": {"att.key": 4, "blocks.1.ffn.value": 16}},
    "dora": {"method": "dora", "alpha": 16},
    "pissa": {"method": "pissa"},
    "pissa rslora": {"method": "pissa", "alpha": 16, "rslora": True, "rank_pattern": {"att.key": 4}},
    "miss": {"method": "miss"},
    "miss bat": {"method": "miss", "miss_variant": "bat"},
}


@pytest.mark.parametrize("names", ["official", "fla"])
@pytest.mark.parametrize("case", EXPORTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_exported_folder_loads_in_hf_peft_and_back_here(case, names, base, ids_BT, tmp_path):
    peft = PeftConfig.model_validate({"rank": 8, "targets": ["att.key", "ffn.value"]} | EXPORTS[case])
    model = load_model_and_apply_peft(ModelConfig(path=str(base)), peft)
    with torch.no_grad():
        for param in adapter_parameters(model).values():
            param += 0.1 * torch.randn_like(param)
    tensors = {name: t.detach() for name, t in {**adapter_parameters(model), **adapter_buffers(model)}.items()}
    plan = make_plan(model.config, peft)
    write_hf_peft(tmp_path / "hf", peft, plan.adapters, tensors, names=names, base="base.pth")
    with torch.no_grad():
        expected = model(ids_BT)

    section, again = read_hf_peft(tmp_path / "hf")
    reread = load_model_and_apply_peft(ModelConfig(path=str(base)), section)
    with torch.no_grad():
        for name, param in adapter_parameters(reread).items():
            param.copy_(again[name])
        assert (reread(ids_BT) - expected).abs().max() < 2e-5 * expected.abs().max()

    if names == "official":
        bare = load_model_and_apply_peft(ModelConfig(path=str(base)), PeftConfig(method="parts", train_parts=("ln",)))
        theirs = hf.PeftModel.from_pretrained(bare, str(tmp_path / "hf"))
        with torch.no_grad():
            assert (theirs.base_model.model(ids_BT) - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_folder_saved_by_hf_peft_is_read(base, ids_BT, tmp_path):
    bare = load_model_and_apply_peft(ModelConfig(path=str(base)), PeftConfig(method="parts", train_parts=("ln",)))
    config = hf.LoraConfig(
        r=4, lora_alpha=8, use_dora=True, target_modules=["key", "receptance"], alpha_pattern={"ffn.key": 2}
    )
    theirs = hf.get_peft_model(bare, config)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "lora_" in name:
                param += 0.1 * torch.randn_like(param)
        expected = theirs.base_model.model(ids_BT)
    theirs.save_pretrained(str(tmp_path / "hf"))
    section, _ = read_hf_peft(tmp_path / "hf")
    assert (section.method, section.rank, section.alpha) == ("dora", 4, 8)
    assert sorted(section.targets) == sorted(
        f"blocks.{block}.{name}" for block in (0, 1) for name in ("att.receptance", "att.key", "ffn.key")
    )
    ours = load_model_and_apply_peft(
        ModelConfig(path=str(base)), section.model_copy(update={"load_path": str(tmp_path / "hf")})
    )
    with torch.no_grad():
        assert (ours(ids_BT) - expected).abs().max() < 2e-5 * expected.abs().max()
