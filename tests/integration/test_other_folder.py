"""What a run saved is used from any folder, however the recipe named its files."""

from pathlib import Path

from rwkv_accel.generation.loading import find_source


def test_an_adapter_finds_its_base_from_another_folder(run, work, tmp_path, monkeypatch):
    monkeypatch.chdir(work)
    assert run("model.path=base.pth", "trainer.max_steps=1") == 0
    monkeypatch.chdir(tmp_path)
    assert not Path("base.pth").exists()
    assert find_source(tmp_path / "out").base == work / "base.pth"
