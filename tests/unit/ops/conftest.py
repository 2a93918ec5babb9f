"""Fixtures of the operator tests."""

import pytest
import torch

from rwkv_accel.ops.wkv7 import layout


@pytest.fixture
def nan_memory(monkeypatch):
    """Uninitialised memory holds NaN, so that a value which is read without having been written shows."""
    # A run of the trainer within this process may have switched the filling off.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def segment_chunks(monkeypatch):
    """Function that limits segments to a number of chunks of 32 tokens, for inputs of a shape in fp64."""

    def limit(num_chunks, heads, size):
        monkeypatch.setitem(layout.SEGMENT_BYTES, "cpu", num_chunks * heads * 32 * size * 8)
        layout.build_layout.cache_clear()

    yield limit
    layout.build_layout.cache_clear()
