"""One table of methods drives the contract that every one of them keeps, on dense, NF4 and int8 bases."""

import pytest
import torch

from rwkv_accel.config.schema import ModelConfig, PeftConfig
from rwkv_accel.errors import UserError
from rwkv_accel.model.io import build_model, read_checkpoint
from rwkv_accel.model.precision import Precision
from rwkv_accel.peft.adapter_file import AdapterMeta, peft_section, save_adapter
from rwkv_accel.peft.apply import (
    adapter_buffers,
    adapter_parameters,
    load_adapter,
    load_model_and_apply_peft,
)
from rwkv_accel.peft.merge import Loaded, merged_tensors

LAYERS = [f"blocks.{b}.{n}" for b in (0, 1) for n in ("att.key", "att.output", "ffn.key", "ffn.value")]
TARGETS = ("att.key", "att.output", "ffn.key", "ffn.value")
LOW_RANK = {f"{layer}.{name}" for layer in LAYERS for name in ("lora_A", "lora_B")}
STATES = {f"blocks.{b}.att.time_state" for b in (0, 1)}
NORMS = {f"blocks.{b}.{n}.{w}" for b in (0, 1) for n in ("ln1", "ln2", "att.ln_x") for w in ("weight", "bias")}
NORMS |= {f"{n}.{w}" for n in ("blocks.0.ln0", "ln_out") for w in ("weight", "bias")}

# name -> (peft section, names of everything that trains)
METHODS = {
    "lora": ({"method": "lora", "alpha": 16}, LOW_RANK),
    "rslora": ({"method": "lora", "alpha": 16, "rslora": True}, LOW_RANK),
    "dora": ({"method": "dora", "alpha": 16}, LOW_RANK | {f"{layer}.lora_m" for layer in LAYERS}),
    "pissa": ({"method": "pissa"}, LOW_RANK),
    "pissa alpha": ({"method": "pissa", "alpha": 4, "rslora": True}, LOW_RANK),
    "pissa fast": ({"method": "pissa", "svd_niter": 4}, LOW_RANK),
    "miss": ({"method": "miss"}, {f"{layer}.miss_D" for layer in LAYERS}),
    "miss uneven": ({"method": "miss", "rank": 7}, {f"{layer}.miss_D" for layer in LAYERS}),
    "miss bat": ({"method": "miss", "miss_variant": "bat"}, {f"{layer}.miss_D" for layer in LAYERS}),
    "miss bat_in": ({"method": "miss", "miss_variant": "bat_in"}, {f"{layer}.miss_D" for layer in LAYERS}),
    "state": ({"method": "state"}, STATES),
    "parts": ({"method": "parts", "train_parts": ["ln", "head"]}, NORMS | {"head.weight"}),
    "lora + state": ({"method": "lora", "train_state": True}, LOW_RANK | STATES),
    "lora + ln": ({"method": "lora", "train_parts": ["ln"]}, LOW_RANK | NORMS),
    "rank pattern": ({"method": "lora", "alpha": 16, "rank_pattern": {"ffn.key": 2, "blocks.1.att.*": 16}}, LOW_RANK),
}
BASES = {
    "fp32": {},
    "nf4": {"base_quant": "nf4"},
    "nf4 double": {"base_quant": "nf4", "double_quant": True},
    "int8": {"base_quant": "int8"},
}

every = pytest.mark.parametrize("case", METHODS)
on_all = pytest.mark.parametrize(
    ("case", "stored"),
    [(case, "fp32") for case in METHODS]
    + [
        (case, stored)
        for case in ("lora", "dora", "pissa", "miss", "miss bat", "lora + state")
        for stored in ("nf4", "int8")
    ]
    + [("lora", "nf4 double")],
)


def section(case, stored="fp32", **more):
    own = dict(METHODS[case][0])
    if own["method"] in ("lora", "dora", "pissa", "miss"):
        own = {"rank": 8, "targets": TARGETS} | own
    return PeftConfig.model_validate(own | BASES[stored] | more)


def build(base, peft, seed=3):
    return load_model_and_apply_peft(ModelConfig(path=str(base)), peft, seed=seed)


def bare(base, stored):
    """The base as it is stored, without any adapter."""
    peft = PeftConfig(method="parts", train_parts=("ln",), **BASES[stored])
    return build(base, peft)


@torch.no_grad()
def disturb(model, seed=11):
    generator = torch.Generator().manual_seed(seed)
    for param in adapter_parameters(model).values():
        param += 0.05 * torch.randn(param.shape, generator=generator)
    return model


def tensors_of(model):
    return {**adapter_parameters(model), **adapter_buffers(model)}


@on_all
def test_starts_as_the_base(case, stored, base, ids_BT):
    model, reference = build(base, section(case, stored)), bare(base, stored)
    logits, expected = model(ids_BT), reference(ids_BT)
    if "pissa" not in case:
        assert torch.equal(logits, expected)
    elif stored == "fp32":
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    else:
        # QPiSSA: the residual is easier to quantise than W, so the start is nearer to the unquantised base.
        whole = bare(base, "fp32")(ids_BT)
        assert (logits - whole).norm() < (expected - whole).norm()


