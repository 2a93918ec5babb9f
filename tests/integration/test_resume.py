"""A run that is killed or stopped and started again ends bit for bit where an undisturbed one does (one process)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers import ROOT, environment, ragged_jsonl, tiny_checkpoint, train_cli, write_recipe

STEPS = 12
HELD_WRITER = ROOT / "tests" / "integration" / "held_writer.py"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny_checkpoint(folder / "base.pth")
    ragged_jsonl(folder / "data.jsonl", 20)
    return folder


def recipe(work, name, **changes):
    tree = {
        "out_dir": str(work / name),
        "model": {"path": str(work / "base.pth")},
        "peft": {"method": "lora", "rank": 4, "dropout": 0.1, "train_parts": ["ln"]},
        "data": {
            "path": str(work / "data.jsonl"), "prompt_column": "q", "response_column": "a", "tokenizer": "byte",
            "ctx_len": 48, "packing": "pad", "overlong": "truncate",
        },
        "optim": {"lr_init": 1e-2, "lr_final": 1e-3, "warmup_steps": 2, "weight_decay": 0.1},
        # 20 rows in windows of 6: an epoch ends with a short window.
        "trainer": {"max_epochs": 3, "micro_batch_size": 2, "global_batch_size": 6},
        "checkpoint": {"every_n_steps": 3, "epoch_save": 1, "keep_weights": 2},
        "tracking": {"progress": "none"},
    }  # fmt: skip
    tree.update(changes)
    return write_recipe(work / f"{name}.yaml", tree)


@pytest.fixture(scope="module")
def undisturbed(work):
    done = train_cli(recipe(work, "undisturbed"))
    assert done.returncode == 0, done.stderr
    return work / "undisturbed"


def weights(out_dir):
    from safetensors.torch import load_file

    name = (out_dir / "adapter" / "LATEST").read_text().strip()
    return load_file(out_dir / "adapter" / name / "adapter.safetensors")


def records(out_dir):
    timeless = ("step", "epoch", "loss", "smoothed_loss", "lr", "weight_decay", "grad_norm", "target_tokens", "tokens")
    return [{k: r[k] for k in timeless} for r in json.loads((out_dir / "loss_data.json").read_text())]


def assert_same_end(out_dir, undisturbed):
    ours, theirs = weights(out_dir), weights(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert records(out_dir) == records(undisturbed)
    assert [r["step"] for r in records(out_dir)] == list(range(1, STEPS + 1))


def start_and_wait_for_step(path, out_dir, step, timeout=120, **variables):
    """The process, once its log shows the step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rwkv_accel.train", str(path)], cwd=ROOT, env=environment(**variables),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + timeout
    log = out_dir / "loss_data.json"
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(json.loads(log.read_text() or "[]")) >= step:
            return process
        time.sleep(0.002)
    process.kill()
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0][-3000:]}")


@pytest.mark.parametrize("step", [4, 7])
def test_killed_run_continues_bit_for_bit(work, undisturbed, step):
    name = f"killed{step}"
    path = recipe(work, name)
    process = start_and_wait_for_step(path, work / name, step)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    again = train_cli(path)
    assert again.returncode == 0, again.stderr
    assert "continuing from" in again.stdout + again.stderr
    assert_same_end(work / name, undisturbed)


