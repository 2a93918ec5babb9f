"""Adapters of RWKV-PEFT: flat .pth files, with the formulas of that project written out by hand."""

import pytest
import torch

from rwkv_accel.config.schema import ModelConfig, PeftConfig
from rwkv_accel.errors import UserError
from rwkv_accel.model.io import load_model, read_checkpoint
from rwkv_accel.model.precision import Precision
from rwkv_accel.peft.apply import load_model_and_apply_peft
from rwkv_accel.peft.foreign import read_any_adapter

LAYERS = [f"blocks.{b}.{n}" for b in (0, 1) for n in ("att.key", "ffn.value")]


def shape_of(layer):
    return (64, 64) if "att" in layer else (64, 256)


def random(*shape):
    return 0.1 * torch.randn(shape)


@pytest.fixture
def expected(base):
    """Function: logits of the base with some weights replaced by hand."""

    def run(ids_BT, change):
        model = load_model(base, Precision.from_name("32-true"))
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(change(name, param))
            return model(ids_BT)

    return run


def running(base, ids_BT, **section):
    peft = PeftConfig.model_validate(section)
    with torch.no_grad():
        return load_model_and_apply_peft(ModelConfig(path=str(base)), peft)(ids_BT)


def assert_close(logits, expected):
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


def test_lora_with_trained_norms(base, ids_BT, expected, tmp_path):
    saved = {"ln_out.weight": torch.rand(64), "blocks.0.ln1.bias": random(64)}
    for layer in LAYERS:
        out_features, in_features = shape_of(layer)
        saved |= {f"{layer}.lora_A": random(8, in_features), f"{layer}.lora_B": random(out_features, 8)}
    torch.save(saved, tmp_path / "rwkv-0.pth")

    def change(name, param):
        layer = name.removesuffix(".weight")
        if layer in LAYERS:
            return param + 32 / 8 * saved[f"{layer}.lora_B"] @ saved[f"{layer}.lora_A"]
        return saved.get(name, param)

    meta, _ = read_any_adapter(tmp_path / "rwkv-0.pth", alpha=32)
    assert sorted(meta.config.targets) == sorted(LAYERS)
    assert meta.config.rank == 8
    logits = running(
        base, ids_BT, method="lora", rank=8, alpha=32, targets=["att.key", "ffn.value"],
        train_patterns=["ln_out.weight", "blocks.0.ln1.bias"], load_path=str(tmp_path / "rwkv-0.pth"),
    )  # fmt: skip
    assert_close(logits, expected(ids_BT, change))


@pytest.mark.parametrize("name", ["disha", "bone"])
def test_bone(name, base, ids_BT, expected, tmp_path):
    saved = {f"{layer}.{name}": random(8, shape_of(layer)[0]) for layer in LAYERS}
    torch.save(saved, tmp_path / "rwkv-0.pth")

    def change(key, param):
        layer = key.removesuffix(".weight")
        if layer not in LAYERS:
            return param
        rows = torch.arange(param.shape[1]) % 8
        return param + saved[f"{layer}.{name}"][rows].T

    section = {"method": "miss", "rank": 8, "targets": ["att.key", "ffn.value"]}
    logits = running(base, ids_BT, **section, load_path=str(tmp_path / "rwkv-0.pth"))
    assert_close(logits, expected(ids_BT, change))


