"""accelerate launch for several nodes: the same arguments, with checks before the start and a watch over the nodes.

    python -m rwkv_accel.launch [--min_machines N] --config_file FILE --num_machines 2 ... -m rwkv_accel.train a.yaml

What Accelerate leaves to the user's patience is said here within a minute, with the name of the node: a main address
that is wrong or does not answer, a port in use, a node that did not come, other code or another recipe on a node,
missing data, too few GPUs, and during the run a node that is gone. The exit code is the trainer's own (2 a mistake in
the recipe, 75 stopped by request after saving), which `accelerate launch` hides.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_accel.errors import UserError
from rwkv_accel.runtime import EXIT_STOPPED, EXIT_USER_ERROR, SIGNALS, knows_shutdown_timeout

if TYPE_CHECKING:
    from rwkv_accel.cluster.watch import PeerWatch

JOIN_SECONDS = 120.0
# The doctor has promised an answer within a minute.
DOCTOR_JOIN_SECONDS = 45.0
LOST_SECONDS = 120.0
# How long a launcher whose trainers were killed may take to notice it.
EXIT_GRACE_SECONDS = 60.0
# After this the elastic rendezvous takes no dead node into a new group (three missed keep-alives of 5 seconds).
FORGOTTEN_SECONDS = 20.0
# There when a machine has NVIDIA or AMD GPUs, granted to this job or not.
GPU_DRIVERS = (Path("/proc/driver/nvidia/gpus"), Path("/dev/kfd"))
# Why a node that wants to join, for the first time or again, cannot.
RENDEZVOUS_ENDS = {
    "RendezvousConnectionError": "node 0, which hosts the rendezvous, has ended or is lost; look at its output",
    "RendezvousClosedError": "the run has ended on the other nodes; look at the output of node 0",
    "RendezvousTimeoutError": "fewer than --min_machines nodes came; start the missing ones, or allow fewer",
}
# How long trainers that were told to stop may take to save, if TORCH_ELASTIC_SHUTDOWN_TIMEOUT does not say.
SAVE_SECONDS = 120


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Own options come first; everything else goes to `accelerate launch` as it is."""
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_accel.launch",
        description="accelerate launch with checks before the start and a watch over the nodes. Options of "
        "`accelerate launch` follow these.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--min_machines",
        type=int,
        default=None,
        help="go on with as few nodes as this (needs --rdzv_backend c10d and --max_restarts); default: all",
    )
    parser.add_argument(
        "--join_seconds",
        type=float,
        default=None,
        help=f"give up when a node has not joined by then (default: {JOIN_SECONDS:.0f}, the doctor's "
        f"{DOCTOR_JOIN_SECONDS:.0f})",
    )
    parser.add_argument(
        "--lost_seconds",
        type=float,
        default=LOST_SECONDS,
        help="a node not heard of for so long is lost, and the run on the others ends (default: %(default)s)",
    )
    arguments = list(argv if argv is not None else sys.argv[1:])
    script_at = _script_position(arguments)
    own, rest = parser.parse_known_args(arguments[:script_at])
    return own, rest + arguments[script_at:]


def main(argv: Sequence[str] | None = None) -> int:
    own, rest = parse_args(argv)
    session = Session(own)
    try:
        return session.run(rest)
    except UserError as error:
        for line in str(error).splitlines():
            say(f"error: {line}")
        return EXIT_USER_ERROR


