"""A run's copy in remote storage: layout, what a start takes from it, retention there, and the queue of uploads."""

import json
import logging
import re
import shutil
import threading

import pytest

from rwkv_accel import progress
from rwkv_accel.checkpoint import CheckpointWriter, find_resume
from rwkv_accel.checkpoint import store as store_module
from rwkv_accel.checkpoint import uploads as uploads_module
from rwkv_accel.checkpoint.format import MANIFEST_FILE, STATE_FILE, TRAINABLE_FILE, TensorFile, validate
from rwkv_accel.checkpoint.remote import open_remote
from rwkv_accel.checkpoint.store import RemoteError, RemoteStore
from rwkv_accel.config.checkpoint import CheckpointConfig
from rwkv_accel.errors import UserError
from rwkv_accel.tracking import LOSS_FILE, REPORT_FILE
from tests.unit.checkpoint.checkpoint_helpers import simple_snapshot, write_simple

WAIT_SECONDS = 60


@pytest.fixture
def remote(tmp_path):
    return tmp_path / "remote"


@pytest.fixture
def store(remote):
    return RemoteStore(f"file://{remote}", first_wait_seconds=0.001)


@pytest.fixture
def out_dir(tmp_path):
    return tmp_path / "out"


def start(out_dir, store, **config):
    """The writer of a started run."""
    config = CheckpointConfig(remote_url=store.url, **config)
    return CheckpointWriter(out_dir, config, open_remote(config))


def save(out_dir, store, step, name=None, **config):
    """A run that writes one checkpoint, with its step as the value of the tensor, and ends."""
    writer = start(out_dir, store, **config)
    writer.write(simple_snapshot(step, float(step)), name or f"step-{step:08d}")
    writer.wait()
    assert writer.uploads.finish() == []
    return out_dir / "checkpoints" / (name or f"step-{step:08d}")


def folders(path):
    return sorted(p.name for p in path.iterdir() if p.is_dir())


def value_of(folder):
    return TensorFile(folder, TRAINABLE_FILE)["w"][0, 0].item()


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_what_is_uploaded_is_the_folder_the_logs_and_the_report(out_dir, store, remote, capsys):
    out_dir.mkdir()
    (out_dir / LOSS_FILE).write_text("[1]")
    (out_dir / REPORT_FILE).write_text("<html>")
    folder = save(out_dir, store, 5)
    copy = remote / "checkpoints" / "step-00000005-1"
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert (remote / "logs" / LOSS_FILE).read_text() == "[1]"
    assert (remote / "logs" / REPORT_FILE).read_text() == "<html>"
    assert capsys.readouterr().err == "", "quick uploads say nothing"
    assert folders(out_dir) == ["checkpoints"], "nothing stays of the staging"


def test_a_lost_out_dir_comes_back(out_dir, store):
    out_dir.mkdir()
    (out_dir / LOSS_FILE).write_text("[1]")
    for folder, text in (("adapter/epoch-0001", "old"), ("adapter/epoch-0002", "new"), ("best", "best")):
        (out_dir / folder).mkdir(parents=True)
        (out_dir / folder / "adapter.safetensors").write_text(text)
        (out_dir / "adapter" / "LATEST").write_text("epoch-0002\n")
    writer = start(out_dir, store)
    writer.uploads.add_weights(out_dir / "adapter" / "epoch-0001", 1)
    writer.uploads.add_weights(out_dir / "best", 1)
    writer.uploads.add_weights(out_dir / "adapter" / "epoch-0002", 2)
    assert writer.uploads.finish() == []
    save(out_dir, store, 1)
    folder = save(out_dir, store, 2)
    shutil.rmtree(out_dir)
    assert find_resume(out_dir, "auto", store) == folder
    assert value_of(folder) == 2.0
    assert validate(folder, deep=True).sequence == 2
    assert folders(out_dir / "checkpoints") == ["step-00000002"]
    assert (out_dir / LOSS_FILE).read_text() == "[1]"
    assert (out_dir / "adapter" / "LATEST").read_text() == "epoch-0002\n"
    assert folders(out_dir / "adapter") == ["epoch-0002"]
    assert (out_dir / "adapter" / "epoch-0002" / "adapter.safetensors").read_text() == "new"
    assert (out_dir / "best" / "adapter.safetensors").read_text() == "best"


