"""One update is one update: however the rows are spread over micro-batches, processes and sharding strategies.

SGD, because Adam hides a wrong scale of the gradient.
"""

import json

import pytest
import torch

from rwkv_accel.config.load import load_config
from rwkv_accel.schedules import lr_at, wd_at
from tests.helpers import launch, ragged_jsonl, tiny_checkpoint, write_recipe

STEPS, GLOBAL_BATCH = 5, 8
SPLITS = {1: (1, 2, 4, 8), 2: (1, 2, 4)}  # micro-batch sizes by world size
STRATEGIES = [
    ("cpu", 1), ("ddp", 2), ("fsdp2", 2), ("zero1", 1), ("zero1", 2), ("zero2", 2), ("zero3", 1), ("zero3", 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strategies")
    tiny_checkpoint(folder / "base.pth")
    ragged_jsonl(folder / "data.jsonl")
    return folder


def recipe(work, name, micro, strategy="single", world=1, **trainer):
    tree = {
        "out_dir": str(work / name),
        "model": {"path": str(work / "base.pth")},
        "peft": {"method": "lora", "rank": 4, "train_parts": ["ln", "head"]},
        "data": {
            "path": str(work / "data.jsonl"), "prompt_column": "q", "response_column": "a", "tokenizer": "byte",
            "ctx_len": 48, "packing": "pad", "overlong": "truncate",
        },
        "optim": {
            "optimizer": "sgd", "lr_init": 0.5, "lr_final": 0.05, "schedule": "linear", "warmup_steps": 2,
            "weight_decay": 0.1, "weight_decay_final": 0.01, "lr_scale": {"lora_B": 4.0},
        },
        "trainer": {
            "max_steps": STEPS, "micro_batch_size": micro, "global_batch_size": GLOBAL_BATCH,
            "gradient_clip_val": 0.05,
            # What the launcher gives, so that the run itself confirms it.
            "gradient_checkpointing": {2: "selective", 4: "block"}.get(micro, "none"),
            "strategy": "single" if strategy == "cpu" else strategy, "devices": world, "num_nodes": 1, **trainer,
        },
        "tracking": {"progress": "none"},
    }  # fmt: skip
    return write_recipe(work / f"{name}.yaml", tree)


@pytest.fixture(scope="module")
def reference(work):
    path = recipe(work, "reference", 8)
    launch("cpu", 1, "-m", "rwkv_accel.train", path)
    return weights(work / "reference")


def weights(out_dir):
    from safetensors.torch import load_file

    name = (out_dir / "adapter" / "LATEST").read_text().strip()
    return load_file(out_dir / "adapter" / name / "adapter.safetensors")


def losses(out_dir):
    return [record["loss"] for record in json.loads((out_dir / "loss_data.json").read_text())]


@pytest.mark.parametrize(("strategy", "world"), STRATEGIES, ids=lambda v: str(v))
def test_same_weights_under_every_split_and_strategy(work, reference, strategy, world):
    names = {micro: f"{strategy}-{world}-{micro}" for micro in SPLITS[world]}
    recipes = [recipe(work, name, micro, strategy, world) for micro, name in names.items()]
    launch(strategy, world, "tests/distributed/train_many.py", *recipes)
    moved = max((t.abs().max() for n, t in reference.items() if n.endswith("lora_B")))
    assert moved > 1e-3
    for name in names.values():
        out_dir = work / name
        got = weights(out_dir)
        assert got.keys() == reference.keys()
        worst = max((got[n] - reference[n]).abs().max().item() for n in reference)
        assert worst < 1e-6, (name, worst)
        assert losses(out_dir) == pytest.approx(losses(work / "reference"), rel=1e-6)
        check_engine(out_dir, load_config(work / f"{name}.yaml").optim)


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "fsdp2"])
def test_compiled_blocks_train_the_same_weights(work, reference, strategy, checkpointing):
    name = f"compiled-{strategy}-{checkpointing}"
    path = recipe(work, name, 2, strategy, 2, compile="aot_eager", gradient_checkpointing=checkpointing)
    launch(strategy, 2, "-m", "rwkv_accel.train", path)
    got = weights(work / name)
    assert max((got[n] - reference[n]).abs().max().item() for n in reference) < 1e-6
    assert losses(work / name) == pytest.approx(losses(work / "reference"), rel=1e-6)


def check_engine(out_dir, optim):
    seen = json.loads((out_dir / "engine.json").read_text())
    assert len(seen) == STEPS
    for step, groups in enumerate(seen):
        lr, wd = lr_at(step, STEPS, optim), wd_at(step, STEPS, optim)
        scale = {"lora_B": 4.0}
        for name, group_lr, group_wd in groups:
            assert group_lr == pytest.approx(lr * scale.get(name, 1.0), rel=1e-12)
            assert group_wd == pytest.approx(wd if name == "head" else 0.0, rel=1e-12)


def test_saved_file_holds_no_base_tensor(work, reference):
    base = torch.load(work / "base.pth", weights_only=True)
    trained_parts = {n for n in base if "ln" in n} | {"head.weight"}
    assert {n for n in reference if n in base} == trained_parts