class Session:
    """One launch on this node."""

    def __init__(self, own: argparse.Namespace) -> None:
        self.own = own
        self.watch: PeerWatch | None = None
        self.config: Any = None

    def run(self, arguments: list[str]) -> int:
        """Start the processes of this node and return what they ended with."""
        # Before Accelerate, which imports torch: a mistake in the recipe is told at once.
        module = _script_position(arguments) + 1
        if arguments[module : module + 1] == ["rwkv_accel.train"]:
            self._read_recipe(arguments[module + 1 :])
        from accelerate.commands.launch import launch_command, launch_command_parser

        # Trainers save and stop on these. A hang-up (a closed ssh connection) is turned into SIGTERM.
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        for number in SIGNALS:
            signal.signal(number, _pass_on)
        args = launch_command_parser().parse_args(arguments)
        self._check_recipe(args)
        is_doctor = args.training_script == "rwkv_accel.doctor"
        if self.own.join_seconds is None:
            self.own.join_seconds = DOCTOR_JOIN_SECONDS if is_doctor else JOIN_SECONDS
        if is_doctor:
            args.max_restarts = 0  # what it found once is enough
        with _patched_torchrun(self._torchrun), _mistakes_are_final():
            try:
                launch_command(args)
            except subprocess.CalledProcessError as error:  # a single process, started without torchrun
                return _shell_code(error.returncode)
            except _Ended as ended:
                return ended.code
            except (ConnectionError, FileNotFoundError) as error:
                raise UserError(str(error)) from None
        return 0

    def _read_recipe(self, script_arguments: list[str]) -> None:
        from rwkv_accel.cluster.facts import read_recipe

        self.config = read_recipe(script_arguments)

    def _check_recipe(self, args: Any) -> None:
        from rwkv_accel.cluster.facts import missing_paths

        if not args.training_script.startswith("rwkv_accel."):
            return
        if self.config is None:
            self._read_recipe(args.training_script_args)
        alone = (args.num_machines or 1) == 1
        if self.config is not None and alone:
            missing = missing_paths(self.config)
            if missing:
                me = socket.gethostname()
                raise UserError(
                    "\n".join(f"{me} does not have {path}, which the recipe names; check the path" for path in missing)
                )

    def _torchrun(self, original: Callable[[Any], None], args: Any) -> None:
        """In place of torch.distributed.run.run, with the arguments that Accelerate made."""
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousError

        args.signals_to_handle = ",".join(number.name for number in SIGNALS)
        if getattr(args, "shutdown_timeout", None) is None and not knows_shutdown_timeout():
            args.shutdown_timeout = SAVE_SECONDS
        self._check_gpus(args)
        num_nodes = int(str(args.nnodes).rsplit(":", 1)[-1])
        if num_nodes > 1:
            self._watch_nodes(args, num_nodes)
        failed: dict[int, str] = {}
        try:
            with _exit_codes_after_a_signal() as stopped:
                original(args)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            code = _agreed_code(list(codes.values()))
            if code not in (EXIT_USER_ERROR, EXIT_STOPPED):
                failed = {rank: _how(c) for rank, c in codes.items()}
            self._close(failed)
            raise _Ended(code) from None
        except SignalException as error:
            raise _Ended(EXIT_STOPPED if set(stopped) == {EXIT_STOPPED} else 128 + int(error.sigval)) from None
        except RendezvousError as error:
            say(f"no place in the run any more: {RENDEZVOUS_ENDS.get(type(error).__name__, str(error))}")
            raise _Ended(1) from None
        self._close(failed)

    def _check_gpus(self, args: Any) -> None:
        import torch

        wanted, present = int(args.nproc_per_node), torch.cuda.device_count()
        if not present and any(path.exists() for path in GPU_DRIVERS):
            say(
                "this machine has GPUs, but none for this job: it trains on the CPU; ask the scheduler for GPUs, or "
                "let `python -m rwkv_accel.doctor` look at the driver"
            )
        if 0 < present < wanted:
            raise UserError(
                f"{socket.gethostname()} has {present} GPUs but {wanted} processes were asked for; give "
                f"--num_processes {present} per node, or ask the scheduler for {wanted} GPUs per node"
            )

    def _watch_nodes(self, args: Any, num_nodes: int) -> None:
        from rwkv_accel.cluster import PeerWatch, gather_facts

        min_nodes = self.own.min_machines or num_nodes
        elastic = args.rdzv_backend == "c10d"
        if min_nodes < num_nodes and not elastic:
            raise UserError("--min_machines needs --rdzv_backend c10d; the static rendezvous has a fixed size")
        host, port = _main_address(args)
        if elastic:
            args.nnodes = f"{min_nodes}:{num_nodes}"
            args.rdzv_endpoint = f"{host}:{port}"
            # The names of hosts are not compared: in containers they often mislead.
            conf = [item for item in str(args.rdzv_conf).split(",") if item]
            args.rdzv_conf = ",".join([*conf, f"is_host={args.node_rank == 0}"])
        self.watch = PeerWatch(
            host,
            port,
            gather_facts(int(args.node_rank), self.config),
            num_nodes,
            min_nodes=min_nodes,
            join_seconds=self.own.join_seconds,
            lost_seconds=self.own.lost_seconds,
            on_lost=lambda silent_seconds: _end_trainers(silent_seconds, restarts=elastic),
            say=say,
        )
        self.watch.start()

    def _close(self, failed: dict[int, str]) -> None:
        for line in self.watch.finish(failed) if self.watch else []:
            say(line)


