"""Every shipped kernel compiles for GPUs that are not here, without spills; its instructions are those recorded.

python -m pytest -m long tests/kernels/test_aot.py     all of them (minutes)
"""

import os

import pytest
import torch
import triton

from rwkv_accel.bench import kernels
from rwkv_accel.bench.__main__ import main
from rwkv_accel.bench.aot import TARGETS, Cost, compile_kernel, shipped
from rwkv_accel.bench.harness import Options, ParityError
from rwkv_accel.ops.wkv7.triton_config import Launch

TRAINING = ("invert_chunks", "scan_pieces/from zeros", "scan_pieces_backward/from zeros", "chunk_gradients")
"""What a training step launches."""
VERSION, RECORDED = kernels.recorded()


def check(name, cost):
    assert not kernels.problems({name: cost})
    if triton.__version__ == VERSION:  # another compiler makes other code
        assert cost.instructions == pytest.approx(RECORDED[name].instructions, rel=0.1), name


@pytest.mark.parametrize("target", TARGETS)
def test_training_kernels_compile(target):
    found = {k.name.rsplit("/", 1)[0]: k for k in shipped((target,), (torch.bfloat16,), (64,))}
    for variant in TRAINING:
        check(f"{target} {found[variant].name}", compile_kernel(found[variant]))


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_all_kernels_compile():
    costs = kernels.all_costs(len(os.sched_getaffinity(0)))
    assert costs.keys() == RECORDED.keys()
    for name, cost in costs.items():
        check(name, cost)


def test_the_record_holds_every_shipped_kernel_and_none_spills():
    assert {f"{kernel.target} {kernel.name}" for kernel in shipped()} == set(RECORDED)
    assert not kernels.problems(RECORDED)
    assert {name.split()[0] for name in RECORDED} == set(TARGETS)


def test_spills_and_too_much_shared_memory_are_problems(monkeypatch):
    costs = {"sm_120 a/bfloat16-64": Cost(255, 3, 0, 100), "gfx942 b/float32-16": Cost(100, 0, 70_000, 100)}
    assert kernels.problems(costs) == [
        "sm_120 a/bfloat16-64 spills (3)",
        "gfx942 b/float32-16 wants 70000 bytes of shared memory, there are 65536",
    ]
    monkeypatch.setattr(kernels, "all_costs", lambda processes: costs)
    with pytest.raises(ParityError, match=r"sm_120 a/bfloat16-64 spills \(3\); gfx942 b"):
        kernels.measure(Options(1, 1, "cpu"))


def test_table_of_the_command(monkeypatch, capsys):
    name, cost = next(iter(RECORDED.items()))
    monkeypatch.setattr(kernels, "all_costs", lambda processes: {name: cost})
    assert main(["kernels", "--threads", "1"]) == 0
    assert f"| kernels | {name} ({cost.registers} registers, {cost.shared_bytes} B shared, no spills)" in (
        capsys.readouterr().out
    )


def test_gpu_rows_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["wkv7", "--device", "cuda"]) == 2
    assert "no GPU is visible here; these rows stay not measured" in capsys.readouterr().err


def test_a_state_in_memory_is_not_loaded_ahead():
    with pytest.raises(ValueError, match="inner needs num_stages 1"):
        Launch(64, 8, num_stages=2, inner=32)
