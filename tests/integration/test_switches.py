"""Every switch of the section `trainer` changes what a run does; all in one process."""

import itertools
import json
import os

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rwkv_accel import limits
from tests.helpers import launch, train_cli


def read(path):
    return json.loads(path.read_text())


def steps(tmp_path):
    return [r["step"] for r in read(tmp_path / "out" / "loss_data.json")]


def eval_steps(tmp_path):
    return [r["step"] for r in read(tmp_path / "out" / "eval_data.json")]


def error_of(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


EVAL = ("eval.split_fraction=0.2", "eval.keep_best=false")  # 16 rows to train on: 8 updates per epoch, 4 rows held out


def test_limit_train_batches(run, tmp_path):
    assert run("trainer.limit_train_batches=3", "trainer.max_epochs=2") == 0
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [r["epoch"] for r in read(tmp_path / "out" / "loss_data.json")] == [0, 0, 0, 1, 1, 1]


def test_overfit_batches_repeats_its_rows(run, tmp_path):
    """At a rate of nothing the losses of an epoch are those of the epoch before, which shuffled rows never give."""
    assert run("trainer.overfit_batches=2", "trainer.max_epochs=3", "optim.lr_init=0") == 0
    losses = [r["loss"] for r in read(tmp_path / "out" / "loss_data.json")]
    assert losses == losses[:2] * 3
    assert losses[0] != losses[1]


def test_max_tokens_ends_the_run_and_the_schedule(run, tmp_path):
    assert run("optim.lr_final=0", "optim.schedule=linear") == 0
    records = read(tmp_path / "out" / "loss_data.json")
    tokens = sum(r["tokens"] for r in records[:4]) - 1
    assert (
        run(
            f"out_dir={tmp_path}/short/out", "optim.lr_final=0", "optim.schedule=linear", f"trainer.max_tokens={tokens}"
        )
        == 0
    )
    short = read(tmp_path / "short" / "out" / "loss_data.json")
    assert [r["tokens"] for r in short] == [r["tokens"] for r in records[:4]]
    assert [r["lr"] for r in short] == pytest.approx([2e-5, 1.5e-5, 1e-5, 0.5e-5])


@pytest.fixture
def clock(monkeypatch):
    """max_time counts looks at the clock, of a second each: no test may depend on how fast the machine is."""

    def limits_of(*args, started_at):
        return limits.RunLimits(*args, started_at=0.0, clock=itertools.count(1).__next__)

    monkeypatch.setattr("rwkv_accel.run_setup.RunLimits", limits_of)


def test_max_time_ends_in_order_and_the_same_command_continues(run, tmp_path, clock, capsys):
    limit = ("trainer.max_time=3600", "trainer.max_epochs=1")
    assert run(*limit) == 0
    everything = steps(tmp_path)
    assert everything == list(range(1, 11))
    out = tmp_path / "again" / "out"
    done = []
    for _ in range(9):
        # A start looks before each epoch and after each update.
        assert run(f"out_dir={out}", "trainer.max_time=00:00:00:04") == 0
        done.append(read(out / "loss_data.json")[-1]["step"])
        if done[-1] == 10:
            break
    assert done[-1] == 10
    assert len(done) > 2
    assert done == sorted(set(done))
    assert (out / "adapter" / f"step-{done[0]:08d}").is_dir()
    assert (
        f"trainer.max_time is up after step {done[0]} of 10"
        in capsys.readouterr().err + (out / "train_log.txt").read_text()
    )


def test_min_steps_holds_off_the_clock(run, tmp_path, clock):
    assert run("trainer.max_time=1", "trainer.min_steps=6") == 0
    assert steps(tmp_path)[-1] == 6


def test_min_steps_holds_off_early_stopping(run, tmp_path):
    # At a rate of nothing the loss never improves: patience 0 ends the run with the second evaluation.
    stop = (*EVAL, "eval.every_n_steps=1", "eval.every_n_epochs=null", "eval.early_stop_patience=0", "optim.lr_init=0")
    assert run(*stop) == 0
    assert steps(tmp_path)[-1] == 2
    assert run(f"out_dir={tmp_path}/long/out", *stop, "trainer.min_steps=5") == 0
    assert steps(tmp_path / "long")[-1] == 5


def test_min_steps_above_the_run_is_refused(run, capsys):
    assert run("trainer.min_steps=11") == 2
    assert "min_steps 11 is above the 10 updates" in error_of(capsys)


def test_familiar_names_of_validation_work(run, tmp_path, caplog):
    assert run(*EVAL, "trainer.val_check_interval=0.5", "trainer.check_val_every_n_epoch=1") == 0
    # Half of 8 updates, and the end of the epoch only once.
    assert eval_steps(tmp_path) == [4, 8]
    assert "trainer.val_check_interval is eval.every_n_steps here" in caplog.text


@pytest.mark.parametrize("name", ["trainer.check_val_every_n_epoch", "eval.every_n_epochs"])
def test_check_val_every_n_epoch(run, tmp_path, name):
    assert run(*EVAL, f"{name}=2", "trainer.max_epochs=4", "trainer.limit_train_batches=1") == 0
    assert eval_steps(tmp_path) == [2, 4]


@pytest.mark.parametrize(
    ("overrides", "is_told"),
    [
        (["trainer.max_steps=2"], True),
        (["trainer.max_steps=2", "eval.every_n_steps=3"], True),
        (["trainer.max_steps=2", "eval.every_n_steps=2"], False),
        (["trainer.max_steps=2", "eval.at_start=true"], False),
        (["trainer.limit_train_batches=2"], False),
        (["trainer.limit_train_batches=2", "eval.every_n_epochs=2"], True),
    ],
)
def test_a_run_that_ends_before_its_first_validation_says_so(run, tmp_path, overrides, is_told):
    assert run(*EVAL, *overrides) == 0
    assert (eval_steps(tmp_path) == []) == is_told
    said = (tmp_path / "out" / "train_log.txt").read_text()
    assert ("no validation falls within the 2 updates of this run" in said) == is_told


@pytest.mark.parametrize(("limit", "rows"), [("1", 2), ("0.5", 2), ("1.0", 4), ("9", 4)])
def test_limit_val_batches(run, tmp_path, limit, rows):
    name = "eval.limit_batches" if limit == "9" else "trainer.limit_val_batches"
    assert run(*EVAL, "trainer.max_steps=1", "eval.every_n_steps=1", f"{name}={limit}") == 0
    every = tmp_path / "every"
    assert run(f"out_dir={every}/out", *EVAL, "trainer.max_steps=1", "eval.every_n_steps=1") == 0
    ours, theirs = (read(p / "out" / "eval_data.json")[0]["target_tokens"] for p in (tmp_path, every))
    assert (ours == theirs) == (rows == 4)
    assert 0 < ours <= theirs


def test_fast_dev_run_does_everything_and_leaves_nothing(run, tmp_path, capsys, work):
    before = sorted(p.name for p in work.iterdir())
    assert run(*EVAL, "trainer.fast_dev_run=2", "samples.prompts=[who runs]", "tracking.trackers=[tensorboard]") == 0
    out = capsys.readouterr().out
    assert "fast_dev_run: 2 updates, loss" in out
    assert "validation loss" in out
    assert "1 answers" in out
    assert list(tmp_path.iterdir()) == []
    assert sorted(p.name for p in work.iterdir()) == before


def test_fast_dev_run_beside_a_finished_run_leaves_it_alone(run, tmp_path):
    assert run("trainer.max_steps=1") == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert run("trainer.max_steps=1", "trainer.fast_dev_run=true") == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}.keys() == before.keys()
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p.is_file())