class _Ended(Exception):
    """The trainers ended with an exit code that is not 0."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _patched_torchrun:
    """Accelerate calls torch.distributed.run.run(args); in here that goes through a function of ours."""

    def __init__(self, replacement: Callable[[Callable[[Any], None], Any], None]) -> None:
        self.replacement = replacement

    def __enter__(self) -> None:
        import torch.distributed.run as torchrun

        self.torchrun, self.original = torchrun, torchrun.run
        torchrun.run = lambda args: self.replacement(self.original, args)

    def __exit__(self, *_: object) -> None:
        self.torchrun.run = self.original


@contextmanager
def _mistakes_are_final() -> Iterator[None]:
    """torchrun starts failed trainers again whatever the reason; a user's mistake would fail each time."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    original = LocalElasticAgent._monitor_workers

    def monitor(agent: Any, workers: Any) -> Any:
        result = original(agent, workers)
        if any(failure.exitcode == EXIT_USER_ERROR for failure in result.failures.values()):
            agent._remaining_restarts = 0
        return result

    LocalElasticAgent._monitor_workers = monitor
    try:
        yield
    finally:
        LocalElasticAgent._monitor_workers = original


@contextmanager
def _exit_codes_after_a_signal() -> Iterator[list[int | None]]:
    """What the trainers that a signal to the launcher has stopped ended with, which torchrun does not tell."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    original = LocalElasticAgent._shutdown
    codes: list[int | None] = []

    def shutdown(agent: Any, *args: Any, **kwargs: Any) -> None:
        original(agent, *args, **kwargs)
        handlers = getattr(agent._pcontext, "subprocess_handlers", {})
        codes[:] = [handler.proc.returncode for handler in handlers.values()]

    LocalElasticAgent._shutdown = shutdown
    try:
        yield codes
    finally:
        LocalElasticAgent._shutdown = original


def _pass_on(number: int, frame: Any) -> None:
    """Of a single process Accelerate's launcher would be ended alone; the trainer is to save, and to end it."""
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)


def _end_trainers(silent_seconds: float, *, restarts: bool) -> None:
    """Kill this node's trainers: they wait in a collective that will never end, and a checkpoint on disk is whole.

    Where they restart, those that began well after the lost node's last sign of life are a group without it.
    """
    import psutil

    for child in psutil.Process().children():
        age = time.time() - child.create_time()
        if not restarts or age > silent_seconds - FORGOTTEN_SECONDS:
            child.send_signal(signal.SIGKILL)
    if not restarts:
        timer = threading.Timer(EXIT_GRACE_SECONDS, lambda: os._exit(1))
        timer.daemon = True
        timer.start()


def _main_address(args: Any) -> tuple[str, int]:
    """Where node 0 hosts the rendezvous; Accelerate writes it to one of two places, by `same_network`."""
    if args.rdzv_endpoint:
        host, _, port = str(args.rdzv_endpoint).rpartition(":")
    else:
        host, port = args.master_addr, args.master_port
    if not host or host == "None":
        raise UserError("several machines need --main_process_ip, the address of node 0 on their common network")
    return str(host), int(port)


def _agreed_code(codes: list[int]) -> int:
    """The trainer's own code when all that ended by themselves agree on one; else 1."""
    own = {c for c in codes if c > 0}
    return own.pop() if len(own) == 1 else 1


def _shell_code(code: int) -> int:
    return 128 - code if code < 0 else code


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _script_position(arguments: Sequence[str]) -> int:
    """Where the script begins: what follows is its own."""
    for index, argument in enumerate(arguments):
        if argument in ("-m", "--module") or argument.endswith(".py"):
            return index
    return len(arguments)


def say(line: str) -> None:
    sys.stderr.write(f"[launch {socket.gethostname()}] {line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
