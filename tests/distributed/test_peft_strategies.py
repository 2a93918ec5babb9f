"""Every PEFT method on every kind of base gives the same adapter under every strategy; the table in docs/peft.md
says what this file runs.

SGD, because Adam hides a wrong scale of the gradient; AdamW under offload, where DeepSpeed has no other.
"""

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from rwkv_accel.config.schema import PeftConfig
from tests.helpers import ROOT, launch, ragged_jsonl, tiny_checkpoint, write_recipe

STEPS = 3
LR = {"sgd": 0.5, "adamw": 1e-3}
TOLERANCE = {"sgd": 1e-6, "adamw": 1e-5}
STRATEGIES = ("cpu", "ddp", "fsdp2", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
BASES = ("none", "nf4", "int8")
SECTIONS = {
    "lora": {"method": "lora", "rank": 4, "alpha": 8},
    "dora": {"method": "dora", "rank": 4},
    "pissa": {"method": "pissa", "rank": 4},
    "miss": {"method": "miss", "rank": 4},
    "state": {"method": "state"},
    "parts": {"method": "parts", "train_parts": ["ln", "vectors"]},
    "full": {"method": "full"},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft-strategies")
    tiny_checkpoint(folder / "base.pth")
    ragged_jsonl(folder / "data.jsonl")
    return folder


def recipe(work, name, method, base, micro, optimizer):
    tree = {
        "out_dir": str(work / name),
        "model": {"path": str(work / "base.pth")},
        "peft": {**SECTIONS[method], "base_quant": base},
        "data": {
            "path": str(work / "data.jsonl"), "prompt_column": "q", "response_column": "a", "tokenizer": "byte",
            "ctx_len": 48, "packing": "pad", "overlong": "truncate",
        },
        "optim": {"optimizer": optimizer, "lr_init": LR[optimizer], "schedule": "constant"},
        "trainer": {"max_steps": STEPS, "micro_batch_size": micro, "global_batch_size": 4, "gradient_clip_val": 0.05},
        "tracking": {"progress": "none"},
    }  # fmt: skip
    return write_recipe(work / f"{name}.yaml", tree)


def weights(out_dir):
    folder = out_dir / "adapter" / (out_dir / "adapter" / "LATEST").read_text().strip()
    if (folder / "model.pth").is_file():
        return torch.load(folder / "model.pth")
    return load_file(folder / "adapter.safetensors")


def optimizer_for(strategy):
    return "adamw" if "offload" in strategy else "sgd"


def run_all(work, strategy, world, cells, optimizer="sgd"):
    names = {cell: f"{strategy}-{optimizer}-{'-'.join(cell)}" for cell in cells}
    recipes = [recipe(work, names[cell], *cell, 4 // world, optimizer) for cell in cells]
    launch(strategy, world, "tests/distributed/train_many.py", *recipes, timeout=1200)
    return {cell: weights(work / name) for cell, name in names.items()}


def refused(method, base):
    try:
        PeftConfig.model_validate({**SECTIONS[method], "base_quant": base})
    except ValidationError:
        return True
    return False


CELLS = [(method, base) for method in SECTIONS for base in BASES if not refused(method, base)]
FEW = [("lora", "int8"), ("dora", "nf4"), ("pissa", "nf4"), ("miss", "int8"), ("state", "nf4")]


def assert_same(found, expected, optimizer):
    for cell, tensors in found.items():
        assert tensors.keys() == expected[cell].keys(), cell
        worst = max((tensors[name] - expected[cell][name]).abs().max().item() for name in tensors)
        assert worst < TOLERANCE[optimizer], (cell, worst)


@pytest.mark.parametrize("strategy", ["zero3"])
def test_same_adapter_as_one_process(work, few_reference, strategy):
    assert_same(run_all(work, strategy, 2, FEW), few_reference, "sgd")


@pytest.fixture(scope="module")
def few_reference(work):
    return run_all(work, "cpu", 1, FEW)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_whole_table(work):
    expected = {optimizer: run_all(work, "cpu", 1, CELLS, optimizer) for optimizer in LR}
    for strategy in STRATEGIES:
        if strategy != "cpu":
            optimizer = optimizer_for(strategy)
            assert_same(run_all(work, strategy, 2, CELLS, optimizer), expected[optimizer], optimizer)


def table():
    """The compatibility table: one row per method and base, one column per strategy."""
    lines = [f"| method | base_quant | {' | '.join(STRATEGIES)} |", "|---|---|" + "---|" * len(STRATEGIES)]
    for method in SECTIONS:
        for base in BASES:
            cell = "yes" if (method, base) in CELLS else "refused"
            lines.append(f"| {method} | {base} | {' | '.join([cell] * len(STRATEGIES))} |")
    return "\n".join(lines)


def test_the_documented_table_is_what_this_file_runs():
    assert table() in (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
