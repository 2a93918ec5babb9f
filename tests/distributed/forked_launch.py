"""Many short multi-process runs for the price of one import.

`accelerate launch` spends most of a tiny run importing torch and DeepSpeed, once in the launcher and once per
process. Here Accelerate's own launcher works out the environment of each process from a file of accelerate_configs/,
and the processes are forked from a server that has the imports behind it. Each is fresh: it has trained nothing.
"""

import functools
import gc
import multiprocessing
import os
import socket
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
# Also what these import late: the first optimizer step alone pulls in torch._dynamo.
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "accelerate", "transformers",
        "deepspeed.runtime.zero.stage3", "torch._inductor.lowering", "tests.distributed.checkpoint_worker",
    ]
)  # fmt: skip


def forked_launch(target, config: str, processes: int, *args: object, log: Path, timeout: float = 120) -> None:
    """Run target(*args) on every process of an accelerate_configs/ file; output goes to `log`, shown on failure.

    The target returns what must not be torn down before the process ends, such as its Accelerator.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**launcher_environment(config, processes), "OMP_NUM_THREADS": "1"}
    for old in log.parent.glob(f"{log.name}*"):
        old.unlink()
    ranks = []
    for rank in range(processes):
        if config != "cpu":
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        ranks.append(CONTEXT.Process(target=_run, args=(target, args, dict(environment), log)))
        ranks[-1].start()
    deadline = time.monotonic() + timeout
    while any(rank.exitcode is None for rank in ranks):
        if time.monotonic() > deadline or any(rank.exitcode for rank in ranks):
            # The others wait in a collective for the one that failed.
            for rank in ranks:
                rank.kill()
        ranks[0].join(0.05)
    if any(rank.exitcode for rank in ranks):
        codes = [rank.exitcode for rank in ranks]
        raise AssertionError(f"{config} x {processes} {args}: exit codes {codes}\n{log.read_text()[-8000:]}")


@functools.cache
def launcher_environment(config: str, processes: int) -> dict[str, str]:
    """What `accelerate launch` would add to the environment of its processes."""
    if config == "cpu":
        return {"ACCELERATE_USE_CPU": "true"}
    from accelerate.commands.launch import launch_command, launch_command_parser

    file = ROOT / "accelerate_configs" / f"{config}.yaml"
    args = launch_command_parser().parse_args(
        ["--config_file", str(file), "--num_processes", str(processes), "--main_process_port", "0", "script.py"]
    )
    seen: dict[str, str] = {}
    before = dict(os.environ)
    with mock.patch("torch.distributed.run.run", side_effect=lambda _: seen.update(os.environ)):
        launch_command(args)
    return {name: value for name, value in seen.items() if before.get(name) != value}


def _run(target, args, environment, log) -> None:
    os.environ.update(environment)
    # Idle threads of several processes that spin on two cores make each of them ten times slower.
    torch.set_num_threads(1)
    gc.freeze()
    warnings.simplefilter("ignore")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    kept = target(*args)
    sys.stdout.flush()
    _wait_for_others(log)
    # Taking a gloo group of three processes down now and then never ends, after all the work is done.
    os._exit(0 if kept else 1)


def _wait_for_others(log: Path, timeout: float = 60) -> None:
    """A rank that leaves at once may take what it has sent with it: the others would wait for it for ever."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    log.with_name(f"{log.name}.done{rank}").touch()
    deadline = time.monotonic() + timeout
    while len(list(log.parent.glob(f"{log.name}.done*"))) < world and time.monotonic() < deadline:
        time.sleep(0.01)
