"""A user's mistake: one clear line, exit code 2, no traceback, nothing half-written."""

import json

import pytest
import torch

from rwkv_accel.train import main
from tests.helpers import ragged_jsonl, tiny_checkpoint, train_cli, write_recipe


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    base = tiny_checkpoint(folder / "base.pth", n_layer=1)
    ragged_jsonl(folder / "data.jsonl", 8)
    lines = (folder / "data.jsonl").read_text().splitlines()
    (folder / "broken.jsonl").write_text("\n".join([*lines[:3], '{"q": "half', *lines[3:]]) + "\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "truncated.pth").write_bytes(base.read_bytes()[:-4000])
    weights = torch.load(base, weights_only=True)
    torch.save({n.replace("att.r_k", "att.time_maa_x"): w for n, w in weights.items()}, folder / "x060.pth")
    torch.save({n: w for n, w in weights.items() if "ffn.key" not in n}, folder / "lacking.pth")
    (folder / "text.pth").write_text("not a checkpoint")
    tree = {
        "out_dir": str(folder / "out"),
        "model": {"path": str(base)},
        "peft": {"method": "lora", "rank": 2},
        "data": {
            "path": str(folder / "data.jsonl"), "prompt_column": "q", "response_column": "a",
            "tokenizer": "byte", "ctx_len": 64,
        },
    }  # fmt: skip
    write_recipe(folder / "r.yaml", tree)
    return folder


CASES = {
    "recipe missing": (["{work}/nope.yaml"], ["nope.yaml", "does not exist"]),
    "unknown key": (["{r}", "peft.rnak=4"], ["peft.rnak", "peft.rank"]),
    "wrong type": (["{r}", "trainer.max_epochs=many"], ["trainer.max_epochs", "'many'"]),
    "ctx_len 0": (["{r}", "data.ctx_len=0"], ["data.ctx_len", "got 0"]),
    "checkpoint missing": (["{r}", "model.path={work}/base"], ["base", "base.pth"]),
    "checkpoint truncated": (["{r}", "model.path={work}/truncated.pth"], ["truncated"]),
    "checkpoint no checkpoint": (["{r}", "model.path={work}/text.pth"], ["text.pth"]),
    "other architecture": (["{r}", "model.path={work}/x060.pth"], ["RWKV-6", "x070"]),
    "checkpoint lacks a tensor": (["{r}", "model.path={work}/lacking.pth"], ["lacking.pth", "ffn.key.weight"]),
    "data missing": (["{r}", "data.path={work}/no.jsonl"], ["no.jsonl"]),
    "data empty": (["{r}", "data.path={work}/empty.jsonl"], ["empty.jsonl"]),
    "validation data empty": (["{r}", "eval.path={work}/empty.jsonl"], ["empty.jsonl", "read for eval.path"]),
    "state prompt empty": (["{r}", "peft.method=state", "peft.state_prompt=''"], ["peft.state_prompt", "1 character"]),
    "sample prompt empty": (["{r}", "samples.prompts=['']", "samples.raw=true"], ["samples.prompts", "empty"]),
    "broken line": (["{r}", "data.path={work}/broken.jsonl"], ["broken.jsonl", "4"]),
    "missing column": (["{r}", "data.prompt_column=question"], ["question", "q"]),
    "vocabulary too small": (["{r}", "data.tokenizer=world"], ["world", "257"]),
    "target matches nothing": (["{r}", "peft.targets=[att.recptance]"], ["att.recptance", "att.receptance"]),
    "rank above the matrix": (["{r}", "peft.rank=100"], ["100", "64"]),
    "kernels of another device": (
        ["{r}", "model.wkv_backend=triton", "trainer.accelerator=cpu"],
        ["model.wkv_backend", "backend triton cannot run", "take auto or chunked"],
    ),
    "out_dir is a file": (["{r}", "out_dir={work}/data.jsonl/x"], ["out_dir"]),
    "batch does not divide": (
        ["{r}", "trainer.global_batch_size=7", "trainer.micro_batch_size=2"],
        ["global_batch_size 7", "6 or 8"],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("run")
def test_one_clear_line(work, case, tmp_path, capsys):
    args, needles = CASES[case]
    args = [a.format(work=work, r=work / "r.yaml") for a in args]
    if not any(a.startswith("out_dir") for a in args):
        args.append(f"out_dir={tmp_path / 'out'}")
    assert main(args) == 2
    assert_one_line(capsys.readouterr().err, needles)
    # The pulse of a process is removed at its end.
    assert left_in(tmp_path / "out") <= {*LEFT, "rank-0.json"}


LEFT = {".lock", "run.yaml", "environment.json", "train_log.txt", "loss_data.json"}


def left_in(out_dir):
    return {p.name for p in out_dir.glob("**/*") if p.is_file()}


def assert_one_line(said, needles):
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, said
    assert "Traceback" not in said
    for needle in needles:
        assert needle in errors[0]


@pytest.mark.parametrize("case", ["unknown key", "checkpoint truncated", "broken line"])
def test_the_command_says_the_same(work, case, tmp_path):
    args, needles = CASES[case]
    args = [a.format(work=work, r=work / "r.yaml") for a in args]
    done = train_cli(*args, f"out_dir={tmp_path / 'out'}")
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert_one_line(done.stderr, needles)
    assert left_in(tmp_path / "out") <= LEFT


def test_skipping_broken_lines_is_a_choice_and_is_reported(work):
    out_dir = work / "skipped"
    done = train_cli(
        work / "r.yaml", f"data.path={work}/broken.jsonl", "data.on_bad_line=skip", f"out_dir={out_dir}",
        "trainer.max_steps=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 lines skipped" in done.stdout + done.stderr
    assert len(json.loads((out_dir / "loss_data.json").read_text())) == 1


# What is told when the model is made, which a dry run leaves out.
NEEDS_MODEL = {"rank above the matrix", "kernels of another device"}


@pytest.mark.parametrize("case", sorted(CASES.keys() - NEEDS_MODEL))
def test_the_dry_run_says_the_same(work, case, tmp_path, capsys):
    args, needles = CASES[case]
    args = [a.format(work=work, r=work / "r.yaml") for a in args]
    if not any(a.startswith("out_dir") for a in args):
        args.append(f"out_dir={tmp_path / 'out'}")
    assert main([*args, "--dry-run"]) == 2
    assert_one_line(capsys.readouterr().err, needles)
    assert not (tmp_path / "out").exists()


def test_dry_run_tells_where_a_start_continues(work, tmp_path, run, capsys):
    recipe, out_dir = work / "r.yaml", tmp_path / "out"
    changed = [str(recipe), f"out_dir={out_dir}", "trainer.max_steps=2"]
    assert main(changed) == 0
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
    assert main([*changed, "--dry-run"]) == 0
    assert f"resume: from {out_dir}/checkpoints/step-00000002, after step 2" in capsys.readouterr().out
    assert main([*changed, "--dry-run", "optim.lr_init=1"]) == 2
    assert "optim.lr_init was 2e-05 and is now 1.0" in capsys.readouterr().err
    assert main([*changed, f"out_dir={tmp_path / 'new'}", "--dry-run", "peft.load_path=nowhere"]) == 2
    assert "nowhere is no adapter" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")} == before


def test_dry_run_trains_and_writes_nothing(work):
    done = train_cli(work / "r.yaml", f"out_dir={work}/dry", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "6 adapters" in done.stdout
    assert not (work / "dry").exists()
