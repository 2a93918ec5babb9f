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


def test_each_baseline_has_its_rows_and_one_that_fails_has_none(options, monkeypatch):
    def on_logit(r, w_logit, *others):
        return wkv7_chunked(r, wkv7_gpu.LOWEST_W_LOG * torch.sigmoid(w_logit.float()), *others, None, None)

    def fails(*tensors):
        raise RuntimeError("no such kernel")

    others = [
        wkv7_gpu.Baseline("one", lambda *tensors: wkv7_chunked(*tensors, None, None), wkv7_gpu.log_decay_ready),
        wkv7_gpu.Baseline("two", on_logit, wkv7_gpu.logit_ready, (torch.bfloat16,)),
        wkv7_gpu.Baseline("broken", fails, wkv7_gpu.logit_ready),
    ]
    monkeypatch.setattr(wkv7_gpu, "baselines", lambda: others)
    rows = list(wkv7_gpu.measure(options))
    forward = [row for row in rows if row.name == "triton forward, B=2 T=5 H=1 N=16, bf16"]
    assert [row.baseline for row in forward] == ["one", "two"]
    assert all("of the floor by bytes" in row.note for row in forward)
    theirs = next(row for row in rows if row.name == "two forward, B=2 T=5 H=1 N=16, bf16")
    assert forward[1].ratio == pytest.approx(theirs.value / forward[1].value)
    assert [row.baseline for row in rows if row.name == "worst error, bfloat16"] == ["one", "two"]
    assert [row.baseline for row in rows if row.name == "worst error, float32"] == ["one"]
    assert not any("broken" in row.name + row.baseline for row in rows)


def test_a_configuration_that_fails_is_left_out(options, monkeypatch, tmp_path):
    monkeypatch.setattr("rwkv_accel.runtime.cache_folder", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(wkv7_tune, "SHAPE", (1, 20, 1, 16))
    monkeypatch.setattr(wkv7_tune, "DTYPES", (torch.bfloat16,))
    bad = [Launch(16, warps) for warps in (1, 2, 8)]
    monkeypatch.setattr(wkv7_tune, "changes", lambda *_: [{"scan": launch} for launch in bad])
    plain, errors = wkv7_tune.run, iter([RuntimeError("PassManager::run failed"), ParityError("off"), None])

    def run(config, *rest):
        if config.scan in bad and (error := next(errors)) is not None:
            raise error
        return plain(config, *rest)

    monkeypatch.setattr(wkv7_tune, "run", run)
    monkeypatch.setattr(
        wkv7_tune,
        "search",
        lambda start, size, seconds, keep: (
            [seconds(start, replace(start, scan=launch)) for launch in bad[:2]] == [(1.0, float("inf"))] * 2 and start
        ),
    )
    rows = wkv7_tune.tune(options)
    assert [row.name for row in rows] == ["tuned, bfloat16-16"]


def test_what_tuning_finds_is_kept_at_once():
    start, kept = default_config("sm_90", torch.bfloat16, 64), []
    wkv7_tune.search(start, 64, lambda one, two: (float(one.chunk_size), float(two.chunk_size)), kept.append)
    assert kept == [replace(start, chunk_size=16)]


def test_a_wrong_kernel_is_not_timed(options, monkeypatch):
    def wrong(*tensors):
        out, state = wkv7(*tensors, backend="triton")
        return out * 1.05, state

    monkeypatch.setattr(wkv7_gpu, "ours", wrong)
    monkeypatch.setattr(wkv7_gpu, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(ParityError, match=r"^worst error, bfloat16: "):
        list(wkv7_gpu.measure(options))


def test_another_dtype_that_is_off_is_told_after_the_timing(options, monkeypatch):
    def wrong_in_fp32(*tensors):
        out, state = wkv7(*tensors, backend="triton")
        return (out * 1.05 if out.dtype == torch.float32 else out), state

    monkeypatch.setattr(wkv7_gpu, "baselines", lambda: [])
    monkeypatch.setattr(wkv7_gpu, "ours", wrong_in_fp32)
    rows = []
    with pytest.raises(ParityError, match=r"^worst error, float32: "):
        rows.extend(row.name for row in wkv7_gpu.measure(options))
    assert "triton forward + backward, B=2 T=5 H=1 N=16, bf16" in rows


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
