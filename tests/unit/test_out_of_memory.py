"""Memory that runs out: recognised, one message, remedies that fit and that a recipe accepts."""

import pytest
import torch

from rwkv_accel import train as entry
from rwkv_accel.config.load import load_config
from rwkv_accel.out_of_memory import is_out_of_memory, remedies
from rwkv_accel.runtime import launched_strategy
from tests.distributed.forked_launch import launcher_environment

MINIMAL = "out_dir: {out}\nmodel: {{path: base.pth}}\ndata: {{path: a.jsonl, ctx_len: 512}}\n"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL.format(out=tmp_path / "out"))
    return path


def allocation_error():
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("a tensor of an exbibyte was made")


CASES = {
    "gpu": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
    "cpu": (allocation_error(), True),
    "python": (MemoryError(), True),
    "shape": (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    "value": (ValueError("out of memory"), False),
}


@pytest.mark.parametrize("case", CASES)
def test_recognised(case):
    error, expected = CASES[case]
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("case", CASES)
def test_one_message_and_exit_code(recipe, monkeypatch, capsys, case):
    import rwkv_accel.loop

    error, expected = CASES[case]

    def train(config):
        raise error

    monkeypatch.setattr(rwkv_accel.loop, "train", train)
    monkeypatch.setenv("RANK", "3")
    if not expected:
        with pytest.raises(type(error)):
            entry.main([str(recipe)])
        return
    assert entry.main([str(recipe), "trainer.micro_batch_size=6"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory on rank 3 in ")
    assert "no checkpoint was written yet" in line
    assert "trainer.micro_batch_size=3 trainer.accumulate_grad_batches=2 (the same global batch" in line


def test_names_the_newest_checkpoint(recipe, tmp_path, monkeypatch, capsys):
    import rwkv_accel.loop
    from rwkv_accel.checkpoint.format import write_folder

    for step in (3, 6):
        folder = tmp_path / "out" / "checkpoints" / f"step-{step:08d}"
        write_folder(folder, step=step, tensors={}, documents={"state.json": "{}"})
    monkeypatch.setattr(rwkv_accel.loop, "train", lambda config: (_ for _ in ()).throw(MemoryError()))
    assert entry.main([str(recipe)]) == 2
    assert (
        "the newest checkpoint is " + str(tmp_path / "out" / "checkpoints" / "step-00000006") in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("overrides", "strategy", "world", "expected", "absent"),
    [
        (["trainer.micro_batch_size=4", "trainer.global_batch_size=16"], "single", 1,
         ["trainer.micro_batch_size=2 (", "gradient_checkpointing=block", "precision=bf16-mixed", "base_quant=nf4",
          "more processes", "data.ctx_len=256"], ["accumulate", "method=lora"]),
        (["trainer.gradient_checkpointing=block", "trainer.precision=bf16-mixed", "peft.base_quant=nf4"], "zero2", 4,
         ["accelerate_configs/zero3.yaml", "ctx_len"], ["micro_batch", "block", "bf16", "nf4", "more processes"]),
        (["peft.method=full"], "zero3", 2, ["zero3_offload.yaml", "peft.method=lora"], ["base_quant"]),
        ([], "zero3_offload", 2, ["ctx_len"], ["accelerate_configs"]),
    ],
)  # fmt: skip
def test_remedies_fit_the_run(recipe, overrides, strategy, world, expected, absent):
    found = remedies(load_config(recipe, overrides), strategy, world)
    text = "; ".join(found)
    assert all(part in text for part in expected), text
    assert not any(part in text for part in absent), text
    for remedy in found:
        keys = [word for word in remedy.split() if "=" in word]
        # What is advised must be a recipe: one remedy takes the place of what it replaces.
        names = {key.split("=")[0] for key in keys}
        load_config(recipe, [o for o in overrides if o.split("=")[0] not in names] + keys)


def test_a_gpu_can_give_more_to_the_host(recipe, monkeypatch):
    overrides = ["trainer.gradient_checkpointing=block"]
    for has_gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        text = "; ".join(remedies(load_config(recipe, overrides), "single", 1))
        assert ("trainer.gradient_checkpointing=offload" in text) is has_gpu
        assert ("optim.offload=true" in text) is has_gpu
        assert "gradient_checkpointing=block" not in text


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_way_of_launching_is_known_without_an_accelerator(name, monkeypatch):
    for variable, value in {**launcher_environment(name, 2), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    assert launched_strategy() == name


def test_process_that_nobody_launched(monkeypatch):
    for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    assert launched_strategy() == "single"
