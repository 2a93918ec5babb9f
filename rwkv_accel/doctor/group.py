"""What all processes of a launch find out together: who is there, who differs, how fast and how exact the network is.

Every wait has an end. Each rank writes into the launch's store how far it came; when a step fails, rank 0 reads there
who did not get so far and names it.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rwkv_accel.cluster.facts import NodeFacts, compare, gather_facts
from rwkv_accel.cluster.network import resolve, route_to
from rwkv_accel.config.schema import RunConfig
from rwkv_accel.doctor.machine import device_name, examine_machine
from rwkv_accel.doctor.report import Check, print_checks, table

ANSWER_SECONDS = 15.0
"""How long a rank may take to answer."""
STEP_SECONDS = 12.0
"""How long a collective may take, and how long all sizes of a measurement together."""
LIMIT_SECONDS = 55.0
"""After this the doctor ends, whatever hangs."""
RESERVE_SECONDS = 5.0
"""Kept for the report."""
MAX_CLOCK_SKEW_SECONDS = 1.0
SLOW_SHARE = 0.25
"""A node with less than this share of the median bandwidth is called slow."""
KIB, MIB = 2**10, 2**20
SIZES_BYTES = (4 * KIB, 64 * KIB, MIB, 16 * MIB, 256 * MIB)
PAIR_BYTES = 4 * MIB


@dataclass(frozen=True)
class Member:
    """One rank as it describes itself."""

    rank: int
    device: str
    interface: str
    address: str
    facts: NodeFacts

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.facts.hostname}"


class StepFailed(Exception):
    """A step did not end on some rank; the message names it."""


class Group:
    """The launch's store, and the steps that its ranks take."""

    def __init__(self) -> None:
        rendezvous = dist.rendezvous("env://", timeout=timedelta(seconds=ANSWER_SECONDS))
        self.store, self.rank, self.size = next(rendezvous)
        self.members: list[Member] = []
        self.checks: list[Check] = []
        self.step = "start"

    @contextmanager
    def taking(self, step: str) -> Iterator[None]:
        """One collective step. On failure StepFailed names the ranks that did not finish it, or says why not.

        The reasons of torch name sockets, not hosts; the store knows who got how far.
        """
        self.step = step
        try:
            yield
        except (RuntimeError, OSError) as error:
            self.store.set(f"doctor/problem/{self.rank}", f"{step}: {_line(error)}")
            raise StepFailed(self.blame(step, error)) from None
        self.store.set(f"doctor/done/{step}/{self.rank}", "1")

    def blame(self, step: str, error: Exception | None = None) -> str:
        time.sleep(1.0)  # others may be about to finish, or to fail
        late, failed = [], []
        for member in self.members:
            if self.store.check([f"doctor/problem/{member.rank}"]):
                failed.append(member)
            elif not self.store.check([f"doctor/done/{step}/{member.rank}"]):
                late.append(member)
        if late:
            return f"{step}: {', '.join(m.name for m in late)} does not answer (stopped, hanging or cut off)"
        text = _line(error) if error else "no answer"
        named = ", ".join(m.name for m in failed) or "every rank"
        return f"{step}: failed on {named}: {text}"


def examine_group(config: RunConfig | None) -> int:
    """All checks of a launch. Collective; rank 0 prints and every rank returns the exit code."""
    started = time.monotonic()
    try:
        group = Group()
    except (RuntimeError, OSError) as error:
        return print_checks([Check("network", "FAIL", f"{socket.gethostname()} does not reach rank 0: {_line(error)}")])
    watchdog = threading.Timer(LIMIT_SECONDS, lambda: _give_up(group))
    watchdog.daemon = True
    watchdog.start()
    try:
        try:
            _network_checks(group, config)
        except StepFailed as failure:
            group.checks.append(Check("network", "FAIL", str(failure)))
        left = LIMIT_SECONDS - RESERVE_SECONDS - (time.monotonic() - started)
        group.checks[:0] = machine_checks(group, config, left)
        return _conclude(group)
    except RuntimeError as error:  # the launcher's store is gone, with rank 0's host
        sys.stderr.write(f"rank {group.rank} on {socket.gethostname()}: rank 0 does not answer ({_line(error)})\n")
        return 1
    finally:
        watchdog.cancel()