@on_all
def test_only_the_declared_parameters_train(case, stored, base, ids_BT):
    model = disturb(build(base, section(case, stored)))
    declared = METHODS[case][1]
    assert set(adapter_parameters(model)) == declared
    model(ids_BT, ids_BT.roll(-1, 1)).backward()
    received = {name for name, param in model.named_parameters() if param.grad is not None}
    assert received == declared
    assert all(param.grad.isfinite().all() and param.grad.any() for param in adapter_parameters(model).values())


@on_all
def test_merged_weights_equal_the_running_adapter(case, stored, base, ids_BT):
    peft = section(case, stored)
    model = disturb(build(base, peft)).eval()
    checkpoint = read_checkpoint(base)
    saved = {name: tensor.detach() for name, tensor in tensors_of(model).items()}
    loaded = Loaded(AdapterMeta(peft_section(peft), ""), saved, checkpoint.config)
    merged = build_model(
        checkpoint.config, dict(merged_tensors(checkpoint, [loaded], None)), Precision.from_name("32-true")
    )
    with torch.no_grad():
        logits, expected = merged(ids_BT), model(ids_BT)
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()
    # and it is not the base by accident
    assert (expected - bare(base, stored)(ids_BT)).abs().max() > 1e-2 * expected.abs().max()


@on_all
def test_saved_and_loaded_is_bit_equal(case, stored, base, base_digest, ids_BT, tmp_path):
    peft = section(case, stored)
    model = disturb(build(base, peft))
    folder = save_adapter(tmp_path / "adapter", tensors_of(model), AdapterMeta(peft_section(peft), base_digest))
    # Another seed: whatever the file lacks would differ.
    again = build(base, peft.model_copy(update={"load_path": str(folder)}), seed=99)
    assert torch.equal(again(ids_BT), model(ids_BT))
    assert {name: p.requires_grad for name, p in again.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }


@every
def test_another_base_is_refused(case, base, tmp_path):
    peft = section(case)
    model = build(base, peft)
    meta = AdapterMeta(peft_section(peft), "sha256:" + "0" * 64)
    folder = save_adapter(tmp_path / "adapter", tensors_of(model), meta)
    with pytest.raises(UserError, match="trained on another base"):
        build(base, peft.model_copy(update={"load_path": str(folder)}))
    with pytest.raises(UserError, match="trained on another base"):
        load_adapter(model, folder, base_digest="sha256:1")


@every
def test_start_depends_on_seed_and_name_only(case, base):
    torch.manual_seed(1)
    first = tensors_of(build(base, section(case), seed=3))
    torch.manual_seed(2)
    second = tensors_of(build(base, section(case), seed=3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    if case in ("lora", "dora"):
        other = tensors_of(build(base, section(case), seed=4))
        name = "blocks.0.att.key.lora_A"
        assert not torch.equal(first[name], other[name])
        assert not torch.equal(first[name], first["blocks.1.att.key.lora_A"])
        fewer = build(base, section(case, targets=["blocks.1.att.key"]), seed=3)
        assert torch.equal(fewer.get_parameter("blocks.1.att.key.lora_A"), first["blocks.1.att.key.lora_A"])


@every
def test_thirty_steps_lower_the_loss(case, base, ids_BT):
    model = build(base, section(case))
    rates = {"time_state": 1.0}
    groups = [
        {"params": [param], "lr": rates.get(name.rsplit(".", 1)[-1], 5e-3)}
        for name, param in adapter_parameters(model).items()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    ids_BT = ids_BT[:1, :9]
    losses = []
    for _ in range(30):
        loss = model(ids_BT[:, :-1], ids_BT[:, 1:]) / 8
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@every
def test_dtypes_follow_the_precision(case, precision, base, ids_BT):
    dtypes = Precision.from_name(precision)
    model = load_model_and_apply_peft(ModelConfig(path=str(base)), section(case), precision=dtypes)
    for name, param in model.named_parameters():
        if param.is_floating_point():
            assert param.dtype == (dtypes.trainable if param.requires_grad else dtypes.frozen), name
    logits, expected = model(ids_BT), bare(base, "fp32")(ids_BT)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() < 0.05 * expected.norm()
    model(ids_BT, ids_BT).backward()


@pytest.mark.parametrize("case", ["pissa", "pissa alpha", "pissa fast"])
def test_pissa_factors_have_the_layout_of_a_file(case, base):
    """The last bits of B0 A0 depend on the memory layout: another one than the file's gives another residual."""
    buffers = adapter_buffers(build(base, section(case, targets=["att.key", "head"])))
    assert len(buffers) == 2 * 3
    assert all(tensor.is_contiguous() for tensor in buffers.values())
