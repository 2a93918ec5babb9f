"""RunLog as the loop uses it: records, epochs, messages, and a resume that nobody can see in the records."""

import json
import math
import os
import subprocess
import sys

import pytest

from rwkv_accel.errors import UserError
from rwkv_accel.evaluation import EvalResult
from rwkv_accel.tracking import TIME_FIELDS, RunLog, StepRecord
from rwkv_accel.tracking.flops import Compute
from rwkv_accel.tracking.run_log import MainRunLog

FIELDS = [
    "step", "epoch", "loss", "smoothed_loss", "lr", "weight_decay", "grad_norm", "target_tokens", "tokens",
    "skipped_steps", "nonfinite_steps", "kt_s", "target_kt_s", "it_s", "wait_share", "wall_seconds", "memory_bytes",
]  # fmt: skip
STEPS_PER_EPOCH = 5
TOTAL = 15


def step_record(step, loss=None):
    return StepRecord(
        step=step,
        epoch=(step - 1) // STEPS_PER_EPOCH,
        loss=3 + math.sin(step) if loss is None else loss,
        lr=1e-3 / step,
        weight_decay=0.1,
        grad_norm=step / 7,
        target_tokens=100 + step,
        tokens=200 + step,
    )


def run(log, first, last, clock, seconds=2.0):
    """What the loop does from update `first` to `last`."""
    for step in log.watch(range(first, last + 1)):
        clock.advance(seconds)
        log.log_step(step_record(step))
        if step % STEPS_PER_EPOCH == 0:
            log.epoch_line(step // STEPS_PER_EPOCH)


def records(folder):
    return json.loads((folder / "loss_data.json").read_text())


def epoch_lines(folder):
    lines = (folder / "train_log.txt").read_text().splitlines()
    return [line.split() for line in lines if line[0].isdigit()]


def without_time(found):
    return [{k: v for k, v in record.items() if k not in TIME_FIELDS} for record in found]


@pytest.fixture
def open_log(make_config, clock, now):
    return lambda resume_step=0, **tracking: MainRunLog(
        make_config(**tracking), TOTAL, resume_step, "cpu", clock=clock, now=now
    )


def test_record_holds_the_numbers(open_log, clock, tmp_path):
    log = open_log()
    clock.advance(2)
    log.log_step(step_record(1, loss=4.0))
    clock.advance(4)
    with log.pause():
        clock.advance(100)
    log.log_step(step_record(2, loss=2.0))
    first, second = records(tmp_path)
    assert list(first) == FIELDS
    memory = second.pop("memory_bytes")
    assert 20 << 20 < memory < 1 << 36
    assert second == {
        "step": 2, "epoch": 0, "skipped_steps": 0, "nonfinite_steps": 0, "loss": 2.0,
        "smoothed_loss": pytest.approx(3.96), "lr": 5e-4, "weight_decay": 0.1,
        "grad_norm": 2 / 7, "target_tokens": 102, "tokens": 202, "kt_s": pytest.approx(0.0505),
        "target_kt_s": pytest.approx(0.0255), "it_s": pytest.approx(0.25), "wait_share": 0.0,
        "wall_seconds": pytest.approx(106),
    }  # fmt: skip


def test_epoch_line_is_the_mean_over_target_tokens(open_log, clock, tmp_path):
    log = open_log()
    run(log, 1, 10, clock)
    for epoch, columns in enumerate(epoch_lines(tmp_path)):
        steps = range(5 * epoch + 1, 5 * epoch + 6)
        loss = sum((3 + math.sin(s)) * (100 + s) for s in steps) / sum(100 + s for s in steps)
        assert columns[:4] == [str(epoch), f"{loss:.6f}", f"{math.exp(loss):.4f}", f"{1e-3 / steps[-1]:.8f}"]
    assert len(epoch_lines(tmp_path)) == 2


@pytest.mark.parametrize(("saved_at", "killed_at"), [(3, 4), (5, 9), (7, 13), (13, 13)])
def test_killed_and_resumed_records_equal_the_undisturbed_ones(open_log, clock, tmp_path, saved_at, killed_at):
    run(open_log(), 1, TOTAL, clock)
    undisturbed, lines = records(tmp_path), epoch_lines(tmp_path)
    for name in ("loss_data.json", "train_log.txt"):
        os.remove(tmp_path / name)

    log = open_log()
    run(log, 1, saved_at, clock, seconds=3.0)
    checkpoint = json.loads(json.dumps(log.state()))
    run(log, saved_at + 1, killed_at, clock)
    clock.advance(1000)
    log = open_log(resume_step=saved_at)
    log.restore(checkpoint)
    run(log, saved_at + 1, TOTAL, clock)
    log.close()

    assert without_time(records(tmp_path)) == without_time(undisturbed)
    last_of_epoch = {columns[0]: columns[:4] for columns in epoch_lines(tmp_path)}
    assert list(last_of_epoch.values()) == [columns[:4] for columns in lines]
    assert records(tmp_path)[-1]["wall_seconds"] == pytest.approx(3 * saved_at + 2 * (TOTAL - saved_at))


def test_records_after_the_checkpoint_of_their_step_are_written_again_not_twice(open_log, tmp_path):
    result = EvalResult("validation", 100.0, 50, 200)
    log = open_log()
    log.log_eval(0, 0, result)
    log.log_step(step_record(1))
    checkpoint = log.state()
    log.log_step(step_record(1))  # what was not logged yet at the end of an epoch
    log.log_eval(1, 1, result)
    log.log_samples(1, 1, [{"prompt": "a", "text": "b", "stopped": True}])
    log = open_log(resume_step=1)
    log.restore(checkpoint)
    log.log_eval(1, 1, result)
    log.close()
    assert [r["step"] for r in records(tmp_path)] == [1]
    assert [r["step"] for r in json.loads((tmp_path / "eval_data.json").read_text())] == [0, 1]
    assert json.loads((tmp_path / "samples.json").read_text()) == []


def test_fresh_start_drops_what_an_attempt_without_a_checkpoint_left(open_log, tmp_path):
    log = open_log()
    log.log_eval(0, 0, EvalResult("validation", 100.0, 50, 200))
    open_log(resume_step=None).close()
    assert json.loads((tmp_path / "eval_data.json").read_text()) == []


def test_nan_step_is_null_and_leaves_the_smoothed_loss(open_log, tmp_path):
    log = open_log()
    log.log_step(step_record(1, loss=4.0))
    log.log_step(step_record(2, loss=math.nan))
    log.log_step(step_record(3, loss=4.0))
    assert [r["loss"] for r in records(tmp_path)] == [4.0, None, 4.0]
    assert [r["smoothed_loss"] for r in records(tmp_path)] == [4.0, 4.0, 4.0]
    log.epoch_line(1)
    # The update was not made: the epoch's mean is over those that were.
    assert epoch_lines(tmp_path)[0][1:3] == ["4.000000", "54.5982"]


def test_progress_line_shows_what_a_user_looks_for(open_log, clock, capsys):
    log = open_log(progress="lines")
    for _ in log.watch([0]):
        clock.advance(4)
        log.log_step(step_record(1, loss=2.5))
    line = capsys.readouterr().err.strip()
    start = "step 1/15 epoch 0 loss 2.5000 (mean 2.5000) 0.05 Kt/s eta 0:00:56 lr 1.00e-03 wait 0% mem "
    assert line.startswith(start)
    assert line.endswith(" GiB")


def test_utilisation_is_logged_and_shown_where_the_peak_is_known(make_config, clock, now, tmp_path, capsys):
    compute = Compute(token_flops=2e9, target_flops=1e9, peak_flops=1e12)
    log = MainRunLog(make_config(progress="lines"), TOTAL, 0, "cpu", compute=compute, clock=clock, now=now)
    clock.advance(4)
    log.log_step(step_record(1))
    (record,) = records(tmp_path)
    assert record["mfu"] == pytest.approx((201 * 2e9 + 101 * 1e9) / 4 / 1e12)
    assert " 0.05 Kt/s mfu 12.6% eta 0:00:56 lr " in capsys.readouterr().err


def test_the_validation_table_holds_every_start(open_log, monkeypatch):
    from rwkv_accel.evaluation import EvalResult
    from rwkv_accel.tracking import run_log
    from rwkv_accel.tracking.trackers import Trackers

    tables = []

    class Fake(Trackers):
        def log_table(self, name, records):
            tables.append((name, [(record["step"], record["set"], record["loss"]) for record in records]))

    monkeypatch.setattr(run_log, "open_trackers", lambda *_, **__: Fake())
    log = open_log()
    log.log_eval(5, 0, EvalResult("code", 30.0, 10, 40))
    saved = log.state()
    log = open_log(resume_step=5)
    log.restore(saved)
    log.log_eval(10, 1, EvalResult("code", 20.0, 10, 40))
    log.close()
    assert tables == [("eval/table", [(5, "code", 3.0), (10, "code", 2.0)])]


def test_messages_are_shown_and_kept(open_log, tmp_path, capsys):
    log = open_log()
    log.message("saved adapter/epoch-0001")
    assert capsys.readouterr().err == "saved adapter/epoch-0001\n"
    assert (tmp_path / "train_log.txt").read_text().splitlines()[-1] == "# 2026-01-31 12:34:56 saved adapter/epoch-0001"


def test_header_holds_the_resolved_recipe(open_log, make_config, tmp_path):
    open_log()
    lines = (tmp_path / "train_log.txt").read_text().splitlines()
    assert lines[0] == "NEW RUN 2026-01-31 12:34:56.000789"
    assert json.loads(lines[1]) == make_config().model_dump(mode="json")


def test_damaged_and_in_place_files_are_said(open_log, tmp_path, capsys, monkeypatch):
    (tmp_path / "loss_data.json").write_text('[\n{"step": 1},\n{"step": 2, "lo')
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    open_log(resume_step=2)
    said = capsys.readouterr().err
    assert "no hard links" in said
    assert "dropped 1 damaged records" in said
    assert records(tmp_path) == [{"step": 1}]


def full(*_):
    raise OSError(28, "No space left on device")


def test_full_disk_at_the_start_is_one_line_with_the_remedy(open_log, monkeypatch):
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="No space left on device; mend it and start the same command again"):
        open_log()


