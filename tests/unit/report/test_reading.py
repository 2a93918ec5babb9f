"""What the page is told about a run, and that nothing missing or damaged stops it."""

import json
import math

import pytest

from rwkv_accel.errors import UserError
from rwkv_accel.report.page import embedded, page, read_runs, write_report
from rwkv_accel.report.reading import check_is_run, flat, names_of, read_run
from rwkv_accel.report.timeline import read_timeline
from tests.report_runs import TOKENS_PER_STEP, append, eval_records, loss_at, step_records, write_run


def test_a_run_as_the_page_gets_it(tmp_path):
    run = read_run(write_run(tmp_path / "run"), "run")
    assert run["num_records"] == 100
    assert run["columns"]["step"] == list(range(1, 101))
    assert run["columns"]["loss"][41] == pytest.approx(loss_at(42), rel=1e-6)
    assert run["columns"]["tokens_seen"][41] == 42 * TOKENS_PER_STEP
    assert run["columns"]["seconds"][41] == 21
    (validation,) = run["evals"]
    assert validation["set"] == "validation"
    assert validation["columns"]["step"] == [0, 50, 100]
    assert validation["columns"]["tokens_seen"] == [0, 50 * TOKENS_PER_STEP, 100 * TOKENS_PER_STEP]
    assert validation["columns"]["loss"][1] == pytest.approx(loss_at(50) + 0.25, rel=1e-6)
    assert run["marks"] == [
        {"step": 60, "tokens_seen": 60 * TOKENS_PER_STEP, "seconds": 30, "text": "resumed at step 60"}
    ]
    assert [sample["step"] for sample in run["samples"]] == [50, 100]
    assert run["samples"][0]["answers"] == [{"prompt": "How are you?", "text": "aaaa", "stopped": False}]
    assert run["events"] == [
        "2026-01-31 12:00:00 started",
        "2026-01-31 12:00:00 stopped by SIGTERM after step 60, saved; start the same command again to continue",
        "2026-01-31 13:00:00 resumed at step 60",
        "2026-01-31 13:00:00 finished after step 100",
    ]
    assert run["notes"] == []


def test_summary_and_cards(tmp_path):
    run = read_run(write_run(tmp_path / "run"), "run")
    facts = run["summary"]
    assert facts["status"] == "finished"
    assert facts["starts"] == "2: resumed at step 60"
    assert facts["last loss"] == f"{loss_at(100):.4f}"
    assert facts["best validation loss"] == f"{loss_at(100) + 0.25:.4f} at step 100"
    assert facts["tokens"] == "64,000"
    assert facts["target tokens"] == "20,000"
    assert facts["throughput"] == "1.25 Kt/s"
    assert facts["peak memory"] == "3.00 GiB"
    assert facts["wall time"] == "0:00:50"
    assert (facts["layers"], facts["parameters"]) == ("12", "191,084,544")
    assert facts["method"] == "lora, rank 8"
    assert facts["rwkv_accel"] == "0.1.0 (0123456789)"
    assert facts["packages"] == "torch 2.13.0"
    cards = {card["label"]: (card["value"], card["note"]) for card in run["headline"]}
    assert cards["status"] == ("finished", "step 100, 2 starts")
    assert cards["tokens"] == ("64k", "31% of them targets")


@pytest.mark.parametrize(("since", "before"), [(71, f", {loss_at(70):.4f} before"), (1, "")])
def test_a_loss_that_is_lost_at_the_end_is_no_loss(tmp_path, since, before):
    run = read_run(write_run(tmp_path / "run", loss=lambda step: loss_at(step) if step < since else math.nan), "run")
    assert run["summary"]["last loss"] == f"not finite since step {since}{before}"
    assert {"label": "training loss", "value": "not finite", "note": f"since step {since}"} in run["headline"]
    assert run["notes"] == [f"{101 - since} of 100 records have no finite loss, the first at step {since}"]


def test_recipe_is_flat_and_knows_what_is_not_the_default(tmp_path):
    run = read_run(write_run(tmp_path / "run"), "run")
    assert run["config"]["optim.betas"] == "[0.9, 0.99]"
    assert run["config"]["peft.rank"] == "8"
    assert set(run["changed"]) == {"out_dir", "model.path", "optim.lr_init", "peft.rank"}
    assert flat({"a": {"b": None, "c": {}}, "d": "x"}) == {"a.b": "null", "a.c": "{}", "d": "x"}


def test_losses_that_are_lost_are_said(tmp_path):
    folder = write_run(tmp_path / "run", loss=lambda step: None if step in (7, 9) else 2.0)
    run = read_run(folder, "run")
    assert run["columns"]["loss"][6] is None
    assert run["notes"] == ["2 of 100 records have no finite loss, the first at step 7"]


