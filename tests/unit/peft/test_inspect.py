"""inspect says what each kind of file is, with the right numbers, and refuses what it does not know."""

import json

import pytest
import torch

from rwkv_accel.config.schema import ModelConfig, PeftConfig
from rwkv_accel.export.__main__ import main as export
from rwkv_accel.inspect.__main__ import main
from rwkv_accel.peft.adapter_file import TENSORS_FILE, AdapterMeta, peft_section, save_adapter
from rwkv_accel.peft.apply import adapter_parameters, load_model_and_apply_peft


@pytest.fixture
def folder(base, base_digest, tmp_path):
    peft = PeftConfig(method="dora", rank=4, alpha=8, targets=("att.key",), train_state=True, base_quant="nf4")
    model = load_model_and_apply_peft(ModelConfig(path=str(base)), peft)
    meta = AdapterMeta(
        peft_section(peft), base_digest, str(base), "byte", "chat", trained_tokens=12345, step=6, epoch=1
    )
    return save_adapter(tmp_path / "adapter", adapter_parameters(model), meta)


def facts(capsys, *paths, options=()):
    assert main([*map(str, paths), "--json", *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_model(base, base_digest, capsys):
    (found,) = facts(capsys, base, options=["--digest"])
    assert found["kind"] == "RWKV-7 (x070) model"
    assert (found["layers"], found["channels"], found["heads"], found["vocabulary"]) == (2, 64, "2 of 32", 97)
    assert found["inner ranks"] == "decay 32, iclr 32, value 32, gate 32"
    total = sum(t.numel() for t in torch.load(base).values())
    assert found["parameters"] == f"{total:,}"
    assert found["digest"] == base_digest


def test_adapter(folder, base_digest, capsys):
    (found,) = facts(capsys, folder)
    expected = {
        "kind": "adapter, complete and undamaged", "method": "dora", "rank": 4, "alpha": 8.0, "targets": "att.key",
        "train_state": True, "base_quant": "nf4", "tokenizer": "byte", "template": "chat",
        "trained": "12,345 tokens, 6 steps, 1 epochs",
        "tensors": f"8 with {2 * (2 * 4 * 64 + 64) + 2 * 2 * 32 * 32:,} values",
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert base_digest[:19] in found["base"]
    assert "dropout" not in found


def test_exports(folder, capsys):
    assert export([str(folder), "--to", "state"]) == 0
    capsys.readouterr()
    (state,) = facts(capsys, folder / "state.pth")
    assert state["kind"] == "initial WKV states (state tuning)"
    assert (state["blocks"], state["heads x value x key"]) == (2, [2, 32, 32])
    assert export([str(folder), "--to", "pth"]) == 0
    capsys.readouterr()
    (merged,) = facts(capsys, folder / "merged.pth")
    assert merged["time_state"] == "present: sequences do not start from zero"


def test_foreign_adapters(base, tmp_path, capsys):
    peft = PeftConfig(method="lora", rank=4, alpha=8, targets=("att.key",))
    model = load_model_and_apply_peft(ModelConfig(path=str(base)), peft)
    torch.save(dict(adapter_parameters(model)), tmp_path / "rwkv-0.pth")
    save_adapter(tmp_path / "own", adapter_parameters(model), AdapterMeta(peft_section(peft), "", str(base)))
    assert export([str(tmp_path / "own"), "--to", "hf-peft", "--out", str(tmp_path / "hf")]) == 0
    assert export([str(base), "--to", "fla", "--out", str(tmp_path / "fla")]) == 0
    capsys.readouterr()
    flat, hf, fla = facts(capsys, tmp_path / "rwkv-0.pth", tmp_path / "hf", tmp_path / "fla")
    assert (flat["kind"], flat["rank"], flat["alpha"]) == ("flat adapter of RWKV-PEFT", 4, "not in the file")
    assert (hf["kind"], hf["rank"], hf["alpha"]) == ("HF PEFT adapter", 4, 8.0)
    assert (fla["kind"], fla["eos_token_id"], fla["hidden_size"]) == ("Hugging Face model folder", 0, 64)


def test_readable_output(folder, capsys):
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(folder)
    assert "  method: dora" in lines


def test_damage_and_strangers(folder, tmp_path, capsys):
    def error(path):
        assert main([str(path)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    path = folder / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated or damaged" in error(folder)
    assert "does not exist" in error(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "is no run, save, adapter or model folder" in error(tmp_path / "empty")
    torch.save({"blocks.0.att.time_maa_x": torch.zeros(1), "emb.weight": torch.zeros(2, 2)}, tmp_path / "v6.pth")
    assert "RWKV-6" in error(tmp_path / "v6.pth")
