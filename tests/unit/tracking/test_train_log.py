"""train_log.txt: the official columns, header first, append only."""

import json
import math
import re

import pytest

from rwkv_accel.tracking.train_log import TrainLog, perplexity

HEADER = re.compile(r"^(NEW|RESUMED) RUN \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}( at step \d+)?$")


def test_header_epochs_and_messages(tmp_path, now):
    path = tmp_path / "train_log.txt"
    log = TrainLog(path, {"out_dir": "out/ä", "rank": 8}, 0, now)
    log.message("2 documents\n9 rows")
    log.epoch(0, 4.1234567, 6e-4)
    log.epoch(1, 2.0, 1e-5)
    log.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines == [
        "NEW RUN 2026-01-31 12:34:56.000789",
        '{"out_dir": "out/ä", "rank": 8}',
        "# 2026-01-31 12:34:56 2 documents",
        "# 2026-01-31 12:34:56 9 rows",
        "0 4.123457 61.7724 0.00060000 2026-01-31 12:34:56.000789 0",
        "1 2.000000 7.3891 0.00001000 2026-01-31 12:34:56.000789 1",
    ]
    assert json.loads(lines[1]) == {"out_dir": "out/ä", "rank": 8}


def test_resume_appends_and_the_last_column_starts_anew(tmp_path, now):
    path = tmp_path / "train_log.txt"
    log = TrainLog(path, {}, 0, now)
    log.epoch(0, 3.0, 1e-3)
    before = path.read_text()
    log = TrainLog(path, {}, 120, now)
    log.epoch(1, 2.5, 1e-3)
    text = path.read_text()
    assert text.startswith(before)
    added = text[len(before) :].splitlines()
    assert added[0] == "RESUMED RUN 2026-01-31 12:34:56.000789 at step 120"
    assert HEADER.match(added[0])
    assert HEADER.match(before.splitlines()[0])
    assert added[2] == "1 2.500000 12.1825 0.00100000 2026-01-31 12:34:56.000789 0"


def test_a_torn_last_line_does_not_swallow_the_next(tmp_path, now):
    path = tmp_path / "train_log.txt"
    path.write_text("0 4.12")
    TrainLog(path, {}, 5, now)
    assert path.read_text().splitlines()[:2] == ["0 4.12", "RESUMED RUN 2026-01-31 12:34:56.000789 at step 5"]


def test_perplexity_of_a_lost_run():
    assert perplexity(1.0) == pytest.approx(math.e)
    assert perplexity(10_000.0) == math.inf
    assert math.isnan(perplexity(math.nan))