def _network_checks(group: Group, config: RunConfig | None) -> None:
    introduce(group, config)
    if group.rank == 0:
        sys.stdout.write(member_table(group.members))
        sys.stdout.flush()
        group.checks += [Check("nodes", "FAIL", line) for line in differences(group.members)]
    device = "cuda" if have_own_gpus(group.members) else "cpu"
    with group.taking("process group"):
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if device == "cuda" else "gloo",
            store=dist.PrefixStore("doctor", group.store),
            rank=group.rank,
            world_size=group.size,
            timeout=timedelta(seconds=STEP_SECONDS),
        )
    with group.taking("clocks"):
        group.checks += clock_checks(group)
    with group.taking("out_dir"):
        group.checks += shared_folder_checks(group, Path(config.out_dir) if config else None)
    with group.taking("links"):
        group.checks += link_checks(group)
    with group.taking("all-reduce"):
        group.checks += all_reduce_checks(device)
    dist.destroy_process_group()


def machine_checks(group: Group, config: RunConfig | None, seconds: float) -> list[Check]:
    """One rank of each host looks at its machine; rank 0 reports its own in full, and what is wrong with the others.

    After the network, so that compiling kernels neither keeps others waiting nor disturbs what is measured.
    """
    group.step = "machine"
    leaders = host_leaders(group.members)
    if group.rank not in leaders.values():
        return []
    deadline = time.monotonic() + seconds
    own = examine_machine(config, max(1.0, seconds - RESERVE_SECONDS))
    if group.rank != 0:
        group.store.set(f"doctor/machine/{group.rank}", json.dumps([asdict(check) for check in own]))
        return []
    fit = []
    for host, rank in leaders.items():
        if rank == 0:
            continue
        while not group.store.check([f"doctor/machine/{rank}"]) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not group.store.check([f"doctor/machine/{rank}"]):
            own.append(Check("machine", "FAIL", f"{host} does not answer (stopped, hanging or cut off)"))
            continue
        found = [Check(**tree) for tree in json.loads(group.store.get(f"doctor/machine/{rank}"))]
        # The tracker concerns rank 0 alone, and missing files were named with the differences.
        wrong = [c for c in found if c.status in ("WARN", "FAIL") and c.name not in ("trackers", "recipe")]
        own += [Check(c.name, c.status, f"{host}: {c.text}") for c in wrong]
        fit += [] if wrong else [host]
    if fit:
        own.append(Check("machine", "ok", f"nothing wrong with {', '.join(fit)}"))
    return own


def host_leaders(members: list[Member]) -> dict[str, int]:
    """Host -> its first rank, which speaks for it."""
    leaders: dict[str, int] = {}
    for member in members:
        leaders.setdefault(member.facts.hostname, member.rank)
    return leaders


def have_own_gpus(members: list[Member]) -> bool:
    """Whether every process has a GPU to itself: on one rank without, the others' NCCL would wait in vain."""
    processes = Counter(m.facts.hostname for m in members)
    return all(m.facts.num_gpus >= processes[m.facts.hostname] for m in members)


def introduce(group: Group, config: RunConfig | None) -> None:
    """Everybody describes itself; rank 0 learns who is missing and tells the others."""
    main_address = resolve(getattr(group.store, "underlying_store", group.store).host)
    local_index = local_rank(group)
    interface, address = route_to(main_address)
    if local_index < torch.cuda.device_count():
        torch.cuda.set_device(local_index)
    # The number of a node is that of its first process here: what matters is that every host has its own.
    facts = gather_facts(group.rank, config)
    me = {"device": device_name(local_index), "interface": interface, "address": address, "facts": facts.dumps()}
    group.store.set(f"doctor/member/{group.rank}", json.dumps(me))
    deadline = time.monotonic() + ANSWER_SECONDS
    absent = list(range(group.size))
    while absent and time.monotonic() < deadline:
        absent = [r for r in absent if not group.store.check([f"doctor/member/{r}"])]
        time.sleep(0.1)
    group.members = [_member(group, rank) for rank in range(group.size) if rank not in absent]
    if absent:
        ranks = ", ".join(str(r) for r in absent)
        here = ", ".join(dict.fromkeys(m.facts.hostname for m in group.members))
        raise StepFailed(f"rank {ranks} of {group.size} did not answer within {ANSWER_SECONDS:.0f} s; {here} did")


