"""Exports: the pip package rwkv, HF names and our own loader read them and compute the same; failures leave nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from rwkv_accel.config.schema import ModelConfig, PeftConfig
from rwkv_accel.export.__main__ import main
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.io import checkpoint_digest, load_model, read_checkpoint
from rwkv_accel.model.precision import Precision
from rwkv_accel.peft.adapter_file import TENSORS_FILE, AdapterMeta, peft_section, save_adapter
from rwkv_accel.peft.apply import adapter_buffers, adapter_parameters, load_model_and_apply_peft
from rwkv_accel.peft.linear import LoraLinear

FP32 = Precision.from_name("32-true")


def trained_adapter(base, folder, *, size=0.05, seed=7, **section):
    """An adapter folder and the model that it was saved from."""
    peft = PeftConfig.model_validate({"rank": 8, "targets": ["att.key", "ffn.value"]} | section)
    model = load_model_and_apply_peft(ModelConfig(path=str(base)), peft).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in adapter_parameters(model).values():
            param += size * torch.randn(param.shape, generator=generator)
    meta = AdapterMeta(peft_section(peft), checkpoint_digest(base), base_path=str(base), tokenizer="byte")
    save_adapter(folder, {**adapter_parameters(model), **adapter_buffers(model)}, meta)
    return model


def logits(model, ids_BT):
    with torch.no_grad():
        return model(ids_BT)


def assert_close(found, expected, tolerance=2e-5):
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


METHODS = {
    "lora": {"alpha": 16},
    "dora": {"method": "dora"},
    "pissa": {"method": "pissa"},
    "miss": {"method": "miss"},
    "qlora": {"base_quant": "nf4"},
    "parts": {"method": "lora", "train_parts": ["ln", "vectors"]},
}


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("case", METHODS)
def test_merged_file_is_the_same_model(case, kind, base, ids_BT, tmp_path, capsys):
    model = trained_adapter(base, tmp_path / "adapter", **METHODS[case])
    assert main([str(tmp_path / "adapter"), "--to", kind]) == 0
    out = tmp_path / "adapter" / f"merged.{kind}"
    assert_close(logits(load_model(out, FP32), ids_BT), logits(model, ids_BT))
    assert f"wrote {out}: 1 adapter merged, stored as float32; logits on" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "adapter")) == ["adapter.json", TENSORS_FILE, out.name]


def test_merged_pth_runs_in_the_pip_package(make_base, tmp_path):
    # Head size 64: the package knows no other.
    config = RWKV7Config.for_new_model(2, 128, 97, 64)
    base = make_base(tmp_path / "base.pth", config)
    model = trained_adapter(base, tmp_path / "adapter", train_parts=["ln", "vectors", "lowrank"], method="dora")
    assert main([str(tmp_path / "adapter"), "--to", "pth", "--out", str(tmp_path / "merged.pth")]) == 0
    ids = [5, 17, 42, 3, 96, 0, 11]
    script = (
        "import json, sys, torch\n"
        "from rwkv.model import RWKV\n"
        f"model = RWKV(model={str(tmp_path / 'merged')!r}, strategy='cpu fp32')\n"
        f"out, _ = model.forward({ids}, None, full_output=True)\n"
        "print('LOGITS' + json.dumps(out.tolist()))\n"
    )
    env = {**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    theirs = torch.tensor(json.loads(done.stdout.split("LOGITS")[1]))
    assert_close(theirs, logits(model, torch.tensor([ids]))[0], 5e-5)


def test_onto_the_original_base(base, ids_BT, tmp_path):
    trained_adapter(base, tmp_path / "adapter", base_quant="nf4")
    out = tmp_path / "merged.pth"
    assert main([str(tmp_path / "adapter"), "--to", "pth", "--out", str(out), "--onto", "original"]) == 0
    checkpoint, merged = read_checkpoint(base), read_checkpoint(out)
    tensors = load_file(tmp_path / "adapter" / TENSORS_FILE)
    name = "blocks.1.att.key"
    delta = tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
    assert torch.allclose(merged[f"{name}.weight"], checkpoint[f"{name}.weight"] + delta, atol=1e-6)
    assert torch.equal(merged["blocks.1.att.value.weight"], checkpoint["blocks.1.att.value.weight"])


def test_weighted_sum_of_adapters(base, tmp_path):
    sections = ({"alpha": 16}, {"method": "dora"}, {"method": "parts", "train_parts": ["ln"]})
    for index, section in enumerate(sections):
        trained_adapter(base, tmp_path / str(index), seed=index, **section)
    sources = [str(tmp_path / str(index)) for index in range(3)]
    out = tmp_path / "sum.pth"
    assert main([*sources, "--to", "pth", "--out", str(out), "--weights", "0.5", "-1", "2"]) == 0
    checkpoint, merged = read_checkpoint(base), read_checkpoint(out)
    total = {name: checkpoint[name].clone() for name in checkpoint}
    for source, weight in zip(sources, (0.5, -1, 2)):
        single = tmp_path / "single.pth"
        assert main([source, "--to", "pth", "--out", str(single), "--overwrite"]) == 0
        one = read_checkpoint(single)
        for name in total:
            total[name] += weight * (one[name] - checkpoint[name])
    assert all(torch.allclose(merged[name], total[name], atol=1e-5) for name in total)


def test_bf16_base_stays_bf16_and_is_rounded_once(make_base, tmp_path, ids_BT):
    base = make_base(tmp_path / "base.pth", dtype=torch.bfloat16)
    trained_adapter(base, tmp_path / "adapter")
    assert main([str(tmp_path / "adapter"), "--to", "pth"]) == 0
    merged, checkpoint = read_checkpoint(tmp_path / "adapter" / "merged.pth"), read_checkpoint(base)
    tensors = load_file(tmp_path / "adapter" / TENSORS_FILE)
    name = "blocks.1.att.key"
    exact = checkpoint[f"{name}.weight"].float() + tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
    assert torch.equal(merged[f"{name}.weight"], exact.bfloat16())
    assert {merged[n].dtype for n in merged} == {torch.bfloat16}
    assert main([str(tmp_path / "adapter"), "--to", "pth", "--dtype", "fp32", "--overwrite"]) == 0
    assert read_checkpoint(tmp_path / "adapter" / "merged.pth")["emb.weight"].dtype == torch.float32


def test_fla_folder(base, tmp_path):
    trained_adapter(base, tmp_path / "adapter")
    assert main([str(tmp_path / "adapter"), "--to", "fla"]) == 0
    assert main([str(tmp_path / "adapter"), "--to", "pth"]) == 0
    theirs = load_file(tmp_path / "adapter" / "fla" / "model.safetensors")
    merged = read_checkpoint(tmp_path / "adapter" / "merged.pth")
    # Names and layouts of fla/utils/convert_from_rwkv7.py, as in the reference table.
    assert torch.equal(theirs["model.embeddings.weight"], merged["emb.weight"])
    assert torch.equal(theirs["model.layers.0.pre_norm.bias"], merged["blocks.0.ln0.bias"])
    assert torch.equal(theirs["model.layers.1.attn_norm.weight"], merged["blocks.1.ln1.weight"])
    assert torch.equal(theirs["model.layers.1.ffn_norm.weight"], merged["blocks.1.ln2.weight"])
    assert torch.equal(theirs["model.layers.1.attn.x_r"], merged["blocks.1.att.x_r"])
    assert torch.equal(theirs["model.layers.1.attn.w_lora.lora.2.bias"], merged["blocks.1.att.w0"].view(-1))
    assert torch.equal(theirs["model.layers.1.attn.g_lora.lora.0.weight"], merged["blocks.1.att.g1"].T)
    assert torch.equal(theirs["model.layers.1.attn.v_lora.lora.2.weight"], merged["blocks.1.att.v2"].T)
    assert torch.equal(theirs["model.layers.1.attn.k_k"], merged["blocks.1.att.k_k"].view(-1))
    assert torch.equal(theirs["model.layers.1.attn.r_k"], merged["blocks.1.att.r_k"])
    assert torch.equal(theirs["model.layers.1.attn.k_proj.weight"], merged["blocks.1.att.key.weight"])
    assert torch.equal(theirs["model.layers.1.attn.o_proj.weight"], merged["blocks.1.att.output.weight"])
    assert torch.equal(theirs["model.layers.1.attn.g_norm.bias"], merged["blocks.1.att.ln_x.bias"])
    assert torch.equal(theirs["model.layers.1.ffn.x_k"], merged["blocks.1.ffn.x_k"].view(-1))
    assert torch.equal(theirs["model.layers.1.ffn.value.weight"], merged["blocks.1.ffn.value.weight"])
    assert torch.equal(theirs["model.norm.weight"], merged["ln_out.weight"])
    assert torch.equal(theirs["lm_head.weight"], merged["head.weight"])
    unused = [name for name in merged if name.startswith("blocks.0.att.v") and name[-1] in "012"]
    assert len(theirs) == len(merged) - len(unused)
    assert not [name for name in theirs if ".0.attn.v_lora" in name]
    config = json.loads((tmp_path / "adapter" / "fla" / "config.json").read_text())
    expected = {
        "model_type": "rwkv7", "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 32, "vocab_size": 97,
        "intermediate_size": 256, "hidden_ratio": 4.0, "decay_low_rank_dim": 32, "gate_low_rank_dim": 32,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "value_dim": [64, 64], "torch_dtype": "float32",
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected


def test_state_file_and_merged_states(base, ids_BT, tmp_path):
    model = trained_adapter(base, tmp_path / "adapter", train_state=True, layer_range=[1, 1])
    assert main([str(tmp_path / "adapter"), "--to", "state"]) == 0
    states = torch.load(tmp_path / "adapter" / "state.pth")
    assert {name: tuple(t.shape) for name, t in states.items()} == {
        f"blocks.{b}.att.time_state": (2, 32, 32) for b in (0, 1)
    }
    assert not states["blocks.0.att.time_state"].any()
    assert torch.equal(states["blocks.1.att.time_state"], model.blocks[1].att.time_state.detach())
    assert main([str(tmp_path / "adapter"), "--to", "pth"]) == 0
    merged = load_model(tmp_path / "adapter" / "merged.pth", FP32)
    assert_close(logits(merged, ids_BT), logits(model, ids_BT))


def test_flat_pth_with_base_and_alpha(base, ids_BT, tmp_path):
    model = trained_adapter(base, tmp_path / "adapter", alpha=16)
    torch.save(dict(adapter_parameters(model)), tmp_path / "rwkv-3.pth")
    out = tmp_path / "merged.pth"
    command = [str(tmp_path / "rwkv-3.pth"), "--base", str(base), "--to", "pth", "--out", str(out)]
    assert main([*command, "--alpha", "16"]) == 0
    assert_close(logits(load_model(out, FP32), ids_BT), logits(model, ids_BT))


def test_whole_model_is_converted(base, tmp_path):
    out = tmp_path / "again.safetensors"
    assert main([str(base), "--to", "safetensors", "--out", str(out)]) == 0
    assert checkpoint_digest(out) == checkpoint_digest(base)


def test_hf_folder_of_a_pissa_adapter(base, tmp_path, capsys):
    trained_adapter(base, tmp_path / "adapter", method="pissa")
    assert main([str(tmp_path / "adapter"), "--to", "hf-peft"]) == 0
    folder = tmp_path / "adapter" / "hf_peft"
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (16, 16, True)
    assert "4 adapters, read back and equal" in capsys.readouterr().out


def failing(capsys, *command):
    """The one line that a failing export prints."""
    assert main([str(part) for part in command]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_failed_check_leaves_nothing(base, tmp_path, capsys, monkeypatch):
    trained_adapter(base, tmp_path / "adapter")
    before = sorted(os.listdir(tmp_path / "adapter"))
    monkeypatch.setattr(LoraLinear, "merge", classmethod(lambda cls, weight_OI, tensors, spec: weight_OI * 1.1))
    for kind in ("pth", "safetensors", "fla"):
        line = failing(capsys, tmp_path / "adapter", "--to", kind)
        assert "the merged model is not the same model" in line
        assert "nothing was written" in line
    assert sorted(os.listdir(tmp_path / "adapter")) == before


def test_wrong_base(make_base, base, tmp_path, capsys):
    trained_adapter(base, tmp_path / "adapter")
    other = make_base(tmp_path / "other.pth", seed=5)
    assert "trained on another base than" in failing(capsys, tmp_path / "adapter", "--to", "pth", "--base", other)
    larger = make_base(tmp_path / "larger.pth", RWKV7Config.for_new_model(3, 64, 97, 32))
    trained_adapter(larger, tmp_path / "deep")
    line = failing(capsys, tmp_path / "deep", "--to", "pth", "--base", base)
    assert "trained on another base" in line
    assert not (tmp_path / "deep" / "merged.pth").exists()


def test_adapter_of_another_size(base, tmp_path, capsys):
    torch.save({"blocks.0.att.key.bone": torch.zeros(8, 128)}, tmp_path / "wide.pth")
    command = (tmp_path / "wide.pth", "--base", base, "--to", "pth", "--out", tmp_path / "out.pth")
    assert "is [8, 128], this base needs [8, 64]; it is for a model of another size" in failing(capsys, *command)
    assert not (tmp_path / "out.pth").exists()


def test_truncated_adapter(base, tmp_path, capsys):
    trained_adapter(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-64])
    assert "truncated or damaged" in failing(capsys, tmp_path / "adapter", "--to", "pth")
    assert not (tmp_path / "adapter" / "merged.pth").exists()


def test_mistakes_on_the_command_line(base, tmp_path, capsys):
    trained_adapter(base, tmp_path / "a")
    trained_adapter(base, tmp_path / "parts", method="parts", train_parts=["ln"])
    trained_adapter(base, tmp_path / "quantised", base_quant="int8")
    assert "--out is needed" in failing(capsys, base, "--to", "pth")
    assert "must end in .pth" in failing(capsys, tmp_path / "a", "--to", "pth", "--out", tmp_path / "x.bin")
    assert "no source trains initial states" in failing(capsys, tmp_path / "a", "--to", "state")
    assert "give one for each" in failing(capsys, tmp_path / "a", "--to", "pth", "--weights", "1", "2")
    assert "a factor that is not finite" in failing(capsys, tmp_path / "a", "--to", "pth", "--weights", "nan")
    assert "is a whole model and no adapter" in failing(capsys, base, "--to", "hf-peft", "--out", tmp_path / "hf")
    assert "HF PEFT folders hold adapters only" in failing(capsys, tmp_path / "parts", "--to", "hf-peft")
    line = failing(capsys, tmp_path / "a", tmp_path / "quantised", "--to", "pth")
    assert "differently quantised bases; merge them with --onto original" in line
    (tmp_path / "a" / "merged.pth").write_text("mine")
    assert "merged.pth exists; give --overwrite" in failing(capsys, tmp_path / "a", "--to", "pth")
    assert (tmp_path / "a" / "merged.pth").read_text() == "mine"


def test_overwrite_leaves_alone_what_is_no_export(base, tmp_path, capsys):
    trained_adapter(base, tmp_path / "run" / "a")
    source = tmp_path / "run" / "a"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = ("--overwrite", "--out")
    assert "is what the export is made from" in failing(capsys, source, "--to", "pth", *again, base)
    for folder in (source, source.parent):
        for kind in ("fla", "hf-peft"):
            assert "give another" in failing(capsys, source, "--to", kind, *again, folder)
    (tmp_path / "folder.pth").mkdir()
    assert "is a folder; name the file in it" in failing(capsys, source, "--to", "pth", *again, tmp_path / "folder.pth")
    (tmp_path / "file").write_text("mine")
    for kind, name in (("pth", "x.pth"), ("safetensors", "x.safetensors"), ("fla", "x"), ("hf-peft", "x")):
        unwritable = tmp_path / "file" / name
        assert f"cannot write {unwritable}: " in failing(capsys, source, "--to", kind, "--out", unwritable)
    assert "is a file; --to fla writes a folder" in failing(capsys, source, "--to", "fla", *again, tmp_path / "file")
    assert all(path.read_bytes() == data for path, data in before.items())
    for _ in range(2):
        assert main([str(source), "--to", "fla", *again, str(tmp_path / "fla")]) == 0