def damage(kind, folder):
    if kind == "flipped byte":
        flip(folder / TRAINABLE_FILE)
    elif kind == "truncated":
        (folder / TRAINABLE_FILE).write_bytes((folder / TRAINABLE_FILE).read_bytes()[:-1])
    elif kind == "missing shard":
        (folder / TRAINABLE_FILE).unlink()
    elif kind == "unfinished":
        (folder / MANIFEST_FILE).unlink()
    elif kind == "foreign":
        (folder / MANIFEST_FILE).write_text('{"format": "other"}')
    else:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        (folder / "sub").mkdir()
        shutil.copy(folder / STATE_FILE, folder / "sub" / STATE_FILE)
        manifest["files"][f"sub/{STATE_FILE}"] = manifest["files"][STATE_FILE]
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "flipped byte",
            f"step-00000003-3 is damaged: the bytes of .*{TRAINABLE_FILE} do not fit its checksum; skipped",
        ),
        ("truncated", f"step-00000003-3 is damaged: {TRAINABLE_FILE} has .* bytes instead of .*; skipped"),
        ("missing shard", f"step-00000003-3 is damaged: {TRAINABLE_FILE} is missing; skipped"),
        ("unfinished", "checkpoints/step-00000003-3 is incomplete, its upload did not end; skipped"),
        ("foreign", "step-00000003-3 is not a checkpoint of this trainer .*; skipped"),
        ("path", "step-00000003-3 is damaged: .*is no file name.*; skipped"),
    ],
)
def test_a_bad_copy_is_named_and_skipped(out_dir, store, remote, caplog, kind, message):
    for step in (1, 2, 3):
        save(out_dir, store, step)
    shutil.rmtree(out_dir)
    damage(kind, remote / "checkpoints" / "step-00000003-3")
    with caplog.at_level(logging.WARNING):
        folder = find_resume(out_dir, "auto", store)
    assert value_of(folder) == 2.0
    assert re.search(message, caplog.text), caplog.text
    assert folders(out_dir / "checkpoints") == ["step-00000002"], "nothing is left of the bad one"
    # What is written from here on is newer than the bad one, and replaces nothing.
    save(out_dir, store, 7)
    assert "step-00000007-4" in folders(remote / "checkpoints")


def test_only_damaged_copies_are_an_error(out_dir, store, remote):
    save(out_dir, store, 1)
    shutil.rmtree(out_dir)
    flip(remote / "checkpoints" / "step-00000001-1" / TRAINABLE_FILE)
    with pytest.raises(UserError, match=r"no usable checkpoint: .*step-00000001-1 is damaged.*another out_dir"):
        find_resume(out_dir, "auto", store)


def test_storage_that_cannot_be_read_is_never_a_fresh_start(out_dir, store, monkeypatch):
    save(out_dir, store, 1)
    shutil.rmtree(out_dir)

    def refuse(*args, **kwargs):
        raise OSError("connection lost")

    monkeypatch.setattr(store._files, "cat_file", refuse)
    with pytest.raises(RemoteError, match=r"cannot read checkpoints/step-00000001-1/manifest.json .*connection lost"):
        find_resume(out_dir, "auto", store)


def test_the_newest_of_both_places_is_taken(tmp_path, out_dir, store):
    save(out_dir, store, 1)
    elsewhere = tmp_path / "another machine"
    assert find_resume(elsewhere, "auto", store).parent.parent == elsewhere
    save(elsewhere, store, 2)
    # Back on the first machine, whose own folder is older by now.
    assert value_of(find_resume(out_dir, "auto", store)) == 2.0
    local = save(out_dir, store, 3)
    flip(local / TRAINABLE_FILE)
    assert value_of(find_resume(out_dir, "auto", store)) == 3.0, "the intact copy takes the damaged one's place"
    write_simple(out_dir / "checkpoints" / "step-00000004", 4, 4.0)  # never uploaded
    assert value_of(find_resume(out_dir, "auto", store)) == 4.0


def test_none_refuses_storage_that_has_a_checkpoint(tmp_path, out_dir, store):
    assert find_resume(out_dir, "none", store) is None
    save(out_dir, store, 1)
    with pytest.raises(UserError, match=r"resume is none, but file://.*/remote holds checkpoints/step-00000001-1"):
        find_resume(tmp_path / "fresh", "none", store)


