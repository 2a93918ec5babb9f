"""A rank that comes to a halt is reported by all that still can, with stacks, and told from those that wait for it."""

import json
import re

import pytest

from tests.distributed import stall_worker
from tests.distributed.forked_launch import forked_launch
from tests.helpers import ragged_jsonl, tiny_checkpoint, write_recipe

BUSY = pytest.mark.flaky(reruns=3, reruns_delay=5)
"""What stands still for seconds is the subject here, and a busy machine makes others stand still too.

Each try has an out_dir of its own: a run that is over would only say so.
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stall")
    tiny_checkpoint(folder / "base.pth", n_layer=1, n_embd=32, head_size=16)
    ragged_jsonl(folder / "data.jsonl", 12)
    return folder


def run(inputs, folder, how, **trainer):
    """Trains into folder/out and logs to folder/log; how: what the second rank does, see stall_worker.py."""
    tree = {
        "out_dir": str(folder / "out"),
        "model": {"path": str(inputs / "base.pth")},
        "peft": {"method": "lora", "rank": 2},
        "data": {
            "path": str(inputs / "data.jsonl"), "prompt_column": "q", "response_column": "a", "tokenizer": "byte",
            "ctx_len": 96, "packing": "pad", "overlong": "truncate",
        },
        "trainer": {"max_steps": 4, "max_epochs": 2, "micro_batch_size": 2, **trainer},
        "tracking": {"progress": "none"},
    }  # fmt: skip
    path = write_recipe(folder / "recipe.yaml", tree)
    forked_launch(stall_worker.main, "ddp", 2, str(path), how, log=folder / "log")


@BUSY
def test_report_names_the_rank_its_phase_and_its_stack(inputs, tmp_path):
    run(inputs, tmp_path, "hang", stall_timeout_seconds=3)
    # The last report of each: a machine that is very busy may look stalled before.
    waiting, hanging = (
        "stall:" + (tmp_path / "out" / f"stall-rank{rank}.txt").read_text().split("stall:")[-1] for rank in (0, 1)
    )
    for text in (waiting, hanging):
        assert "stall: no rank has made progress for" in text
        assert re.search(r"rank 1 is behind.*; pid \d+ on .*: training, forward pass, step 3", text)
        assert "rank 0 is behind" not in text
    assert "this is rank 0 of 2" in waiting
    assert "training, backward pass, step 3" in waiting
    assert "in train_window" in waiting
    assert "wait_in_vain" not in waiting
    assert "this is rank 1 of 2" in hanging
    assert "in wait_in_vain" in hanging
    assert "in wait_in_vain" in (tmp_path / "log").read_text()
    # It went on after all: nothing was ended, and the run was finished.
    assert len(json.loads((tmp_path / "out" / "loss_data.json").read_text())) == 4
    assert not (tmp_path / "out" / "heartbeat").exists()


@BUSY
def test_stopped_process_is_named_by_the_others_which_end(inputs, tmp_path):
    with pytest.raises(AssertionError, match=r"exit codes \[70, -9\]"):
        run(inputs, tmp_path, "stop", stall_timeout_seconds=5, stall_action="exit")
    text = (tmp_path / "out" / "stall-rank0.txt").read_text()
    assert "rank 1 is behind and is stopped as a whole or gone; pid" in text
    assert "in train_window" in text
    assert not (tmp_path / "out" / "stall-rank1.txt").exists()
