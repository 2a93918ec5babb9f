"""A tiny run in the test's own process. Modules with a `work` of their own replace this one."""

import signal

import pytest
import torch

from rwkv_accel.interrupt import SIGNALS
from rwkv_accel.train import main
from tests.helpers import ragged_jsonl, tiny_checkpoint, write_recipe


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a base of one block, 20 documents and r.yaml, a recipe of 10 updates over them."""
    folder = tmp_path_factory.mktemp("switches")
    tiny_checkpoint(folder / "base.pth", n_layer=1)
    ragged_jsonl(folder / "data.jsonl", 20)
    tree = {
        "out_dir": str(folder / "out"),
        "model": {"path": str(folder / "base.pth")},
        "peft": {"method": "lora", "rank": 2, "targets": ["att.key"]},
        "data": {
            "path": str(folder / "data.jsonl"), "prompt_column": "q", "response_column": "a", "tokenizer": "byte",
            "ctx_len": 48, "packing": "pad", "overlong": "truncate",
        },
        "trainer": {"micro_batch_size": 2},
        "checkpoint": {"epoch_save": 0},
        "tracking": {"progress": "none"},
    }  # fmt: skip
    write_recipe(folder / "r.yaml", tree)
    return folder


@pytest.fixture
def run(work, tmp_path):
    """Run r.yaml with overrides in this process; gives the exit code. The process is left as it was."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def call(*overrides):
        return main([str(work / "r.yaml"), f"out_dir={tmp_path / 'out'}", *overrides])

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False
    torch.autograd.set_detect_anomaly(False)