def test_profiler_leaves_a_trace_of_three_updates(run, tmp_path):
    assert run("trainer.profiler=pytorch", "trainer.max_steps=7") == 0
    (trace,) = (tmp_path / "out" / "profile").iterdir()
    assert trace.name == "step-00000005.json"
    names = [event["name"] for event in read(trace)["traceEvents"] if "name" in event]
    assert {n for n in names if n.startswith("ProfilerStep#")} == {f"ProfilerStep#{i}" for i in (2, 3, 4)}
    assert "aten::mm" in names
    assert any("wkv7" in n.lower() for n in names)


def test_profiler_of_a_run_that_is_too_short_says_so(run, tmp_path):
    assert run("trainer.profiler=pytorch", "trainer.max_steps=2") == 0
    assert not (tmp_path / "out" / "profile").exists()
    assert "profiler: no trace" in (tmp_path / "out" / "train_log.txt").read_text()


def test_deterministic_reaches_torch(run, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    x, index = torch.zeros(3), torch.tensor([0, 0])
    x.put_(index, torch.ones(2))  # which of the two wins is not defined
    assert run("trainer.deterministic=true", "trainer.max_steps=1") == 0
    with pytest.raises(RuntimeError, match="deterministic"):
        x.put_(index, torch.ones(2))
    assert torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert run("trainer.deterministic=warn", "trainer.max_steps=2") == 0
    with pytest.warns(UserWarning, match="deterministic"):
        x.put_(index, torch.ones(2))
    assert run("trainer.max_steps=3") == 0
    x.put_(index, torch.ones(2))
    assert not torch.backends.cudnn.deterministic


def test_benchmark_reaches_cudnn(run):
    for value in (True, False):
        assert run(f"trainer.benchmark={value}", "trainer.max_steps=1") == 0
        assert torch.backends.cudnn.benchmark == value


def test_detect_anomaly_stops_at_the_operation(run, monkeypatch):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    from rwkv_accel.model.channel_mix import ChannelMix

    original = ChannelMix.forward
    monkeypatch.setattr(ChannelMix, "forward", lambda self, *args: Bad.apply(original(self, *args)))
    # The adapter lies in front of the channel mix.
    with pytest.raises(RuntimeError, match="BadBackward"):
        run("trainer.detect_anomaly=true", "trainer.max_steps=1")


def test_gpu_that_is_not_there_is_refused(run, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("trainer.accelerator=gpu") == 2
    assert "trainer.accelerator is gpu" in error_of(capsys)


def test_cpu_hides_the_gpus(run, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert run("trainer.accelerator=cpu", "trainer.max_steps=1") == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("override", "needles"),
    [
        ("trainer.devices=2", ("trainer.devices is 2", "started 1 processes per node")),
        ("trainer.num_nodes=2", ("trainer.num_nodes is 2", "started 1 nodes")),
        ("trainer.strategy=zero2", ("trainer.strategy is zero2", "set up single", "accelerate_configs/zero2.yaml")),
    ],
)
def test_what_the_launcher_did_not_give_is_one_line(run, capsys, override, needles):
    assert run(override) == 2
    line = error_of(capsys)
    assert all(needle in line for needle in needles)


def test_what_the_launcher_gave_is_accepted(run, tmp_path):
    assert run("trainer.strategy=single", "trainer.devices=1", "trainer.num_nodes=1", "trainer.max_steps=1") == 0
    assert steps(tmp_path) == [1]


def test_other_strategy_than_the_launchers_is_one_line(work, tmp_path):
    args = ("trainer.num_nodes=1", "trainer.devices=2", "trainer.strategy=zero3", f"out_dir={tmp_path}/out")
    done = launch("ddp", 2, "-m", "rwkv_accel.train", work / "r.yaml", *args, check=False)
    assert done.returncode != 0
    assert done.stderr.count("trainer.strategy is zero3, but the launcher set up ddp") == 1


def test_error_of_a_switch_is_quick_and_clear(work):
    done = train_cli(work / "r.yaml", "trainer.deterministc=true")
    assert done.returncode == 2
    assert "did you mean trainer.deterministic?" in done.stderr


def test_recipe_of_the_rehearsal_is_a_valid_recipe(work, tmp_path):
    from rwkv_accel.config.load import dump_config, load_config
    from rwkv_accel.rehearsal import rehearsal_config

    config = load_config(work / "r.yaml", ["trainer.fast_dev_run=3", *EVAL])
    (tmp_path / "short.yaml").write_text(dump_config(rehearsal_config(config)))
    assert load_config(tmp_path / "short.yaml") == rehearsal_config(config)
    assert yaml.safe_load((tmp_path / "short.yaml").read_text())["trainer"]["max_steps"] == 3


def test_compile_reaches_the_blocks(run, monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kwargs: compiled.append((type(self).__name__, kwargs))
    )
    assert run("trainer.compile=aot_eager", "trainer.max_steps=1") == 0
    assert compiled == [("Block", {"backend": "aot_eager"})]


def test_offload_on_a_cpu_is_said_to_be_block(run, caplog, tmp_path):
    for mode in ("block", "offload"):
        caplog.clear()
        path = f"out_dir={tmp_path}/{mode}/out"
        assert run(path, f"trainer.gradient_checkpointing={mode}", "trainer.max_steps=2") == 0
        remarks = [r.getMessage() for r in caplog.records if "gradient_checkpointing offload" in r.getMessage()]
        assert len(remarks) == (mode == "offload")
    losses = [[r["loss"] for r in read(tmp_path / mode / "out" / "loss_data.json")] for mode in ("block", "offload")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("overrides", "needle"),
    [
        (
            ["trainer.deterministic=true", "trainer.benchmark=true"],
            "one of trainer.deterministic and trainer.benchmark",
        ),
        (["trainer.overfit_batches=1", "trainer.limit_train_batches=1"], "not both"),
        (["trainer.min_steps=4", "trainer.max_steps=3"], "4 is above 3"),
        (["trainer.max_time=1:x"], "DD:HH:MM:SS"),
        (["trainer.limit_train_batches=1.5"], "share above 0 and at most 1.0"),
        ([*EVAL, "trainer.val_check_interval=2", "eval.every_n_steps=2"], "eval.every_n_steps, which is its name here"),
        (["trainer.strategy=deepspeed"], "'zero2'"),
    ],
)
def test_switches_that_do_not_fit_are_one_line(run, capsys, overrides, needle):
    assert run(*overrides) == 2
    assert needle in error_of(capsys)


def test_offload_trains_narrow_adapters_by_their_fp32_copies(run, tmp_path):
    assert run("optim.offload=true", "trainer.precision=bf16-true", "checkpoint.epoch_save=1") == 0
    folder = tmp_path / "out" / "adapter"
    tensors = load_file(folder / (folder / "LATEST").read_text().strip() / "adapter.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    # Ten small updates: what they add up to lies between the values that bf16 has.
    assert all((t != t.bfloat16()).any() for t in tensors.values())
