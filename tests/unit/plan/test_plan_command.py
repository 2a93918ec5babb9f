"""The planner's command: sizes, choices, length and speed of a run, and where each number comes from."""

import json

import pytest

from rwkv_accel.config.load import load_config
from rwkv_accel.errors import UserError
from rwkv_accel.plan import run_plan
from rwkv_accel.plan.__main__ import main
from rwkv_accel.plan.communication import update_of
from rwkv_accel.plan.memory import USABLE, training_of
from rwkv_accel.plan.run_plan import RELEASED, Question, make_run_plan, measured_speed, recommend, shape_of
from tests.helpers import ragged_jsonl, tiny_checkpoint, write_recipe

GIB = 2**30


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    tiny_checkpoint(folder / "base.pth", n_layer=3)
    ragged_jsonl(folder / "data.jsonl", 32)
    tree = {
        "out_dir": str(folder / "out"),
        "model": {"path": str(folder / "base.pth")},
        "peft": {"method": "lora", "rank": 4},
        "data": {
            "path": str(folder / "data.jsonl"), "prompt_column": "q", "response_column": "a", "tokenizer": "byte",
            "ctx_len": 64, "packing": "pad",
        },
        "trainer": {"global_batch_size": 8, "max_epochs": 2},
    }  # fmt: skip
    write_recipe(folder / "r.yaml", tree)
    return folder


def config(work, *overrides):
    return load_config(work / "r.yaml", overrides)


def question(**changes):
    return Question(**{"gpus": 2, "gpu_bytes": GIB, "gpus_per_node": 8, "micro_batches": (1, 2, 4), **changes})


@pytest.fixture(scope="module")
def plan(work):
    return make_run_plan(config(work), question())


def test_every_strategy_micro_batch_and_mode_is_there(plan):
    found = {(e.strategy, e.micro_batch_size, e.checkpointing) for e in plan.estimates}
    strategies = {"ddp", "fsdp2", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"}
    assert found == {
        (s, m, c) for s in strategies for m in (1, 2, 4) for c in ("none", "selective", "block", "offload")
    }
    assert {e.accumulation * e.micro_batch_size for e in plan.estimates} == {4}


def test_more_rows_and_less_recomputing_take_more(plan):
    peaks = {(e.micro_batch_size, e.checkpointing): e.peak for e in plan.estimates if e.strategy == "ddp"}
    assert peaks[1, "none"] < peaks[2, "none"] < peaks[4, "none"]
    kept = {mode: activations.kept for mode, activations in plan.activations.items()}
    assert kept["offload"] < kept["block"] < kept["selective"] < kept["none"]


def test_traffic_is_that_of_the_one_source_of_formulas(plan):
    for e in plan.estimates:
        shared = {"fsdp2": "zero3"}.get(e.strategy, e.strategy.removesuffix("_offload"))
        assert e.sent == update_of(shared, training_of(plan.weights, e.accumulation)).bytes_per_process(2)


def test_length_is_that_of_the_data(plan):
    # 32 rows in updates of 8, twice.
    assert (plan.steps, plan.tokens) == (8, 8 * 8 * 64)
    assert any("the data, rows taken as full" in source for source in plan.sources)


def test_recommendation_is_the_fastest_that_fits(plan):
    best, reason = recommend(plan.estimates, 1024 * GIB, "none")
    fastest = min(e.seconds / (e.micro_batch_size * e.accumulation) for e in plan.estimates)
    assert best.seconds / (best.micro_batch_size * best.accumulation) == pytest.approx(fastest)
    assert best.checkpointing != "block"
    smallest = sorted({e.peak for e in plan.estimates})
    just_one, _ = recommend(plan.estimates, smallest[0] / USABLE + 1, "none")
    assert just_one.peak == smallest[0]
    none, reason = recommend(plan.estimates, smallest[0] / USABLE - 1e6, "none")
    assert none is None
    assert "nothing fits" in reason
    assert "peft.base_quant=nf4" in reason


def test_speed_asked_for_measured_or_assumed(work, plan, tmp_path):
    asked = make_run_plan(config(work), question(throughput=64.0, micro_batches=(1,)))
    assert asked.seconds == 64.0
    records = [{"kt_s": kt} for kt in (0.1, 0.1, 2.0, 4.0)]
    (tmp_path / "loss_data.json").write_text(json.dumps(records))
    (tmp_path / "environment.json").write_text(json.dumps({"world_size": 4}))
    speed, source = measured_speed(tmp_path, 8)
    assert speed == 1000 * 3.0 * 2
    assert "on 4 processes" in source
    with pytest.raises(UserError, match="is not the folder of a run"):
        measured_speed(tmp_path / "none", 8)
    assert any("assumed: 400 TFLOP/s" in source for source in plan.sources)


def test_length_without_the_data(work, monkeypatch):
    for overrides, expected in (
        (["trainer.max_steps=5"], (5, 5 * 8 * 64)),
        (["trainer.max_tokens=7777"], (None, 7777)),
        ([], (None, None)),
    ):
        found = run_plan.length_of(config(work, "data.path=away.jsonl", *overrides), 2)
        assert found[:2] == expected


@pytest.mark.parametrize("size", RELEASED)
def test_sizes_of_the_released_models(work, size):
    shape, source = shape_of(config(work, f"model.path=gone/rwkv7-{size.upper()}-world.pth"), None)
    assert (shape.n_layer, shape.n_embd) == RELEASED[size]
    assert "the file is not here" in source


def test_size_from_header_init_or_option(work):
    assert shape_of(config(work), None)[0].n_layer == 3
    assert shape_of(config(work), "5x128x300")[0].vocab_size == 300
    init = config(work, "model={init: {n_layer: 2, n_embd: 64}}")
    assert shape_of(init, None)[0].n_layer == 2
    with pytest.raises(UserError, match=r"give --model 1\.5b"):
        shape_of(config(work, "model.path=gone.pth"), None)
    with pytest.raises(UserError, match="neither a released size"):
        shape_of(config(work), "1.6b")


def test_command_prints_a_table_and_json(work, capsys):
    args = [str(work / "r.yaml"), "peft.rank=2", "--gpus", "2", "--gpu-mem", "1", "--micro", "1,2"]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "recommended: --config_file accelerate_configs/" in text
    assert "run: 8 updates, 4,096 tokens" in text
    assert text.count("from ") >= 6
    assert main([*args, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert {e["micro_batch_size"] for e in tree["estimates"]} == {1, 2}
    assert tree["weights"]["num_trained"] == 3 * (4 * 2 * 128 + 2 * 2 * 320)


def test_a_recommendation_that_changes_the_batch_says_so(work, capsys):
    args = [str(work / "r.yaml"), "trainer.global_batch_size=null", "--gpus", "2", "--gpu-mem", "1", "--micro"]
    note = (
        "makes 8 rows per update of its 2, with which the run is counted; trainer.global_batch_size=2 would keep them"
    )
    assert main([*args, "4"]) == 0
    assert note in capsys.readouterr().out
    assert main([*args, "1"]) == 0
    assert "note:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "needle"),
    [
        (["--micro", "0"], "write sizes like 1,2,4"),
        (["--gpus", "3"], "not a multiple of 3 GPUs"),
        (["--gpus", "0"], "must be above 0"),
        (["peft.rnak=2"], "peft.rank"),
    ],
)
def test_mistakes_are_one_line(work, capsys, args, needle):
    assert main([str(work / "r.yaml"), *args]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert needle in line
