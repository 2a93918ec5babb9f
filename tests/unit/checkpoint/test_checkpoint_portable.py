"""Save and load in one process: exact continuation, nothing frozen on disk, misfits named."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rwkv_accel.checkpoint import CheckpointWriter, load_checkpoint, save_checkpoint
from rwkv_accel.checkpoint.format import OPTIMIZER_FILE, TRAINABLE_FILE
from rwkv_accel.config.checkpoint import CheckpointConfig
from rwkv_accel.errors import UserError
from tests.unit.checkpoint.checkpoint_helpers import train

TRAINED = {"lora_A", "lora_B", "unused"}


def save(accelerator, model, optimizer, out_dir, step=0, name="step-1", **kwargs):
    writer = CheckpointWriter(out_dir, CheckpointConfig(keep_last=2))
    path = save_checkpoint(
        accelerator,
        model,
        optimizer,
        {"step": step, "epoch": 1},
        writer=writer,
        name=name,
        config={"seed": 3},
        base_digest="sha256:abc",
        **kwargs,
    )
    writer.finish(accelerator)
    return path


def values(model, optimizer):
    state = optimizer.optimizer.state
    return {
        **{f"p.{name}": param.detach().clone() for name, param in model.named_parameters()},
        **{
            f"{key}.{name}": value.clone()
            for name, param in model.named_parameters()
            for key, value in state.get(param, {}).items()
            if value is not None
        },
    }


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("kind", ["adamw", "adamw, offload", "sgd", "sgd-momentum"])
@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_equals_the_undisturbed_one_bit_for_bit(tmp_path, accelerator, make_run, kind, steps_before, dtype):
    model, optimizer = make_run(kind, dtype=dtype)
    train(model, optimizer, steps_before)
    path = save(accelerator, model, optimizer, tmp_path, steps_before)
    losses = train(model, optimizer, 4)
    expected = values(model, optimizer)

    torch.manual_seed(99)
    fresh_model, fresh_optimizer = make_run(kind, dtype=dtype)
    train(fresh_model, fresh_optimizer, 2)  # whatever was there before must not show
    saved = load_checkpoint(accelerator, fresh_model, fresh_optimizer, path)
    assert saved["state"] == {"step": steps_before, "epoch": 1}
    assert train(fresh_model, fresh_optimizer, 4) == losses
    assert_equal(values(fresh_model, fresh_optimizer), expected)


def test_moments_may_move_to_the_host_and_back(tmp_path, accelerator, make_run):
    model, optimizer = make_run("adamw, offload")
    train(model, optimizer, 3)
    expected = {key: value for key, value in values(model, optimizer).items() if "step" not in key}
    path = save(accelerator, model, optimizer, tmp_path)
    for number, kind in enumerate(("adamw", "adamw, offload")):
        model, optimizer = make_run(kind)
        load_checkpoint(accelerator, model, optimizer, path)
        found = values(model, optimizer)
        assert {found.pop(key).item() for key in list(found) if "step" in key} == {3}
        assert_equal(found, expected)
        path = save(accelerator, model, optimizer, tmp_path, name=f"step-{number + 4}")


def test_narrow_weights_are_saved_as_the_fp32_copy(tmp_path, accelerator, make_run):
    model, optimizer = make_run("adamw, offload", dtype=torch.bfloat16)
    train(model, optimizer, 3)
    saved = load_file(save(accelerator, model, optimizer, tmp_path) / TRAINABLE_FILE)
    for name in ("lora_A", "lora_B"):
        param = model.get_parameter(name)
        assert saved[name].dtype == torch.float32
        assert torch.equal(saved[name], optimizer.optimizer.masters[param])
        assert torch.equal(saved[name].bfloat16(), param)
        assert not torch.equal(saved[name], param.float())


def test_everything_else_comes_back(tmp_path, accelerator, make_run):
    model, optimizer = make_run()
    extra_tensors = {"residual": torch.randn(3, 2), "mean": torch.tensor(2.5)}
    path = save(accelerator, model, optimizer, tmp_path, extra={"log": [1, 2]}, extra_tensors=extra_tensors)
    assert path == tmp_path / "checkpoints" / "step-1"
    saved = load_checkpoint(accelerator, model, optimizer, path)
    assert saved["extra"] == {"log": [1, 2]}
    assert saved["config"] == {"seed": 3}
    assert saved["base_digest"] == "sha256:abc"
    assert saved["world_size"] == 1
    assert_equal(saved["extra_tensors"], extra_tensors)
    without = save(accelerator, model, optimizer, tmp_path, name="step-2")
    assert load_checkpoint(accelerator, model, optimizer, without)["extra_tensors"] == {}


def test_all_generators_continue(tmp_path, accelerator, make_run):
    model, optimizer = make_run()
    random.gauss(0, 1), np.random.randn()  # leaves half of a pair in both
    path = save(accelerator, model, optimizer, tmp_path)

    def draw():
        return random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(()).item()

    expected = draw()
    assert draw() != expected
    load_checkpoint(accelerator, model, optimizer, path)
    assert draw() == expected


def test_generators_stay_when_the_number_of_processes_changed(tmp_path, accelerator, make_run):
    model, optimizer = make_run()
    path = save(accelerator, model, optimizer, tmp_path)
    state = json.loads((path / "state.json").read_text())
    assert state["world_size"] == 1
    rewrite(path, "state.json", json.dumps({**state, "world_size": 2}).encode())
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    load_checkpoint(accelerator, model, optimizer, path)
    assert torch.equal(torch.get_rng_state(), expected)


def test_only_trained_tensors_are_on_disk_and_they_are_small(tmp_path, accelerator, make_run):
    model, optimizer = make_run(rank=600)
    train(model, optimizer, 1)
    path = save(accelerator, model, optimizer, tmp_path)
    assert set(load_file(path / TRAINABLE_FILE)) == TRAINED
    updated = {"lora_A", "lora_B"}
    assert set(load_file(path / OPTIMIZER_FILE)) == {f"{k}/{n}" for k in ("exp_avg", "exp_avg_sq") for n in updated}
    trained_bytes = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    tensor_bytes = sum((path / name).stat().st_size for name in (TRAINABLE_FILE, OPTIMIZER_FILE))
    assert tensor_bytes < 3.2 * trained_bytes


def test_parameters_that_do_not_fit_are_named(tmp_path, accelerator, make_run):
    model, optimizer = make_run(rank=3)
    path = save(accelerator, model, optimizer, tmp_path)
    other = make_run(rank=4)
    with pytest.raises(UserError, match=r"lora_A is \[3, 6\] there and \[4, 6\] here, lora_B is \[6, 3\]"):
        load_checkpoint(accelerator, *other, path)

    model.lora_A.requires_grad_(False)
    model.frozen.bias.requires_grad_(True)
    before = values(model, optimizer)
    with pytest.raises(UserError, match=r"lacks frozen\.bias and holds lora_A, which this model does not train"):
        load_checkpoint(accelerator, model, optimizer, path)
    assert_equal(values(model, optimizer), before)


def test_another_optimizer_is_refused(tmp_path, accelerator, make_run):
    model, optimizer = make_run("adamw")
    path = save(accelerator, model, optimizer, tmp_path)
    with pytest.raises(UserError, match=r"moments of AdamW, this run uses SGD; set optim\.optimizer"):
        load_checkpoint(accelerator, *make_run("sgd"), path)


def test_state_that_cannot_travel_is_refused_at_the_save(tmp_path, accelerator, make_run):
    model, optimizer = make_run()
    train(model, optimizer, 1)
    optimizer.optimizer.state[model.lora_A]["absmax"] = torch.zeros(2)
    with pytest.raises(UserError, match="AdamW keeps 'absmax' in a form that checkpoints cannot carry"):
        save(accelerator, model, optimizer, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_damaged_folder_is_refused_before_anything_changes(tmp_path, accelerator, make_run):
    model, optimizer = make_run()
    path = save(accelerator, model, optimizer, tmp_path)
    train(model, optimizer, 1)
    before = values(model, optimizer)
    data = bytearray((path / TRAINABLE_FILE).read_bytes())
    data[-1] ^= 1
    (path / TRAINABLE_FILE).write_bytes(data)
    with pytest.raises(UserError, match=f"the bytes of {TRAINABLE_FILE} do not fit its checksum; take another"):
        load_checkpoint(accelerator, model, optimizer, path)
    assert_equal(values(model, optimizer), before)


def test_old_ones_and_leftovers_are_removed_at_the_save(tmp_path, accelerator, make_run):
    model, optimizer = make_run()
    (tmp_path / "checkpoints" / "step-0.tmp").mkdir(parents=True)
    for step in (1, 2, 3):
        save(accelerator, model, optimizer, tmp_path, step, f"step-{step}")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-3"]


def rewrite(folder, name, data: bytes) -> None:
    """Replace a file and make the manifest fit it."""
    import hashlib

    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