def test_full_disk_later_is_told_once_and_nothing_is_lost(open_log, tmp_path, monkeypatch, capsys):
    log = open_log()
    log.log_step(step_record(1))
    with monkeypatch.context() as refusing:
        refusing.setattr(os, "pwrite", full)
        refusing.setattr(os, "write", full)
        log.log_step(step_record(2))
        log.message("message one")
        log.log_step(step_record(3))
        log.epoch_line(1)
        assert [r["step"] for r in records(tmp_path)] == [1]
    assert capsys.readouterr().err.count("No space left on device; records are kept in memory") == 1
    log.message("message two")
    log.close()
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3]
    text = (tmp_path / "train_log.txt").read_text()
    assert text.index("message one") < text.index("\n0 ") < text.index("message two")


def test_state_of_another_version_is_refused(open_log):
    log = open_log()
    with pytest.raises(AssertionError, match="expected"):
        log.restore({"smoothed_loss": 1.0})


def test_wandb_run_id_travels_through_the_state(open_log, make_config, monkeypatch):
    from rwkv_accel.tracking import run_log

    opened = []

    class Fake:
        wandb_run_id = "abc123"

        def log(self, values, step):
            opened.append((sorted(values), step))

        def log_table(self, name, records):
            opened.append((name, records))

        def close(self):
            opened.append("closed")

    def fake_open(tracking, **options):
        opened.append((options["resume_run_id"], options["resume_step"], options["config"]["out_dir"]))
        return Fake()

    monkeypatch.setattr(run_log, "open_trackers", fake_open)
    log = open_log()
    assert log.state()["wandb_run_id"] is None
    log.log_step(step_record(1))
    saved = log.state()
    assert saved["wandb_run_id"] == "abc123"
    resumed = open_log(resume_step=1)
    resumed.restore(saved)
    resumed.message("continuing")
    resumed.log_step(step_record(2))
    resumed.close()
    out_dir = make_config().out_dir
    names = sorted(set(FIELDS) - {"step"})
    assert opened == [(None, 0, out_dir), (names, 1), ("abc123", 1, out_dir), (names, 2), ("eval/table", []), "closed"]


