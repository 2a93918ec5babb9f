"""What the compiler makes of every shipped Triton kernel, on GPUs that are not here, next to what is recorded.

python -m rwkv_accel.bench kernels             compile them all, compare with kernels.json
python -m rwkv_accel.bench.kernels --record    write kernels.json (after a change of a kernel or of its sizes)
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch

from rwkv_accel.bench.aot import SHARED_LIMIT, TARGETS, Cost, compile_kernel, shipped
from rwkv_accel.bench.harness import Options, ParityError, Row
from rwkv_accel.ops.wkv7.triton_config import DTYPES, HEAD_SIZES

RECORD = Path(__file__).with_name("kernels.json")
Group = tuple[str, torch.dtype, int]


def groups() -> list[Group]:
    """All of (target, dtype, head size)."""
    return [(target, dtype, size) for target in TARGETS for dtype in DTYPES for size in HEAD_SIZES]


def costs_of(group: Group) -> dict[str, Cost]:
    """ "target kernel/variant/dtype-head size" -> cost, for the kernels of one group."""
    target, dtype, size = group
    return {f"{target} {kernel.name}": compile_kernel(kernel) for kernel in shipped((target,), (dtype,), (size,))}


def all_costs(processes: int) -> dict[str, Cost]:
    """Costs of everything that is shipped; minutes on a few cores."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return {name: cost for costs in pool.map(costs_of, groups()) for name, cost in costs.items()}


def recorded() -> tuple[str, dict[str, Cost]]:
    """The compiler's version, and the costs it had."""
    document = json.loads(RECORD.read_text(encoding="utf-8"))
    return document["triton"], {name: Cost(*values) for name, values in document["kernels"].items()}


def problems(costs: dict[str, Cost]) -> list[str]:
    """One line per kernel that spills registers or wants more shared memory than its target has."""
    found = []
    for name, cost in costs.items():
        limit = SHARED_LIMIT[name.split()[0]]
        if cost.spilled:
            found.append(f"{name} spills ({cost.spilled})")
        if cost.shared_bytes > limit:
            found.append(f"{name} wants {cost.shared_bytes} bytes of shared memory, there are {limit}")
    return found


def measure(options: Options) -> list[Row]:
    costs = all_costs(options.threads)
    wrong = problems(costs)
    if wrong:
        raise ParityError("; ".join(wrong))
    version, before = recorded()
    rows = []
    for name, cost in costs.items():
        note = f"{cost.registers} registers, {cost.shared_bytes} B shared, no spills"
        old = before.get(name)
        ratio = None if old is None else old.instructions / cost.instructions
        rows.append(Row(name, cost.instructions, "instructions", f"recorded, triton {version}", ratio, note))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    if list(sys.argv[1:] if argv is None else argv) != ["--record"]:
        sys.stderr.write("usage: python -m rwkv_accel.bench.kernels --record\n")
        return 2
    import triton

    costs = all_costs(len(os.sched_getaffinity(0)))
    lines = [f"  {json.dumps(name)}: {json.dumps(list(asdict(cost).values()))}" for name, cost in costs.items()]
    header = f'"triton": {json.dumps(triton.__version__)},\n"columns": {json.dumps(list(Cost.__annotations__))}'
    RECORD.write_text("{\n" + header + ',\n"kernels": {\n' + ",\n".join(lines) + "\n}\n}\n", encoding="utf-8")
    for line in problems(costs):
        sys.stderr.write(line + "\n")
    return 1 if problems(costs) else 0


if __name__ == "__main__":
    sys.exit(main())
