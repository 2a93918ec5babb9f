"""A clock that the test moves, and a recipe that writes into the test's folder."""

from datetime import datetime

import pytest

from rwkv_accel.config.schema import RunConfig


class FakeClock:
    """Monotonic seconds that move only when told."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds

    def advance(self, seconds):
        self.seconds += seconds


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def now():
    return lambda: datetime(2026, 1, 31, 12, 34, 56, 789)


@pytest.fixture
def make_config(tmp_path):
    def make(**tracking):
        return RunConfig.model_validate(
            {
                "out_dir": str(tmp_path),
                "model": {"init": {"n_layer": 1, "n_embd": 64}},
                "data": {"path": "x.jsonl"},
                "tracking": {"progress": "none", **tracking},
            }
        )

    return make
