"""Old checkpoints go, the last complete one never."""

import logging
import os

import pytest

from rwkv_accel.checkpoint import retention
from rwkv_accel.checkpoint.format import TRAINABLE_FILE, list_complete, validate
from rwkv_accel.checkpoint.retention import prune, prune_weights, remove_leftovers
from tests.unit.checkpoint.checkpoint_helpers import write_simple


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_stay(tmp_path):
    for step in (1, 2, 3, 4):
        write_simple(tmp_path / f"step-{step}", step)
    removed = prune(tmp_path, keep_last=2)
    assert [p.name for p in removed] == ["step-1", "step-2"]
    assert names(tmp_path) == ["step-3", "step-4"]


def test_multiples_are_kept_for_good(tmp_path):
    for step in range(1, 9):
        write_simple(tmp_path / f"step-{step}", step)
    prune(tmp_path, keep_last=2, keep_every_n_steps=3)
    assert names(tmp_path) == ["step-3", "step-6", "step-7", "step-8"]


def test_saved_weights_stay_by_age_and_the_newest_always(tmp_path):
    for age, name in enumerate(("step-5", "epoch-1", "epoch-3", "epoch-2")):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, ns=(0, -age))
    (tmp_path / "LATEST").write_text("epoch-2\n")
    assert prune_weights(tmp_path, None, "epoch-2") == []
    assert [p.name for p in prune_weights(tmp_path, 2, "epoch-2")] == ["epoch-1", "epoch-3"]
    assert names(tmp_path) == ["LATEST", "epoch-2", "step-5"]
    prune_weights(tmp_path, 1, "epoch-2")
    assert names(tmp_path) == ["LATEST", "epoch-2"]


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        write_simple(tmp_path / f"step-{step}", step)
    for step in (2, 3):
        os.truncate(tmp_path / f"step-{step}" / TRAINABLE_FILE, 10)
    assert prune(tmp_path, keep_last=1) == []
    assert validate(tmp_path / "step-1", deep=True).step == 1
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]


def test_nothing_complete_means_nothing_removed(tmp_path):
    (tmp_path / "step-1").mkdir()
    assert prune(tmp_path, keep_last=1) == []
    assert names(tmp_path) == ["step-1"]


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(AssertionError):
        prune(tmp_path, keep_last=0)


def test_a_removal_cut_short_leaves_no_damaged_folder(tmp_path, monkeypatch):
    for step in (1, 2):
        write_simple(tmp_path / f"step-{step}", step)
    calls = []

    def killed(path, ignore_errors=False):
        calls.append(path.name)
        if not ignore_errors:
            (path / TRAINABLE_FILE).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(retention.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, keep_last=1)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-1.removed.tmp", "step-2"]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-2"]


def test_a_removal_that_fails_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        write_simple(tmp_path / f"step-{step}", step)

    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(retention.os, "replace", refuse)
    with caplog.at_level(logging.WARNING):
        assert prune(tmp_path, keep_last=1) == []
    assert "step-1 could not be removed: Permission denied" in caplog.text


def test_leftovers_go_and_complete_folders_stay(tmp_path):
    write_simple(tmp_path / "step-1", 1)
    (tmp_path / "step-2.tmp").mkdir()
    os.replace(write_simple(tmp_path / "step-3", 3), tmp_path / "step-3.replaced")
    remove_leftovers(tmp_path)
    # Without its successor the replaced folder is all there is of step 3.
    assert names(tmp_path) == ["step-1", "step-3.replaced"]
    write_simple(tmp_path / "step-3", 3)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-1", "step-3"]
    assert [m.step for _, m in list_complete(tmp_path)] == [1, 3]


def test_leftovers_of_a_run_without_checkpoints(tmp_path):
    remove_leftovers(tmp_path / "checkpoints")
    assert names(tmp_path) == []