@pytest.mark.parametrize("place", ["the tensors", "the final name", "the retention"])
def test_killed_while_a_checkpoint_is_written_behind_the_training(work, undisturbed, place):
    name = "held-" + place.replace(" ", "-")
    path, sign = recipe(work, name), work / f"{name}.sign"
    process = subprocess.Popen(
        [sys.executable, str(HELD_WRITER), "6", place, str(sign), str(path)], cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not sign.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    out = process.communicate()[0]
    assert sign.exists(), out[-3000:]
    assert process.returncode == -signal.SIGKILL
    again = train_cli(path)
    assert again.returncode == 0, again.stderr
    resumed = {"the tensors": 4, "the final name": 4, "the retention": 6}[place]  # step 4 ends an epoch
    assert f"continuing from {work / name}/checkpoints/step-{resumed:08d}: step {resumed} of 12" in again.stderr
    assert "damaged" not in again.stdout + again.stderr
    assert_same_end(work / name, undisturbed)
    assert sorted(p.name for p in (work / name / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_damaged_and_foreign_checkpoints_are_named_and_the_one_before_is_taken(work, undisturbed):
    out_dir = work / "damaged"
    shutil.copytree(undisturbed, out_dir)
    path, checkpoints = recipe(work, "damaged"), out_dir / "checkpoints"
    flip_last_byte(checkpoints / "step-00000012" / "trainable.safetensors")
    (checkpoints / "checkpoint-500").mkdir()
    (checkpoints / "checkpoint-500" / "trainer_state.json").write_text("{}")
    (checkpoints / "step-00000015.tmp").mkdir()  # a save that was killed before its rename
    done = train_cli(path)
    assert done.returncode == 0, done.stderr
    named = [line for line in done.stderr.splitlines() if line.endswith("; skipped")]
    assert len(named) == 2, done.stderr
    assert "checkpoint-500 is a checkpoint of the Hugging Face Trainer" in named[0]
    assert "step-00000012 is damaged: the bytes of trainable.safetensors do not fit its checksum" in named[1]
    assert f"continuing from {checkpoints}/step-00000009: step 9 of 12" in done.stderr
    assert_same_end(out_dir, undisturbed)
    for name, file in (("step-00000009", "optimizer.safetensors"), ("step-00000012", "rng.json")):
        (checkpoints / name / file).unlink()
    refused = train_cli(path)
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error")]
    assert "no usable checkpoint: " in line
    assert "step-00000009 is damaged: optimizer.safetensors is missing" in line
    assert "step-00000012 is damaged: rng.json is missing" in line
    assert "give another out_dir for a fresh start" in line


def test_old_saves_of_the_adapter_are_removed(undisturbed):
    assert sorted(p.name for p in (undisturbed / "adapter").iterdir()) == ["LATEST", "epoch-0002", "epoch-0003"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_signal_saves_and_the_same_command_continues(work, undisturbed, number):
    name = f"stopped-{number.name}"
    path = recipe(work, name, checkpoint={"epoch_save": 1})
    process = start_and_wait_for_step(path, work / name, 5)
    process.send_signal(number)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 75, out
    assert (work / name / "checkpoints" / "INTERRUPTED" / "manifest.json").is_file()
    assert f"stopped by {number.name}" in out
    again = train_cli(path)
    assert again.returncode == 0, again.stderr
    assert_same_end(work / name, undisturbed)


def test_stop_file_and_markers_for_launchers(work, undisturbed):
    path = recipe(work, "stopfile")
    marks = {f"RWKV_ACCEL_{n}_FILE": str(work / n) for n in ("STOP", "REQUEUE", "STARTED")}
    (work / "STOP").touch()
    first = train_cli(path, **marks)
    assert first.returncode == 75, first.stderr
    assert (work / "REQUEUE").read_text() == "0\n"
    assert not (work / "STARTED").exists()
    (work / "STOP").unlink()
    os.remove(work / "REQUEUE")
    second = train_cli(path, **marks)
    assert second.returncode == 0, second.stderr
    assert (work / "STARTED").exists()
    assert not (work / "REQUEUE").exists()
    assert_same_end(work / "stopfile", undisturbed)


def test_finished_run_started_again_changes_nothing(work, undisturbed):
    before = weights(undisturbed)
    again = train_cli(work / "undisturbed.yaml")
    assert again.returncode == 0, again.stderr
    after = weights(undisturbed)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert len(records(undisturbed)) == STEPS


@pytest.mark.parametrize(
    ("override", "needle"),
    [
        ("peft.rank=8", "peft.rank"),
        ("optim.lr_init=1e-3", "optim.lr_init"),
        ("data.ctx_len=32", "data.ctx_len"),
        ("trainer.global_batch_size=4", "global_batch_size"),
        ("checkpoint.resume=none", "checkpoint.resume is none"),
    ],
)
def test_contradicting_recipe_is_refused(work, undisturbed, override, needle):
    done = train_cli(work / "undisturbed.yaml", override)
    assert done.returncode == 2
    assert needle in done.stderr
    assert "Traceback" not in done.stderr
