"""Adapter folders: bit-equal round trips, and one clear line for everything that can be wrong with one."""

import json
import os
import shutil

import pytest
import torch

from rwkv_accel.config.schema import ModelConfig, PeftConfig
from rwkv_accel.errors import UserError
from rwkv_accel.peft.adapter_file import (
    META_FILE,
    TENSORS_FILE,
    AdapterMeta,
    peft_section,
    read_adapter,
    save_adapter,
)
from rwkv_accel.peft.apply import (
    adapter_buffers,
    adapter_parameters,
    load_adapter,
    load_model_and_apply_peft,
)

PEFT = PeftConfig(method="lora", rank=4, targets=("att.key",), train_parts=("ln",))


def tensors_of(model):
    return {**adapter_parameters(model), **adapter_buffers(model)}


@pytest.fixture
def trained(base):
    model = load_model_and_apply_peft(ModelConfig(path=str(base)), PEFT, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in adapter_parameters(model).values():
            param += 0.1 * torch.randn(param.shape, generator=generator)
    return model


@pytest.fixture
def folder(trained, tmp_path, base_digest):
    meta = AdapterMeta(peft_section(PEFT), base_digest, tokenizer="byte", trained_tokens=1234)
    return save_adapter(tmp_path / "adapter", tensors_of(trained), meta)


def test_round_trip_is_bit_equal(trained, folder, base, base_digest):
    meta, tensors = read_adapter(folder)
    assert meta.config == PEFT
    assert (meta.tokenizer, meta.trained_tokens, meta.base_digest) == ("byte", 1234, base_digest)
    expected = tensors_of(trained)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    fresh = load_model_and_apply_peft(ModelConfig(path=str(base)), PEFT, seed=99)
    load_adapter(fresh, folder, base_digest=base_digest)
    for name, param in adapter_parameters(fresh).items():
        assert torch.equal(param, expected[name]), name


def test_holds_what_trains_and_nothing_else(folder):
    names = set(json.loads((folder / META_FILE).read_text())["tensors"])
    assert "blocks.1.att.key.lora_A" in names
    assert "blocks.0.ln0.bias" in names
    assert "ln_out.weight" in names
    assert not {name for name in names if not name.endswith(("lora_A", "lora_B")) and "ln" not in name}


def test_overwrites_in_one_step_and_leaves_no_scratch(folder, trained, base_digest):
    save_adapter(folder, tensors_of(trained), AdapterMeta(peft_section(PEFT), base_digest, step=7))
    assert read_adapter(folder)[0].step == 7
    assert os.listdir(folder.parent) == ["adapter"]


def test_nan_is_refused_and_nothing_is_written(trained, tmp_path):
    with torch.no_grad():
        trained.get_parameter("blocks.0.att.key.lora_B")[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"blocks\.0\.att\.key\.lora_B holds NaN"):
        save_adapter(tmp_path / "bad", tensors_of(trained), AdapterMeta(peft_section(PEFT), ""))
    assert os.listdir(tmp_path) == []


def edit_meta(folder, **changes):
    record = json.loads((folder / META_FILE).read_text())
    (folder / META_FILE).write_text(json.dumps({**record, **changes}))


def truncate(folder):
    path = folder / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder):
    data = bytearray((folder / TENSORS_FILE).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS_FILE).write_bytes(data)


def drop_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / TENSORS_FILE)
    del tensors["ln_out.bias"]
    save_file(tensors, folder / TENSORS_FILE)


def poison(folder):
    import hashlib

    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / TENSORS_FILE)
    tensors["ln_out.bias"][3] = float("inf")
    save_file(tensors, folder / TENSORS_FILE)
    edit_meta(folder, sha256=hashlib.sha256((folder / TENSORS_FILE).read_bytes()).hexdigest())


DAMAGE = {
    "truncated": (truncate, r"adapter\.safetensors is truncated or damaged .*another epoch"),
    "bit flip": (flip_a_bit, r"was changed after it was saved"),
    "lost tensor": (drop_tensor, r"lacks tensor ln_out\.bias"),
    "infinity": (poison, r"ln_out\.bias holds NaN or infinity"),
    "no tensors": (lambda f: (f / TENSORS_FILE).unlink(), r"the save is incomplete"),
    "no description": (lambda f: (f / META_FILE).unlink(), r"is no adapter folder"),
    "broken json": (lambda f: (f / META_FILE).write_text("{"), r"adapter\.json is damaged"),
    "newer format": (lambda f: edit_meta(f, format_version=2), r"format version 2.*update"),
    "unknown key": (lambda f: edit_meta(f, colour="red"), r"unknown keys colour"),
    "no folder": (shutil.rmtree, r"is no adapter folder"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_with_a_remedy(folder, name):
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(folder)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)


def test_another_base_is_refused(trained, folder):
    with pytest.raises(UserError, match=r"trained on another base than other\.pth"):
        load_adapter(trained, folder, base_digest="sha256:0000", base_path="other.pth")


def test_adapter_that_does_not_fit_changes_nothing(trained, base, tmp_path, base_digest):
    wide = PEFT.model_copy(update={"rank": 8})
    other = load_model_and_apply_peft(ModelConfig(path=str(base)), wide)
    folder = save_adapter(tmp_path / "wide", tensors_of(other), AdapterMeta(peft_section(wide), base_digest))
    before = {name: param.clone() for name, param in adapter_parameters(trained).items()}
    with pytest.raises(UserError, match=r"lora_A is \[8, 64\], the model needs \[4, 64\].*another peft.rank"):
        load_adapter(trained, folder, base_digest=base_digest)
    assert all(torch.equal(param, before[name]) for name, param in adapter_parameters(trained).items())


def test_load_path_continues_and_refuses_other_settings(trained, folder, base):
    again = PEFT.model_copy(update={"load_path": str(folder)})
    model = load_model_and_apply_peft(ModelConfig(path=str(base)), again)
    expected = tensors_of(trained)
    assert all(torch.equal(param, expected[name]) for name, param in adapter_parameters(model).items())
    changed = again.model_copy(update={"alpha": 64.0})
    with pytest.raises(UserError, match=r"holds an adapter with alpha None, the recipe says 64\.0"):
        load_model_and_apply_peft(ModelConfig(path=str(base)), changed)
