"""Which checkpoint a start continues from, and which recipes it refuses."""

import logging
import os

import pytest

from rwkv_accel.checkpoint import check_same_run, find_resume, find_resume_on_all
from rwkv_accel.checkpoint.format import TRAINABLE_FILE
from rwkv_accel.config.schema import CheckpointConfig, RunConfig
from rwkv_accel.errors import UserError
from tests.unit.checkpoint.checkpoint_helpers import write_simple


def damage(folder):
    data = bytearray((folder / TRAINABLE_FILE).read_bytes())
    data[-1] ^= 255
    (folder / TRAINABLE_FILE).write_bytes(data)


def test_auto_without_checkpoints_is_a_fresh_start(tmp_path):
    assert find_resume(tmp_path / "out", "auto") is None
    (tmp_path / "checkpoints" / "step-1.tmp").mkdir(parents=True)
    assert find_resume(tmp_path, "auto") is None


def test_auto_takes_the_newest_and_names_the_damaged_that_it_skips(tmp_path, caplog):
    folders = [write_simple(tmp_path / "checkpoints" / f"step-{step}", step) for step in (1, 2, 3, 4)]
    damage(folders[3])
    (folders[2] / TRAINABLE_FILE).unlink()
    with caplog.at_level(logging.WARNING):
        assert find_resume(tmp_path, "auto") == folders[1]
    assert f"{folders[3]} is damaged: the bytes of {TRAINABLE_FILE} do not fit its checksum; skipped" in caplog.text
    assert f"{folders[2]} is damaged: {TRAINABLE_FILE} is missing; skipped" in caplog.text


def test_older_damage_is_not_looked_at(tmp_path, caplog):
    folders = [write_simple(tmp_path / "checkpoints" / f"step-{step}", step) for step in (1, 2)]
    damage(folders[0])
    with caplog.at_level(logging.WARNING):
        assert find_resume(tmp_path, "auto") == folders[1]
    assert caplog.text == ""


def test_all_damaged_is_an_error_and_never_a_silent_fresh_start(tmp_path):
    damage(write_simple(tmp_path / "checkpoints" / "step-1", 1))
    with pytest.raises(UserError, match=r"no usable checkpoint: .*step-1 is damaged.*another out_dir"):
        find_resume(tmp_path, "auto")


def test_an_interrupted_save_wins_when_it_is_newer_and_only_then(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    write_simple(checkpoints / "step-00000100", 100)
    interrupted = write_simple(checkpoints / "INTERRUPTED", 130)
    assert find_resume(tmp_path, "auto") == interrupted
    newer = write_simple(checkpoints / "step-00000200", 200)
    assert find_resume(tmp_path, "auto") == newer
    write_simple(checkpoints / "INTERRUPTED", 250)
    assert find_resume(tmp_path, "auto") == interrupted


def test_after_a_return_to_an_older_step_the_new_branch_is_continued(tmp_path):
    for step in (100, 200):
        write_simple(tmp_path / "checkpoints" / f"step-{step}", step)
    branch = write_simple(tmp_path / "checkpoints" / "step-110", 110)
    assert find_resume(tmp_path, "auto") == branch


def test_none_refuses_a_folder_with_a_checkpoint(tmp_path):
    assert find_resume(tmp_path, "none") is None
    write_simple(tmp_path / "checkpoints" / "step-7", 7)
    with pytest.raises(UserError, match=r"resume is none, but .*holds step-7; give another out_dir"):
        find_resume(tmp_path, "none")


def test_a_path_is_taken_or_refused_with_the_reason(tmp_path):
    folder = write_simple(tmp_path / "elsewhere", 7)
    assert find_resume(tmp_path / "out", str(folder)) == folder
    with pytest.raises(UserError, match="does not exist"):
        find_resume(tmp_path, str(tmp_path / "nothing"))
    os.truncate(folder / TRAINABLE_FILE, 3)
    with pytest.raises(UserError, match=r"has 3 bytes instead of \d+; give another checkpoint.resume"):
        find_resume(tmp_path, str(folder))


def test_find_resume_on_all_passes_on_result_and_error(tmp_path, accelerator):
    folder = write_simple(tmp_path / "checkpoints" / "step-7", 7)
    assert find_resume_on_all(accelerator, tmp_path, CheckpointConfig()) == folder
    with pytest.raises(UserError, match="holds step-7"):
        find_resume_on_all(accelerator, tmp_path, CheckpointConfig(resume="none"))


def recipe(**sections):
    tree = {
        "out_dir": "out",
        "model": {"path": "base.pth"},
        "data": {"path": "a.jsonl"},
        "trainer": {"global_batch_size": 8},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return RunConfig.model_validate(tree).model_dump(mode="json")


def test_the_same_recipe_passes():
    check_same_run(recipe(), recipe(), "out/step-3")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"peft": {"rank": 16}}, "peft.rank was 32 and is now 16"),
        ({"peft": {"targets": ["att.key"]}}, 'peft.targets was .* and is now ."att.key"'),
        ({"data": {"path": "b.jsonl"}}, 'data.path was "a.jsonl" and is now "b.jsonl"'),
        ({"data": {"ctx_len": 512}}, "data.ctx_len was 1024 and is now 512"),
        ({"optim": {"lr_init": 1e-3}}, "optim.lr_init was 2e-05 and is now 0.001"),
        ({"optim": {"lr_scale": {"w0": 1.0}}}, "optim.lr_scale.w0 was 2.0 and is now 1.0"),
        ({"trainer": {"seed": 1}}, "trainer.seed was 42 and is now 1"),
        ({"trainer": {"precision": "bf16-mixed"}}, "trainer.precision"),
        ({"trainer": {"global_batch_size": 16}}, "trainer.global_batch_size was 8 and is now 16"),
        ({"eval": {"split_fraction": 0.1}}, "eval.split_fraction was 0.0 and is now 0.1"),
        ({"model": {"path": None, "init": {"n_layer": 2, "n_embd": 64}}}, "model.init was null and is now"),
    ],
)
def test_a_contradicting_key_is_named_with_both_values(change, key):
    with pytest.raises(UserError, match=key):
        check_same_run(recipe(), recipe(**change), "out/step-3")


