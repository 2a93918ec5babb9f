"""wandb offline is written and read back, tensorboard too; modes and remedies without any network."""

import json
import struct
import sys
import time
from types import SimpleNamespace

import pytest

from rwkv_accel.errors import UserError
from rwkv_accel.tracking.trackers import Trackers, check_trackers, open_trackers


def open_for(config, tmp_path, mode="offline", run_id=None, resume_step=0):
    return open_trackers(
        config.tracking,
        wandb_mode=mode,
        out_dir=tmp_path,
        config=config.model_dump(mode="json"),
        resume_run_id=run_id,
        resume_step=resume_step,
    )


def wandb_records(file):
    """Records of a .wandb file: a 7-byte head, then the chunks of a LevelDB log in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(parts)
            parts = b""
            yield message


def wandb_history(file):
    for message in wandb_records(file):
        if message.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): item.value_json for item in message.history.item}


def test_wandb_offline_is_written_and_a_resume_keeps_the_id(make_config, tmp_path):
    import wandb

    config = make_config(trackers=["wandb"], wandb_mode="offline", run_name="first try", project="tests")
    assert check_trackers(config.tracking) == ("offline", "")
    trackers = open_for(config, tmp_path)
    run_id = trackers.wandb_run_id
    trackers.log({"loss": 2.5, "lr": 0.5}, 1)
    trackers.log({"loss": 1.25, "lr": 0.25}, 2)
    trackers.close()
    wandb.teardown()  # a resume is a new process: wandb's service of this one still knows the id
    started = time.time()
    while int(time.time()) == int(started):  # wandb names a run's folder by the second
        time.sleep(0.05)
    resumed = open_for(config, tmp_path, run_id=run_id, resume_step=2)
    assert resumed.wandb_run_id == run_id
    resumed.log({"loss": 0.5, "lr": 0.125}, 3)
    resumed.close()
    wandb.teardown()

    files = sorted(
        (tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"), key=lambda f: f.stat().st_mtime
    )
    rows = [row for file in dict.fromkeys(files) for row in wandb_history(file)]
    assert [(r["_step"], r["train/loss"], r["train/lr"]) for r in rows] == [
        ("1", "2.5", "0.5"),
        ("2", "1.25", "0.25"),
        ("3", "0.5", "0.125"),
    ]
    run = next(m.run for m in wandb_records(files[0]) if m.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.display_name) == (run_id, "tests", "first try")
    assert any(item.key == "out_dir" and str(tmp_path) in item.value_json for item in run.config.update)


def test_tensorboard_is_written_and_a_resume_hides_later_events(make_config, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install tensorboard)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(trackers=["tensorboard"])
    assert check_trackers(config.tracking) == (None, "")
    trackers = open_for(config, tmp_path, mode=None)
    for step in (1, 2, 3, 4):
        trackers.log({"loss": 1.0 / step}, step)
    trackers.close()
    resumed = open_for(config, tmp_path, mode=None, resume_step=2)
    resumed.log({"loss": 8.0}, 3)
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, 8.0)]
    assert '"out_dir"' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_both_at_once_with_samples_and_validations_as_tables(make_config, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install tensorboard)")
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(trackers=["wandb", "tensorboard"], wandb_mode="offline")
    trackers = open_for(config, tmp_path)
    trackers.log({"loss": 2.5}, 3)
    trackers.log_texts([{"prompt": "How?", "text": "So.", "stopped": True}], 3)
    trackers.log_table("eval/table", [{"step": 1, "set": "a", "loss": 3.5}, {"step": 3, "set": "b", "accuracy": 0.5}])
    trackers.log_table("eval/none", [])
    trackers.close()
    wandb.teardown()

    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    tables = {path.parent.name: json.loads(path.read_text()) for path in folder.rglob("media/**/*.table.json")}
    assert {name: (table["columns"], table["data"]) for name, table in tables.items()} == {
        "eval": (["step", "set", "loss", "accuracy"], [[1, "a", 3.5, None], [3, "b", None, 0.5]]),
        "samples": (["prompt", "text", "stopped"], [["How?", "So.", True]]),
    }
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 2.5)]
    text = events.Tensors("eval/table/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| step | set | loss | accuracy |" in text
    assert "| 3 | b | None | 0.5 |" in text
    assert "How?\n\nSo." in events.Tensors("samples/0/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "tensorboard")])
def test_missing_package_names_the_remedy(make_config, monkeypatch, name, module):
    for loaded in [m for m in sys.modules if m.startswith(("torch.utils.tensorboard", "wandb.", "tensorboard."))]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        check_trackers(make_config(trackers=[name]).tracking)


def test_no_trackers_import_nothing_and_take_records(make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = make_config()
    assert check_trackers(config.tracking) == (None, "")
    trackers = open_for(config, tmp_path, mode=None)
    trackers.log({"loss": 1.0}, 1)
    trackers.close()
    assert isinstance(trackers, Trackers)
    assert trackers.wandb_run_id is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wanted", "environment", "key", "mode", "line"),
    [
        ("auto", "online", True, "online", ""),
        ("auto", "online", False, "offline", "wandb: offline, because no API key is configured"),
        ("auto", "online", "server is away\nat length", "offline", "wandb: offline, because server is away;"),
        ("auto", "offline", True, "offline", "wandb: offline, as WANDB_MODE says"),
        ("auto", "disabled", True, "disabled", "wandb: disabled, as WANDB_MODE says"),
        ("offline", "online", True, "offline", ""),
        ("online", "offline", True, "online", ""),
        ("online", "online", False, UserError, "no API key is configured"),
        ("online", "online", "server is away", UserError, "server is away; log in, or set tracking.wandb_mode=offline"),
    ],
)
def test_wandb_mode(make_config, monkeypatch, wanted, environment, key, mode, line):
    import wandb

    def login(prompt):
        assert prompt is False, "a run must never wait for input"
        if isinstance(key, str):
            raise wandb.Error(key)
        return key

    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=SimpleNamespace(mode=environment)))
    monkeypatch.setattr(wandb, "login", login)
    tracking = make_config(trackers=["wandb"], wandb_mode=wanted).tracking
    if mode is UserError:
        with pytest.raises(UserError, match=line):
            check_trackers(tracking)
    else:
        found, said = check_trackers(tracking)
        assert found == mode
        assert said.startswith(line)
        assert bool(said) == bool(line)


def test_wandb_that_does_not_start_is_one_line(make_config, tmp_path, monkeypatch):
    import wandb

    def fail(**options):
        assert options["mode"] == "online"
        raise wandb.errors.CommError("Timed out while retrying.\nConsider increasing init_timeout")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(UserError) as error:
        open_for(make_config(trackers=["wandb"]), tmp_path, mode="online")
    assert str(error.value) == (
        "wandb did not start: Timed out while retrying; mend it, or set tracking.wandb_mode=offline"
    )
