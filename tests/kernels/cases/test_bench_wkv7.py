"""The measurements of a GPU, run small: their gate, their rows, and the sizes that tuning leaves for training."""

from dataclasses import replace

import pytest
import torch

from rwkv_accel.bench import wkv7_gpu, wkv7_tune
from rwkv_accel.bench.harness import Options, ParityError
from rwkv_accel.ops.wkv7 import triton_config, wkv7
from rwkv_accel.ops.wkv7.chunked import wkv7_chunked
from rwkv_accel.ops.wkv7.triton_config import Launch, default_config


@pytest.fixture
def options(device, monkeypatch):
    monkeypatch.setattr(wkv7_gpu, "GATE_SHAPE", (1, 5, 1, 16))
    monkeypatch.setattr(wkv7_gpu, "SHAPES", ((2, 5, 1, 16), (1, 7, 1, 16)))
    monkeypatch.setattr(wkv7_gpu, "COPY_BYTES", 2**16)
    return Options(1, 1, device.type)


def test_rows_against_a_baseline(options, monkeypatch):
    def chunked(*tensors):
        return wkv7_chunked(*tensors, None, None)

    monkeypatch.setattr(wkv7_gpu, "load_fla", lambda: ("another", chunked))
    rows = {row.name: row for row in wkv7_gpu.measure(options)}
    assert len(rows) == 6 + 1 + 2 * (4 + 2) + 1
    timed = rows["triton forward + backward, B=2 T=5 H=1 N=16, bf16"]
    other = rows["another forward + backward, B=2 T=5 H=1 N=16, bf16"]
    assert (timed.unit, timed.baseline) == ("ms", "another")
    assert timed.ratio == pytest.approx(other.value / timed.value)
    assert rows["worst error, bfloat16, near-identical keys"].baseline == "another"
    assert rows["time per token of one long row"].value > 0


def test_a_wrong_kernel_is_not_timed(options, monkeypatch):
    def wrong(*tensors):
        out, state = wkv7(*tensors, backend="triton")
        return out * 1.05, state

    monkeypatch.setattr(wkv7_gpu, "ours", wrong)
    monkeypatch.setattr(wkv7_gpu, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(ParityError, match=r"^worst error, bfloat16: "):
        wkv7_gpu.measure(options)


def test_tuned_sizes_are_kept_and_used(options, device, monkeypatch, tmp_path):
    monkeypatch.setattr("rwkv_accel.runtime.cache_folder", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU/80GB")
    monkeypatch.setattr(wkv7_tune, "SHAPE", (1, 20, 1, 16))
    monkeypatch.setattr(wkv7_tune, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(wkv7_tune, "changes", lambda *_: [{"scan": Launch(16, 2)}, {"chunk_size": 16}])
    configs = {}
    plain = wkv7_tune.run

    def run(config, *rest):
        once = plain(config, *rest)
        configs[once] = config
        return once

    def fast_with_two_warps(pair, *_):
        return {key: 1.0 if configs[once].scan.num_warps == 2 else 1.5 for key, once in pair.items()}

    monkeypatch.setattr(wkv7_tune, "run", run)
    monkeypatch.setattr(wkv7_tune, "interleaved", fast_with_two_warps)
    rows = wkv7_tune.tune(options)
    assert [(row.name, row.value, row.ratio) for row in rows] == [("tuned, bfloat16-16", 1000.0, 1.5)]
    assert (tmp_path / "wkv7-Some-GPU-80GB.json").is_file()
    triton_config.choose_config.cache_clear()
    try:
        chosen = triton_config.choose_config("sm_90", torch.bfloat16, 16, "Some GPU/80GB")
        assert chosen == replace(default_config("sm_90", torch.bfloat16, 16), scan=Launch(16, 2))
        assert triton_config.choose_config("sm_90", torch.bfloat16, 32, "Some GPU/80GB").chunk_size == 16
    finally:
        triton_config.choose_config.cache_clear()


def test_search_descends_until_nothing_helps():
    target = default_config("sm_90", torch.bfloat16, 64)
    goal = {"chunk_size": 16, "scan": Launch(16, 2, 2), "gradients": Launch(32, 1, 1)}

    def cost(config):
        wrong = sum(getattr(config, name) != value for name, value in goal.items())
        return float("inf") if config.invert.num_warps == 8 else 1 + wrong

    found = wkv7_tune.search(target, 64, lambda one, two: (cost(one), cost(two)))
    assert {name: getattr(found, name) for name in goal} == goal
    assert found.invert == target.invert
    assert found.scan_backward == target.scan_backward