def test_trackers_get_recipe_model_size_and_code(make_config, now, clock, monkeypatch):
    from rwkv_accel.tracking import run_log
    from rwkv_accel.tracking.trackers import Trackers

    given = []

    def fake_open(tracking, **options):
        given.append(options["config"])
        return Trackers()

    monkeypatch.setattr(run_log, "open_trackers", fake_open)
    facts = {"git_commit": "0123abcd", "model": {"parameters": 5}}
    MainRunLog(make_config(), TOTAL, 0, "cpu", facts=facts, clock=clock, now=now).log_step(step_record(1))
    assert given == [{**make_config().model_dump(mode="json"), "environment": facts}]


def test_starting_a_tracker_is_not_training_time(open_log, clock, tmp_path, monkeypatch):
    from rwkv_accel.tracking import run_log
    from rwkv_accel.tracking.trackers import Trackers

    def slow_open(*_, **__):
        clock.advance(60)
        return Trackers()

    monkeypatch.setattr(run_log, "open_trackers", slow_open)
    log = open_log()
    for step in (1, 2):
        clock.advance(2)
        log.log_step(step_record(step))
    assert [r["it_s"] for r in records(tmp_path)] == [0.5, 0.5]


def test_other_ranks_write_nothing(make_config, tmp_path, capsys):
    log = RunLog.open(make_config(trackers=["wandb"]), is_main=False, total_steps=9, resume_step=0, device="cpu")
    assert list(log.watch([1, 2])) == [1, 2]
    log.restore({"anything": 1})
    log.log_step(step_record(1))
    with log.pause():
        log.message("hello")
    log.epoch_line(1)
    assert log.state() == {}
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_main_rank_gets_the_real_log(make_config, tmp_path):
    log = RunLog.open(make_config(), is_main=True, total_steps=9, resume_step=0, device="cpu")
    log.log_step(step_record(1))
    log.close()
    assert [r["step"] for r in records(tmp_path)] == [1]
    written = sorted(p.name for p in tmp_path.iterdir())
    assert written == ["eval_data.json", "loss_data.json", "samples.json", "train_log.txt"]


def test_import_is_light():
    code = "import sys, rwkv_accel.tracking; print([m for m in ('torch', 'wandb', 'tqdm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
