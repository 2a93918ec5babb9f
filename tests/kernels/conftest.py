"""Kernel tests run under Triton's interpreter (TRITON_INTERPRET=1 before triton is imported) or, marked gpu, compiled.

The interpreter needs a process of its own: test_in_interpreter.py starts it for all tests of `cases/`.
"""

import pytest
import torch
from triton import knobs

from rwkv_accel.ops.wkv7.pieces import build_pieces

INTERPRETED = bool(knobs.runtime.interpret)
CASES = "tests/kernels/cases/"

if INTERPRETED:
    from tests.kernels import interpreter

    interpreter.install()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if CASES in item.path.as_posix() and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def nan_memory(monkeypatch):
    """Uninitialised memory holds NaN, so that a value which is read without having been written shows."""
    # A run of the trainer within this process may have switched the filling off.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    # Only then is it filled. Warnings alone: on a GPU plain matrix products would otherwise be refused.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def programs(monkeypatch):
    """Function that sets how many programs a device is taken to need, and the shortest piece in chunks."""

    def wanted(num, least_chunks=1):
        monkeypatch.setattr("rwkv_accel.ops.wkv7.pieces.WANTED_PROGRAMS", num)
        monkeypatch.setattr("rwkv_accel.ops.wkv7.pieces.LEAST_CHUNKS", least_chunks)
        build_pieces.cache_clear()

    yield wanted
    build_pieces.cache_clear()