def test_a_url_names_a_checkpoint_or_a_run(tmp_path, store):
    for step in (1, 2):
        save(tmp_path / "first", store, step)
    folder = find_resume(tmp_path / "a", f"{store.url}/checkpoints/step-00000001-1")
    assert folder == tmp_path / "a" / "checkpoints" / "step-00000001"
    assert value_of(folder) == 1.0
    assert value_of(find_resume(tmp_path / "b", f"{store.url}/")) == 2.0
    with pytest.raises(UserError, match="/nothing holds no complete checkpoint"):
        find_resume(tmp_path / "c", f"{store.url}/nothing")
    with pytest.raises(UserError, match=r"step-00000009-9 has no manifest.json.*; give another checkpoint.resume"):
        find_resume(tmp_path / "c", f"{store.url}/checkpoints/step-00000009-9")


@pytest.mark.parametrize("is_url", [True, False])
def test_started_again_a_run_goes_on_where_it_is_and_not_where_it_came_from(tmp_path, store, caplog, is_url):
    origin = save(tmp_path / "first", store, 1)
    resume = f"{store.url}/checkpoints/step-00000001-1" if is_url else str(origin)
    out_dir = tmp_path / "second"
    assert value_of(find_resume(out_dir, resume)) == 1.0
    own = write_simple(out_dir / "checkpoints" / "step-00000005", 5, 5.0)
    with caplog.at_level(logging.WARNING):
        assert find_resume(out_dir, resume) == own
    assert "is not taken again: this run has checkpoints of its own" in caplog.text


def test_retention_there_is_that_of_the_recipe(out_dir, store, remote):
    foreign = remote / "checkpoints" / "checkpoint-500"
    foreign.mkdir(parents=True)
    (foreign / "pytorch_model.bin").write_text("theirs")
    for step in (10, 20, 30, 40, 50, 60):
        if step == 50:
            left = remote / "checkpoints" / "step-00000045-3"  # an upload that did not end
            left.mkdir()
            (left / TRAINABLE_FILE).write_text("half")
        name = "INTERRUPTED" if step == 40 else None
        save(out_dir, store, step, name, keep_last=1, keep_every_n_steps=20)
    assert folders(remote / "checkpoints") == ["checkpoint-500", "step-00000020-2", "step-00000060-6"]


def test_what_is_written_again_takes_the_place_of_what_it_was(out_dir, store, remote):
    # The end of an epoch writes the step of the cadence once more, and each signal INTERRUPTED.
    for step, name in ((10, None), (20, None), (20, None), (25, "INTERRUPTED"), (28, "INTERRUPTED"), (30, None)):
        save(out_dir, store, step, name, keep_last=3, keep_every_n_steps=20)
    assert folders(remote / "checkpoints") == ["INTERRUPTED-5", "step-00000020-3", "step-00000030-6"]


def test_saved_weights_there_are_limited_too(out_dir, store, remote):
    for step in (1, 2, 3):
        for folder in (out_dir / "adapter" / f"epoch-{step:04d}", out_dir / "best"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "model.pth").write_text(str(step))
        writer = start(out_dir, store, keep_weights=2)
        writer.uploads.add_weights(out_dir / "adapter" / f"epoch-{step:04d}", step)
        writer.uploads.add_weights(out_dir / "best", step)
        assert writer.uploads.finish() == []
    assert folders(remote / "adapter") == ["epoch-0002", "epoch-0003"]
    assert (remote / "adapter" / "LATEST").read_text() == "epoch-0003\n"
    assert folders(remote / "best") == ["step-00000003"]
    assert (remote / "best" / "step-00000003" / "model.pth").read_text() == "3"


def test_a_slow_upload_outlives_its_checkpoint_and_skips_what_is_old_by_then(out_dir, store, remote, monkeypatch):
    under_way, go_on, real = threading.Event(), threading.Event(), RemoteStore.put

    def slow_put(self, local, name, *args):
        under_way.set()
        assert go_on.wait(WAIT_SECONDS)
        real(self, local, name, *args)

    monkeypatch.setattr(RemoteStore, "put", slow_put)
    writer = start(out_dir, store, keep_last=1, keep_every_n_steps=30)
    writer.write(simple_snapshot(10, 10.0), "step-00000010")
    writer.wait()
    assert under_way.wait(WAIT_SECONDS)
    for step in (20, 30, 40, 50):
        writer.write(simple_snapshot(step, float(step)), f"step-{step:08d}")
    writer.wait()
    assert folders(out_dir / "checkpoints") == ["step-00000030", "step-00000050"]
    uploaded = []
    monkeypatch.setattr(RemoteStore, "put", lambda self, local, name, *args: uploaded.append(name))
    go_on.set()
    assert writer.uploads.finish() == []
    assert {name.split("/")[1] for name in uploaded} == {
        "step-00000010-1",
        "step-00000030-3",
        "step-00000050-5",
    }


