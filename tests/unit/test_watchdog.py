"""One rank's watchdog beside a second rank that is only its file."""

import json
import time

import pytest

from rwkv_accel.watchdog import HEARTBEAT_DIR, Watchdog


@pytest.fixture
def watched(tmp_path, capfd):
    dog = Watchdog(tmp_path, rank=0, world_size=2, timeout=0.4, action="report").start()
    yield tmp_path
    dog.stop()


def other_rank(out_dir, beats):
    content = {
        "host": "h",
        "pid": 1,
        "looks": beats,
        "phase": "training",
        "step": 1,
        "beats": beats,
        "marks": 0,
        "at": 0,
    }
    part = out_dir / HEARTBEAT_DIR / "part"
    part.write_text(json.dumps(content))
    part.replace(out_dir / HEARTBEAT_DIR / "rank-1.json")


def reports(out_dir):
    path = out_dir / "stall-rank0.txt"
    return path.read_text().count("end of the report") if path.exists() else 0


def wait_for_reports(out_dir, number):
    deadline = time.monotonic() + 60
    while reports(out_dir) < number:
        assert time.monotonic() < deadline, f"{reports(out_dir)} reports of {number}"
        time.sleep(0.02)


def test_a_rank_that_waits_reports_again_when_the_others_halt_again(watched):
    other_rank(watched, 1)
    wait_for_reports(watched, 1)
    other_rank(watched, 2)
    wait_for_reports(watched, 2)
    text = (watched / "stall-rank0.txt").read_text()
    assert text.count("is stopped as a whole or gone; pid 1 on h: training, step 1") == 2


def test_nothing_is_reported_twice_while_nothing_changes(watched):
    other_rank(watched, 1)
    wait_for_reports(watched, 1)
    looks = json.loads((watched / HEARTBEAT_DIR / "rank-0.json").read_text())["looks"]
    deadline = time.monotonic() + 60
    while json.loads((watched / HEARTBEAT_DIR / "rank-0.json").read_text())["looks"] < looks + 12:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert reports(watched) == 1


def test_the_end_in_a_folder_that_has_become_read_only(tmp_path, monkeypatch):
    dog = Watchdog(tmp_path, rank=0, world_size=1, timeout=60, action="report").start()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    dog.stop()
    assert (tmp_path / HEARTBEAT_DIR / "rank-0.json").exists()