def test_bat_is_indexed_by_input_block(base, ids_BT, expected, tmp_path):
    saved = {f"{layer}.disha": random(shape_of(layer)[1] // 8, 8, 8) for layer in LAYERS}
    torch.save(saved, tmp_path / "rwkv-0.pth")

    def change(key, param):
        layer = key.removesuffix(".weight")
        if layer not in LAYERS:
            return param
        changed = param.clone()
        for b, small in enumerate(saved[f"{layer}.disha"]):
            for a in range(param.shape[0] // 8):
                block = param[8 * a : 8 * a + 8, 8 * b : 8 * b + 8]
                changed[8 * a : 8 * a + 8, 8 * b : 8 * b + 8] += block @ small + small
        return changed

    section = {"method": "miss", "miss_variant": "bat_in", "rank": 8, "targets": ["att.key", "ffn.value"]}
    logits = running(base, ids_BT, **section, load_path=str(tmp_path / "rwkv-0.pth"))
    assert_close(logits, expected(ids_BT, change))


def test_pissa_with_its_init_file(base, ids_BT, expected, tmp_path):
    saved, start = {}, {}
    for layer in LAYERS:
        out_features, in_features = shape_of(layer)
        saved |= {f"{layer}.lora_A": random(8, in_features), f"{layer}.lora_B": random(out_features, 8)}
        start |= {
            f"model.{layer}.init_lora_A": random(8, in_features),
            f"model.{layer}.init_lora_B": random(out_features, 8),
        }
    torch.save(saved, tmp_path / "rwkv-0.pth")
    section = {
        "method": "pissa",
        "rank": 8,
        "targets": ["att.key", "ffn.value"],
        "load_path": str(tmp_path / "rwkv-0.pth"),
    }
    with pytest.raises(UserError, match=r"needs .*init_pissa\.pth"):
        running(base, ids_BT, **section)
    torch.save(start, tmp_path / "init_pissa.pth")

    def change(key, param):
        layer = key.removesuffix(".weight")
        if layer not in LAYERS:
            return param
        before = start[f"model.{layer}.init_lora_B"] @ start[f"model.{layer}.init_lora_A"]
        return param - before + saved[f"{layer}.lora_B"] @ saved[f"{layer}.lora_A"]

    assert_close(running(base, ids_BT, **section), expected(ids_BT, change))


def test_state_file(base, ids_BT, tmp_path):
    saved = {f"blocks.{b}.att.time_state": random(2, 32, 32) for b in (0, 1)}
    torch.save(saved, tmp_path / "state.pth")
    model = load_model_and_apply_peft(
        ModelConfig(path=str(base)), PeftConfig(method="state", load_path=str(tmp_path / "state.pth"))
    )
    plain = load_model(base, Precision.from_name("32-true"))
    with torch.no_grad():
        state = plain.fresh_state(2)
        state.wkv = [saved[f"blocks.{b}.att.time_state"].expand(2, -1, -1, -1) for b in (0, 1)]
        assert torch.equal(model(ids_BT), plain(ids_BT, state=state))


def write(content):
    def run(path):
        torch.save(content, path)

    return run


BROKEN = {
    "no alpha": (
        write({"blocks.0.att.key.lora_A": random(4, 64), "blocks.0.att.key.lora_B": random(64, 4)}),
        "say its alpha",
    ),
    "no adapter": (write({"emb.weight": random(97, 64)}), "holds no adapter"),
    "other tensor": (
        write({"blocks.0.att.key.miss_D": random(4, 64), "what.ever": random(2)}),
        r"unknown tensor what\.ever",
    ),
    "not finite": (write({"blocks.0.att.key.bone": torch.full((4, 64), float("nan"))}), "NaN or infinity"),
    "list": (write([random(3)]), "no dictionary of tensors"),
    "garbage": (lambda path: path.write_bytes(b"garbage"), "cannot be read"),
    "absent": (lambda path: None, "is no adapter"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_line_errors(name, tmp_path):
    make, message = BROKEN[name]
    path = tmp_path / "rwkv-0.pth"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        read_any_adapter(path)
    assert "\n" not in str(caught.value)


def test_truncated_pth(tmp_path):
    path = tmp_path / "rwkv-0.pth"
    torch.save({"blocks.0.att.key.bone": random(4, 64)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"cannot be read .*truncated"):
        read_any_adapter(path)


def test_recipe_and_file_must_agree(base, tmp_path):
    torch.save({"blocks.0.att.key.bone": random(4, 64)}, tmp_path / "rwkv-0.pth")
    peft = PeftConfig(method="lora", rank=4, load_path=str(tmp_path / "rwkv-0.pth"))
    with pytest.raises(UserError, match="holds an adapter with method 'miss', the recipe says 'lora'"):
        load_model_and_apply_peft(ModelConfig(path=str(base)), peft)
    assert read_checkpoint(base).config.n_layer == 2
