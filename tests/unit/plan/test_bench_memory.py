"""The memory that is promised: at most 0.8 GB above the base's weights in every released shape, by count."""

import json
from pathlib import Path

import pytest
import torch

from rwkv_accel.bench import __main__ as bench
from rwkv_accel.bench import memory
from rwkv_accel.bench.harness import Options, Row
from rwkv_accel.config.load import load_config
from rwkv_accel.config.schema import OptimConfig

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "lora_2b9_small.yaml"
WORKSPACE = 32 * 2**20 / 1e9
"""Of cuBLAS on Hopper, which the count leaves out."""


@pytest.mark.parametrize("shape", memory.SHAPES)
@pytest.mark.parametrize("quant", memory.BASES)
def test_at_most_eight_tenths_of_a_gigabyte(shape, quant):
    above, note = memory.counted(shape, quant, memory.SMALL, memory.SMALL_OPTIM)
    assert 0.1 < above < 0.8 - WORKSPACE
    layers, channels = memory.SHAPES[shape]
    # att.receptance .. att.output [C,C], ffn.key [4C,C], ffn.value [C,4C], each with two factors of rank 64.
    num_trained = layers * 64 * (4 * 2 * channels + 2 * 5 * channels)
    assert above > 2 * 2 * num_trained / 1e9
    assert note.startswith(f"adapters {2 * num_trained / 1e9:.2f}, gradients {2 * num_trained / 1e9:.2f}, moments 0.00")


def test_where_the_moments_lie_counts():
    on_gpu, _ = memory.counted("2.9B", "none", memory.SMALL, OptimConfig())
    on_host, _ = memory.counted("2.9B", "none", memory.SMALL, memory.SMALL_OPTIM)
    # Two moments in bf16, as the weights are.
    assert on_gpu - on_host == pytest.approx(2 * 2 * 94371840 / 1e9)
    usual, _ = memory.counted("2.9B", "none", memory.USUAL, OptimConfig())
    assert usual > 2 * on_host


def test_the_recipe_has_the_settings_that_are_counted():
    config = load_config(RECIPE)
    for key in ("precision", "gradient_checkpointing", "loss_chunk_rows"):
        assert getattr(config.trainer, key) == getattr(memory.SMALL, key)
    assert config.optim.offload == memory.SMALL_OPTIM.offload
    assert (config.peft.rank, config.data.ctx_len, config.trainer.micro_batches(1)) == (memory.RANK, memory.CTX, 1)
    assert config.trainer.micro_batch_size == 1


def test_rows(monkeypatch):
    monkeypatch.setattr(memory, "SHAPES", {"0.1B": (12, 768)})
    rows = list(memory.measure(Options(1, 1, "cpu")))
    assert [row.name.split("base ")[1] for row in rows] == [
        f"{base}: peak above the base's weights, by count" for base in ("bf16", "nf4")
    ]
    assert all(row.ratio > 2 for row in rows)


def test_a_case_that_fails_keeps_the_rows_of_all(monkeypatch, capsys, tmp_path):
    def fails(options):
        yield Row("first", 1.0, "ms")
        # On disk by now, whatever becomes of this process.
        assert "first" in (tmp_path / "rows.json").read_text()
        raise ValueError("no such\nthing")

    monkeypatch.setattr(memory, "measure", fails)
    monkeypatch.setattr(
        bench, "CASES", {"memory": ("rwkv_accel.bench.memory", ""), "again": ("rwkv_accel.bench.memory", "")}
    )
    # More threads than before would stay for the tests that follow.
    threads = ["--threads", str(torch.get_num_threads())]
    assert bench.main(["memory", "again", "--json", str(tmp_path / "rows.json"), *threads]) == 1
    out = capsys.readouterr().out
    assert "| memory | first | 1 ms |" in out
    assert "| again | **failed** ValueError: no such thing |" in out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"] for case in ("memory", "again") for row in rows[case]] == ["first", "first"]
