"""loss_data.json is a complete array at every moment: torn writes, kill -9, readers at work, resumes, NaN."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rwkv_accel.tracking.loss_json import LossJson


class Died(BaseException):
    """The writer's end in the middle of a system call."""


def record(step, loss=1.5):
    return {"step": step, "loss": loss, "lr": 1e-05}


def read(path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def steps(path):
    return [r["step"] for r in read(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "loss_data.json"


@pytest.fixture(params=["hard_links", "no_hard_links"])
def links(request, monkeypatch):
    if request.param == "no_hard_links":

        def refuse(*_):
            raise PermissionError("Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    return request.param == "hard_links"


def test_array_is_complete_after_every_append(path, links):
    log = LossJson(path, 0)
    assert log.has_two_copies == links
    assert path.read_bytes() == b"[\n]"
    for step in range(1, 8):
        log.append(record(step))
        assert steps(path) == list(range(1, step + 1))
    log.close()
    assert read(path) == [record(step) for step in range(1, 8)]
    assert path.read_bytes().startswith(b'[\n{"step": 1, "loss": 1.5, "lr": 1e-05},\n{"step": 2,')
    assert [p.name for p in path.parent.iterdir()] == ["loss_data.json"]


def test_resume_drops_later_records_and_appends(path, links):
    log = LossJson(path, 0)
    for step in range(1, 10):
        log.append(record(step))
    # No close: the run was killed.
    log = LossJson(path, 4)
    assert steps(path) == [1, 2, 3, 4]
    for step in (5, 6, 7):
        log.append(record(step, loss=9.0))
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7]
    assert [r["loss"] for r in read(path)] == [1.5] * 4 + [9.0] * 3
    log.close()
    assert LossJson(path, 0).num_damaged == 0
    assert steps(path) == []


def test_non_finite_numbers_become_null(path):
    log = LossJson(path, 0)
    log.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": float("-inf"), "tokens": 3})
    log.append(record(2))
    assert read(path)[0] == {"step": 1, "loss": None, "grad_norm": None, "lr": None, "tokens": 3}
    log = LossJson(path, 1)
    assert read(path) == [{"step": 1, "loss": None, "grad_norm": None, "lr": None, "tokens": 3}]


def torn_append(log, new, num_bytes, monkeypatch):
    """Append, but die when num_bytes of the write are on disk. Returns the length of the whole write."""
    whole, real = 0, os.pwrite

    def torn(fd, data, offset):
        nonlocal whole
        whole = len(data)
        real(fd, data[:num_bytes], offset)
        raise Died

    monkeypatch.setattr(os, "pwrite", torn)
    with pytest.raises(Died):
        log.append(new)
    monkeypatch.setattr(os, "pwrite", real)
    return whole


@pytest.mark.parametrize("num_before", [0, 1, 4])
def test_death_at_every_byte_of_a_write(path, links, num_before, monkeypatch):
    cut, whole = 0, 1
    while cut <= whole:
        path.unlink(missing_ok=True)
        log = LossJson(path, 0)
        for step in range(1, num_before + 1):
            log.append(record(step))
        whole = torn_append(log, record(num_before + 1), cut, monkeypatch)
        if links:
            assert steps(path) == list(range(1, num_before + 1)), "the visible file was touched"
        again = LossJson(path, 10**9)
        kept = steps(path)
        # In place, all bytes of the record without the closing bracket are as good as the record.
        assert kept in ([*range(1, num_before + 1)], [*range(1, num_before + 2)])
        assert links is False or len(kept) == num_before
        again.append(record(100))
        assert steps(path) == [*kept, 100]
        assert read(path)[-1] == record(100)
        cut += 1
    assert whole >= 40


@pytest.mark.parametrize("room", [0, 1, 20])
def test_full_disk_keeps_the_array_whole_and_the_records_for_later(path, links, room, monkeypatch):
    log = LossJson(path, 0)
    for step in (1, 2, 3):
        log.append(record(step))
    pwrite, sizes = os.pwrite, {}

    def full(fd, data, offset):
        # A file system that is full takes what fits, and overwrites what is there already.
        stat = os.fstat(fd)
        size = sizes.setdefault(stat.st_ino, stat.st_size + room)
        if offset >= size:
            raise OSError(28, "No space left on device")
        return pwrite(fd, data[: size - offset], offset)

    with monkeypatch.context() as refusing:
        refusing.setattr(os, "pwrite", full)
        for step in (4, 5, 6):
            with pytest.raises(OSError, match="No space left"):
                log.append(record(step))
            assert steps(path) == [1, 2, 3]
    assert steps(path) == [1, 2, 3]
    log.append(record(7))
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7]
    log.append(record(8))
    log.close()
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_rename_that_fails_is_made_up_for(path, monkeypatch):
    log = LossJson(path, 0)
    log.append(record(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as refusing:
        refusing.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            log.append(record(2))
    assert steps(path) == [1]
    log.flush()
    assert steps(path) == [1, 2]
    log.append(record(3))
    assert steps(path) == [1, 2, 3]


def test_death_between_write_and_rename(path, monkeypatch):
    log = LossJson(path, 0)
    for step in (1, 2, 3):
        log.append(record(step))

    def die(*_):
        raise Died

    for call in ("link", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, die)
            with pytest.raises(Died):
                log.append(record(4))
        assert steps(path) == [1, 2, 3]
        log = LossJson(path, 10**9)
        assert steps(path) == [1, 2, 3]
    log.append(record(4))
    assert steps(path) == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", [b"\x00" * 40, b'{"step": 3, "lo', b"17", b'{"loss": 1}'])
def test_damaged_line_is_dropped_and_counted(path, damage):
    lines = [b'{"step": 1}', b'{"step": 2}', damage, b'{"step": 4}']
    path.write_bytes(b"[\n" + b",\n".join(lines) + b"\n]")
    log = LossJson(path, 10)
    assert log.num_damaged == 1
    assert steps(path) == [1, 2, 4]


def test_bytes_per_append_do_not_grow(path, monkeypatch):
    written, real = [], os.pwrite

    def count(fd, data, offset):
        written[-1] += len(data)
        return real(fd, data, offset)

    log = LossJson(path, 0)
    monkeypatch.setattr(os, "pwrite", count)
    for step in range(1000, 3000):
        written.append(0)
        log.append(record(step))
    assert max(written) == 2 * len(json.dumps(record(1000))) + 2 * len(",\n") + len("\n]")
    assert len(read(path)) == 2000


def test_short_writes_are_continued(path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:7], offset))
    log = LossJson(path, 0)
    for step in (1, 2, 3):
        log.append(record(step))
    assert read(path) == [record(1), record(2), record(3)]


WRITER = """
import sys, time
from pathlib import Path
from rwkv_accel.tracking.loss_json import LossJson
log = LossJson(Path(sys.argv[1]), int(sys.argv[2]))
print("open", flush=True)
for step in range(int(sys.argv[2]) + 1, 10**7):
    log.append({"step": step, "text": "x" * 900})
    time.sleep(float(sys.argv[3]))
"""


def start_writer(path, resume_step, pause):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(resume_step), str(pause)], stdout=subprocess.PIPE
    )
    assert writer.stdout.readline() == b"open\n"
    return writer


