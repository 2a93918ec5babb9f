"""Two hosts on one machine, and a real Slurm across them, for the tests that need more than one machine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pytest

from tests.helpers import ROOT, environment

HERE = Path(__file__).parent
MAIN_ADDRESS = "10.77.0.10"
# The demo with one layer and one row per process and micro-batch: a step is a fraction of a second.
DEMO = [
    "launch/recipes/demo.yaml",
    "model.init.n_layer=1",
    "model.init.n_embd=64",
    "data.ctx_len=64",
    "samples.prompts=[]",
    "trainer.log_every_n_steps=1",
    "trainer.global_batch_size=8",
    "tracking.progress=none",
    # Without a schedule a short run is the beginning of a long one.
    "optim.schedule=constant",
    "optim.lr_init=1e-3",
    "optim.lr_final=null",
    "optim.warmup_steps=0",
]


HOSTS_TOOLS = {"ip": "iproute2", "unshare": "util-linux"}
SLURM_TOOLS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
# The hosts have fixed names and addresses: one suite at a time on a machine.
MAX_HOSTS = 3
MACHINE_LOCK = Path(tempfile.gettempdir()) / "rwkv_accel-hosts.lock"
LOCK_SECONDS = 120
# For what must happen, however slow the machine: above the bound that .ci/run sets to the whole suite.
SLOW_SECONDS = 300
# Nobody listens there: refused means reached.
REACH = """import socket
try: socket.create_connection(("10.77.0.11", 9), timeout=5)
except ConnectionRefusedError: pass
"""


@contextmanager
def hosts(number: int = 2) -> Iterator[None]:
    """Hosts with a network each and a bridge between them. Skips, with the reason, where they cannot be made."""
    _skip_without(HOSTS_TOOLS)
    with _alone_on_this_machine():
        try:
            _make("network namespaces", HERE / "hosts/up.sh", number)
            _prove_that_they_meet()
            yield
        finally:
            _remove_hosts()


@contextmanager
def slurm(folder: Path, number: int = 2) -> Iterator[None]:
    """A Slurm across two hosts. Skips, with the reason, where it does not start."""
    _skip_without(HOSTS_TOOLS | SLURM_TOOLS)
    with _alone_on_this_machine() as lock:
        try:
            lock.write(str(folder))
            lock.flush()
            _make("network namespaces", HERE / "hosts/up.sh", number)
            _prove_that_they_meet()
            start_slurm(folder, number)
            environ = f"SLURM_CONF={folder / 'slurm.conf'}"
            _make("a Slurm that runs jobs", "env", environ, "srun", "-N", number, "--time=1", "true")
            yield
        finally:
            _remove_slurm(folder)
            lock.truncate(0)


def start_slurm(folder: Path, number: int = 2) -> None:
    """Start what does not run of Slurm and its hosts, and wait until all nodes are idle."""
    _make("a Slurm", HERE / "slurm/up.sh", folder, number, 2)


def _remove_hosts() -> None:
    subprocess.run([str(HERE / "hosts/down.sh"), str(MAX_HOSTS)], check=False, timeout=60)


def _remove_slurm(folder: Path) -> None:
    subprocess.run([str(HERE / "slurm/down.sh"), str(folder), str(MAX_HOSTS)], check=False, timeout=60)


def _skip_without(tools: dict[str, str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        packages = ", ".join(sorted({tools[tool] for tool in missing}))
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: {packages})")


@contextmanager
def _alone_on_this_machine() -> Iterator[TextIO]:
    """Yields the lock file, which names the folder of a running Slurm. Removes what a killed test run left behind."""
    with MACHINE_LOCK.open("a+") as lock:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    pytest.skip("another test run on this machine has the hosts rwh0 and rwh1")
            time.sleep(0.5)
        lock.seek(0)
        left_behind = lock.read()
        if left_behind:
            _remove_slurm(Path(left_behind))
        lock.truncate(0)
        _remove_hosts()
        yield lock


def _make(what: str, *command: object) -> None:
    try:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{what} cannot be made here: no answer within 120 s")
    if done.returncode:
        pytest.skip(f"{what} cannot be made here: {done.stderr.strip()[-1000:]}")


def _prove_that_they_meet() -> None:
    """A firewall of this machine may drop what crosses a bridge; a sandbox may forbid to mount."""
    _make("two hosts that reach each other", HERE / "hosts/on.sh", 0, sys.executable, "-c", REACH)


@dataclass
class Process:
    """A command on a host, with its output in a file."""

    host: int
    popen: subprocess.Popen
    log: Path

    def wait(self, timeout: float) -> int:
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"host {self.host} still runs after {timeout} s:\n{self.text()[-4000:]}") from None

    def text(self) -> str:
        return self.log.read_text()


def on_host(host: int, command: list[object], log: Path, *, folder: Path = ROOT, **env: str) -> Process:
    """Start a command on a host, in the repository or another folder."""
    settings = environment(**{"GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(folder), **env})
    with log.open("w") as out:
        popen = subprocess.Popen(
            [str(HERE / "hosts/on.sh"), str(host), *map(str, command)],
            cwd=folder, env=settings, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return Process(host, popen, log)


def launcher(
    host: int,
    port: int,
    *,
    config: str,
    own: tuple[object, ...] = (),
    main: str = MAIN_ADDRESS,
    with_watch: bool = True,
) -> list[object]:
    """The command of one host: our launcher, or `accelerate launch` itself."""
    module = ["rwkv_accel.launch", *own] if with_watch else ["accelerate.commands.launch"]
    return [
        sys.executable, "-m", *module,
        "--config_file", ROOT / f"accelerate_configs/{config}.yaml",
        "--num_machines", 2, "--num_processes", 2, "--machine_rank", host,
        "--main_process_ip", main, "--main_process_port", port,
    ]  # fmt: skip


def kill_host(host: int) -> None:
    """Power off: every process of the host is gone at once."""
    for pid in processes_of(host):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes_of(host: int) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", f"rwh{host}"], capture_output=True, text=True, check=True)
    return [int(pid) for pid in listed.stdout.split()]


def make_quiet(number: int = 2) -> None:
    """As new: no process on the hosts, and their cables in. What a failed test leaves must not fail its second try."""
    for host in range(number):
        cut_network(host, up=True)
        wait_for(lambda host=host: kill_host(host) or not processes_of(host), f"host {host} is quiet", 60)


def cut_network(host: int, *, up: bool = False) -> None:
    """Pull the cable: packets vanish, connections stay open."""
    subprocess.run(["ip", "link", "set", f"rwveth{host}", "up" if up else "down"], check=True)


def wait_for(condition: Callable[[], bool], what: str, timeout: float) -> float:
    """Seconds until the condition held."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(0.2)
    return time.monotonic() - started


def losses(out_dir: Path) -> dict[int, float]:
    """step -> loss of a run."""
    records = json.loads((out_dir / "loss_data.json").read_text())
    return {record["step"]: record["loss"] for record in records}