def local_rank(group: Group) -> int:
    """Index of this process on its host: ranks of a host ask for one number after the other."""
    count = int(group.store.add(f"doctor/host/{socket.gethostname()}/{os.getppid()}", 1))
    return count - 1


def _member(group: Group, rank: int) -> Member:
    tree = json.loads(group.store.get(f"doctor/member/{rank}"))
    return Member(rank, tree["device"], tree["interface"], tree["address"], NodeFacts.loads(tree["facts"]))


def member_table(members: list[Member]) -> str:
    rows = [("rank", "host", "device", "interface", "address", "code", "recipe")]
    for m in members:
        recipe = (m.facts.recipe or "-")[:8]
        rows.append((str(m.rank), m.facts.hostname, m.device, m.interface, m.address, m.facts.code[:8], recipe))
    return table(rows)


def differences(members: list[Member]) -> list[str]:
    """What is not equal on all hosts; one rank of each host speaks for it."""
    leaders = host_leaders(members)
    # Ranks, not nodes, are what a launch without our launcher knows.
    lines = [
        line.replace("node ", "rank ") for line in compare([m.facts for m in members if m.rank in leaders.values()])
    ]
    for host, processes in Counter(m.facts.hostname for m in members).items():
        gpus = next(m.facts.num_gpus for m in members if m.facts.hostname == host)
        if 0 < gpus < processes:
            lines.append(
                f"{host} has {gpus} GPUs for {processes} processes; give --num_processes {gpus} per node, or ask the "
                f"scheduler for {processes} GPUs there"
            )
    return lines


def clock_checks(group: Group) -> list[Check]:
    """Difference of each host's clock to rank 0's, right after a barrier; the median of five tries."""
    readings = []
    for _ in range(5):
        dist.barrier()
        readings.append(_gather(time.time()))
    skews = [statistics.median(r[rank] - r[0] for r in readings) for rank in range(group.size)]
    wrong = [rank for rank, skew in enumerate(skews) if abs(skew) > MAX_CLOCK_SKEW_SECONDS]
    checks = [
        Check("clocks", "WARN", f"the clock of {group.members[r].name} is off by {skews[r]:+.1f} s; start NTP there")
        for r in wrong
    ]
    return checks or [Check("clocks", "ok", f"largest difference {max(map(abs, skews)) * 1e3:.1f} ms")]


def shared_folder_checks(group: Group, out_dir: Path | None) -> list[Check]:
    """Rank 0 writes a file into out_dir; every host must see its content."""
    if out_dir is None:
        return [Check("out_dir", "note", "no recipe given: not checked whether all hosts share it")]
    token = _gather(secrets.token_hex(8))[0]
    existing = next(p for p in (out_dir.absolute(), *out_dir.absolute().parents) if p.exists())
    probe = existing / f".doctor-{token}"
    problem = ""
    if group.rank == 0:
        try:
            probe.write_text(token, encoding="utf-8")
        except OSError as error:
            problem = f"{group.members[0].name} cannot write {existing} ({error.strerror}); choose another out_dir"
    dist.barrier()
    sees = _gather(_sees(probe, token))
    if group.rank == 0:
        probe.unlink(missing_ok=True)
    blind = sorted({m.facts.hostname for m in group.members if not sees[m.rank]})
    if problem or blind:
        text = problem or (
            f"{', '.join(blind)} does not see what rank 0 writes to {existing}; all hosts must share out_dir "
            "(NFS, Lustre ...), or a resume finds no checkpoint there"
        )
        return [Check("out_dir", "FAIL", text)]
    return [Check("out_dir", "ok", f"{existing} is shared by all hosts")]