def test_kill_9_leaves_a_complete_array_each_time(path):
    last = 0
    for attempt in range(6):
        writer = start_writer(path, max(last - 5, 0), 0)
        time.sleep(0.02 * attempt)
        while len(path.read_bytes()) < 20_000:
            time.sleep(0.005)
        writer.send_signal(signal.SIGKILL)
        assert writer.wait(timeout=30) == -signal.SIGKILL
        found = steps(path)
        assert found == list(range(1, len(found) + 1))
        assert len(found) > 10
        last = len(found)


def test_a_reader_never_meets_half_a_record(path):
    # Records are 0.1 s apart: a reader has that long to read what it opened.
    writer = start_writer(path, 0, 0.1)
    try:
        reads, longest = 0, 0
        end = time.monotonic() + 2
        while time.monotonic() < end:
            found = steps(path)
            assert found == list(range(1, len(found) + 1))
            assert len(found) >= longest, "the array became shorter"
            longest = len(found)
            reads += 1
    finally:
        writer.kill()
        writer.wait(timeout=30)
    assert reads > 20
    assert longest > 3


def test_closing_in_a_folder_that_has_become_read_only(path, monkeypatch):
    log = LossJson(path, 0)
    log.append(record(1))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    for name in ("link", "replace", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(PermissionError):
        log.append(record(2))
    log.close()
    monkeypatch.undo()
    assert steps(path) == [1]