def test_long_runs_are_thinned(tmp_path):
    folder = tmp_path / "long"
    folder.mkdir()
    records = step_records(20_000, loss=lambda step: 50.0 if step == 12_345 else 2.0)
    (folder / "loss_data.json").write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]")
    run = read_run(folder, "long", 1000)
    assert run["num_records"] == 20_000
    assert len(run["columns"]["step"]) <= 1000
    assert run["columns"]["loss"][run["columns"]["step"].index(12_345)] == 50
    assert run["columns"]["tokens_seen"][-1] == 20_000 * TOKENS_PER_STEP, "counted before thinning"
    assert run["summary"]["tokens"] == f"{20_000 * TOKENS_PER_STEP:,}"
    assert "20,000 records, drawn as" in run["notes"][0]


@pytest.mark.parametrize("cut", [1, 30, 500, 5000])
def test_half_written_files_give_what_they_hold(tmp_path, cut):
    folder = write_run(tmp_path / "run")
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-cut])
    run = read_run(folder, "run")
    assert run["columns"]["step"] == list(range(1, run["num_records"] + 1))
    if cut == 500:
        assert 95 <= run["num_records"] < 100
        assert "1 damaged records" in run["notes"][0]
    json.loads(embedded(run))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[",
        b"[\n]",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b'[\n{"step": "x"}\n]',
        b'[\n{"step": 1, "loss": "high", "samples": 3}\n]',
    ],
)
def test_any_content_makes_a_page(tmp_path, content):
    for name in ("loss_data.json", "eval_data.json", "samples.json", "train_log.txt", "environment.json", "run.yaml"):
        (tmp_path / name).write_bytes(content)
    assert "<main" in page(read_runs([tmp_path]))


def test_what_is_no_run_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"holds no run \(no run.yaml, no loss_data.json\); give the out_dir of a run"):
        check_is_run(tmp_path)
    with pytest.raises(UserError, match="is no folder; give the out_dir"):
        check_is_run(tmp_path / "nowhere")


def test_names_tell_runs_apart(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "other"]
    assert names_of(folders[1:]) == ["run", "other"]
    assert names_of(folders) == ["a/run", "b/run", "b/other"]


def test_sets_keep_their_own_curves_and_the_first_decides(tmp_path):
    folder = write_run(tmp_path / "run")
    append(folder, "eval_data.json", eval_records([50, 100], name="code", scale=0.1))
    run = read_run(folder, "run")
    assert [found["set"] for found in run["evals"]] == ["validation", "code"]
    assert run["summary"]["best validation loss"].startswith(f"{loss_at(100) + 0.25:.4f}")
    assert run["summary"]["code: loss"] == f"{loss_at(100, 0.1) + 0.25:.4f}"


def test_a_fresh_start_in_the_same_folder_begins_the_timeline_anew(tmp_path):
    (tmp_path / "train_log.txt").write_text(
        "NEW RUN 2026-01-01 10:00:00.000001\n{}\n# 2026-01-01 10:00:05 stopped by SIGINT after step 3, saved\n"
        "NEW RUN 2026-01-02 10:00:00.000001\n{}\n# 2026-01-02 10:00:05 saved out\n0 4.1 61.7 0.0006 2026-01-02 0\n"
    )
    timeline = read_timeline(tmp_path)
    assert (timeline.num_starts, timeline.state, timeline.marks) == (1, "running", [])
    assert timeline.messages == ["2026-01-02 10:00:05 saved out"]


def test_a_run_that_gave_up_has_failed(tmp_path):
    (tmp_path / "train_log.txt").write_text(
        "NEW RUN 2026-01-31 12:00:00.000001\n{}\n"
        "# 2026-01-31 12:00:00 given up after step 7: 6 updates in a row were not finite\n"
    )
    timeline = read_timeline(tmp_path)
    assert timeline.state == "failed"
    assert timeline.events[-1] == "2026-01-31 12:00:00 given up after step 7: 6 updates in a row were not finite"


def test_a_run_whose_process_is_gone_was_killed(tmp_path):
    from rwkv_accel.checkpoint.run_lock import take

    (tmp_path / "train_log.txt").write_text("NEW RUN 2026-01-01 10:00:00.000001\n{}\n")
    assert read_timeline(tmp_path).state == "running", "without a lock nobody knows"
    lock = take(tmp_path)
    assert read_timeline(tmp_path).state == "running"
    lock.release()
    assert read_timeline(tmp_path).state == "killed"
    (tmp_path / ".lock").write_text("process 5 on another.machine")
    assert read_timeline(tmp_path).state == "running"


def test_text_of_a_run_cannot_leave_its_data_block(tmp_path):
    evil = "</script><script>alert(1)</script><!-- @@SCRIPT@@ \u2028"
    folder = write_run(tmp_path / "run", answer=evil)
    text = page(read_runs([folder]))
    assert text.count("<script") == 2, "the data and the script"
    assert text.count("</script") == 2
    assert evil not in text
    data = text.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["runs"][0]["samples"][-1]["answers"][0]["text"] == evil


def test_page_stands_alone(tmp_path):
    text = write_report([write_run(tmp_path / "run")], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "src=" not in text
    assert "@import" not in text
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*: No such file or directory; choose another --output"):
        write_report([write_run(tmp_path / "run")], tmp_path / "none" / "report.html")