def _sees(probe: Path, token: str, seconds: float = 5.0) -> bool:
    # Network file systems show a new file after some seconds.
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            return probe.read_text(encoding="utf-8") == token
        except OSError:
            time.sleep(0.2)
    return False


def link_checks(group: Group) -> list[Check]:
    """Round trip and bandwidth between rank 0 and one rank of every other host, one after the other."""
    others = sorted(rank for rank in host_leaders(group.members).values() if rank != 0)
    speeds, deadline = {}, time.monotonic() + STEP_SECONDS
    for rank in others:
        late = torch.tensor(int(time.monotonic() > deadline))
        dist.broadcast(late, src=0)
        if late:
            break
        if group.rank in (0, rank):
            speeds[rank] = _link(0 if group.rank == rank else rank, first=group.rank == 0)
    if not speeds or group.rank:
        return []
    usual = statistics.median(bandwidth for _, bandwidth in speeds.values())
    checks = []
    for rank, (latency, bandwidth) in speeds.items():
        slow = bandwidth < SLOW_SHARE * usual
        text = f"rank 0 - {group.members[rank].name}: {latency * 1e6:.0f} us, {bandwidth / 1e9:.2f} GB/s"
        remedy = f"; the usual is {usual / 1e9:.2f}: check that host's cable, port and interface"
        checks.append(Check("links", "WARN" if slow else "ok", text + remedy * slow))
    return checks


def _link(peer: int, *, first: bool) -> tuple[float, float]:
    """(one-way seconds of an empty message, bytes per second of a large one) to the peer, through the host."""

    def round_trip(message: torch.Tensor) -> float:
        started = time.perf_counter()
        for act in (dist.send, dist.recv) if first else (dist.recv, dist.send):
            act(message, peer)
        return time.perf_counter() - started

    small, large = torch.zeros(1), torch.zeros(PAIR_BYTES // 4)
    latency = min(round_trip(small) for _ in range(5)) / 2
    seconds = min(round_trip(large) for _ in range(3)) / 2
    return latency, PAIR_BYTES / seconds


def all_reduce_checks(device: str) -> list[Check]:
    """Time of an all-reduce by size, on the device that trains; sizes until the time is used up."""
    world, rows = dist.get_world_size(), []
    deadline = time.monotonic() + STEP_SECONDS
    for size in SIZES_BYTES:
        tensor = torch.zeros(size // 4, device=device)
        seconds = min(_timed_all_reduce(tensor) for _ in range(3))
        # A ring moves 2 (n-1)/n of the bytes over each link.
        bandwidth = size * 2 * (world - 1) / world / seconds
        rows.append(
            Check("all-reduce", "ok", f"{size // KIB:>7} KiB {seconds * 1e3:9.2f} ms {bandwidth / 1e9:8.3f} GB/s")
        )
        spent = torch.tensor(int(time.monotonic() + 60 * seconds > deadline))
        dist.broadcast(spent, src=0)
        if spent:
            break
    return rows


def _timed_all_reduce(tensor: torch.Tensor) -> float:
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _conclude(group: Group) -> int:
    """Rank 0 prints and hands its exit code to the others; the launcher's store outlives the process group."""
    if group.rank == 0:
        code = print_checks(group.checks)
        group.store.set("doctor/code", str(code))
        return code
    group.store.wait(["doctor/code"], timedelta(seconds=LIMIT_SECONDS))
    return int(group.store.get("doctor/code"))


def _give_up(group: Group) -> None:
    text = f"{group.step}: no end after {LIMIT_SECONDS:.0f} s on rank {group.rank} on {socket.gethostname()}"
    print_checks([*group.checks, Check("network", "FAIL", text)])
    os._exit(1)


def _line(error: Exception) -> str:
    return [*str(error).splitlines(), type(error).__name__][0]