def test_a_failed_upload_is_announced_kept_in_order_and_tried_again(out_dir, store, remote, monkeypatch, caplog):
    real = RemoteStore.put_bytes

    def refuse(self, *args):
        raise RemoteError("no connection")

    monkeypatch.setattr(RemoteStore, "put_bytes", refuse)
    (out_dir / "adapter" / "epoch-0001").mkdir(parents=True)
    (out_dir / "adapter" / "epoch-0001" / "model.pth").write_text("weights")
    (out_dir / "adapter" / "LATEST").write_text("epoch-0001\n")
    writer = start(out_dir, store)
    with caplog.at_level(logging.WARNING):
        writer.uploads.add_weights(out_dir / "adapter" / "epoch-0001", 1)
        writer.write(simple_snapshot(1, 1.0), "step-00000001")
        writer.wait()
        assert writer.uploads.finish() == ["adapter/epoch-0001", "checkpoints/step-00000001-1"]
    assert "adapter/epoch-0001 is not uploaded: no connection; tried again with the next save" in caplog.text
    assert find_resume(out_dir.with_name("fresh"), "auto", store) is None
    monkeypatch.setattr(RemoteStore, "put_bytes", real)
    again = start(out_dir, store)
    again.uploads.add_existing(find_resume(out_dir, "auto", store), 1, 0)
    assert again.uploads.finish() == []
    assert folders(remote / "adapter") == ["epoch-0001"]
    assert value_of(find_resume(out_dir.with_name("fresh"), "auto", store)) == 1.0


def test_the_end_of_a_run_waits_for_uploads_only_so_long(out_dir, store, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(RemoteStore, "put", lambda *args: go_on.wait(WAIT_SECONDS))
    writer = start(out_dir, store, remote_wait_seconds=1)
    writer.write(simple_snapshot(1), "step-00000001")
    writer.wait()
    assert writer.uploads.finish() == ["checkpoints/step-00000001-1"]
    go_on.set()


@pytest.fixture
def said(monkeypatch, capsys):
    """Every line that the work could say, had it taken long."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress, "_mode", "lines")
    monkeypatch.setenv("RANK", "0")
    return lambda: capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("mode", ["lines", "none"])
def test_who_waits_for_uploads_is_told_how_far_they_are(out_dir, store, monkeypatch, said, mode):
    monkeypatch.setattr(progress, "_mode", mode)
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(uploads_module, "SECONDS_BETWEEN_LOOKS", 0.01)
    seen, go_on = threading.Event(), threading.Event()
    read_chunk = RemoteStore._chunk

    def slow_chunk(self, name, start, num_bytes):
        if start == 1 << 20:
            seen.set()
            assert go_on.wait(WAIT_SECONDS)
        return read_chunk(self, name, start, num_bytes)

    class Watched(uploads_module.ProgressLine):
        def at(self, done):
            super().at(done)
            if done == 3:
                go_on.set()

    monkeypatch.setattr(RemoteStore, "_chunk", slow_chunk)
    monkeypatch.setattr(uploads_module, "ProgressLine", Watched)
    (out_dir / "best").mkdir(parents=True)
    (out_dir / "best" / "model.pth").write_bytes(bytes(4 << 20))
    writer = start(out_dir, store)
    writer.uploads.add_weights(out_dir / "best", 1)
    # Sent, and a quarter of it read back: two and a half of four.
    assert seen.wait(WAIT_SECONDS)
    assert writer.uploads.finish() == []
    lines = said()
    if mode == "none":
        assert lines == []
    else:
        assert lines[0] == f"uploading to {store.url}: 3/4 MiB"
        assert set(lines) <= {f"uploading to {store.url}: {done}/4 MiB" for done in (3, 4)}


def test_a_download_shows_how_far_it_is(out_dir, store, said):
    save(out_dir, store, 1)
    shutil.rmtree(out_dir)
    said()
    find_resume(out_dir, "auto", store)
    assert "downloading checkpoints/step-00000001-1: 1/1 MiB" in said()