def test_all_contradictions_are_listed_at_once():
    with pytest.raises(UserError) as error:
        check_same_run(recipe(), recipe(peft={"rank": 16}, trainer={"seed": 1}), "out/step-3")
    assert "peft.rank" in str(error.value)
    assert "trainer.seed" in str(error.value)
    assert "another out_dir" in str(error.value)
    assert "the checkpoint out/step-3:" in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"out_dir": "elsewhere"},
        {"model": {"path": "/moved/base.pth"}},
        {"model": {"wkv_backend": "reference"}},
        {"data": {"cache_dir": "/elsewhere"}},
        {"peft": {"load_path": "out/moved"}},
        {"trainer": {"micro_batch_size": 4}},
        {"trainer": {"gradient_checkpointing": "block"}},
        {"trainer": {"log_every_n_steps": 5}},
        {"checkpoint": {"every_n_steps": 7}},
        {"tracking": {"project": "other"}},
        {"samples": {"prompts": ["hello"]}},
    ],
)
def test_what_does_not_change_the_result_may_change(change, caplog):
    check_same_run(recipe(), recipe(**change), "out/step-3")
    assert caplog.text == ""


def test_another_length_is_allowed_and_announced(caplog):
    with caplog.at_level(logging.WARNING):
        check_same_run(recipe(), recipe(trainer={"max_epochs": 3, "max_steps": 50}), "out/step-3")
    assert "trainer.max_epochs was 1 and is now 3" in caplog.text
    assert "trainer.max_steps was null and is now 50" in caplog.text


def test_other_validation_data_is_allowed_and_announced(caplog):
    with caplog.at_level(logging.WARNING):
        check_same_run(recipe(), recipe(eval={"path": "a.jsonl"}), "out/step-3")
        assert caplog.text == ""
        check_same_run(recipe(eval={"path": "a.jsonl"}), recipe(eval={"path": ["b.jsonl"]}), "out/step-3")
    assert 'eval.path was "a.jsonl" and is now ["b.jsonl"]: best/, plateau and early stop still' in caplog.text


def test_without_a_global_batch_the_keys_that_make_it_are_compared():
    saved = recipe(trainer={"global_batch_size": None})
    with pytest.raises(UserError, match=r"trainer\.micro_batch_size was 1 and is now 2"):
        check_same_run(saved, recipe(trainer={"global_batch_size": None, "micro_batch_size": 2}), "out/step-3")


def test_a_key_that_only_a_newer_schema_knows_is_no_contradiction():
    saved = recipe()
    del saved["peft"]["svd_niter"]
    check_same_run(saved, recipe(), "out/step-3")
