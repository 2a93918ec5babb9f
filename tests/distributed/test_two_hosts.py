"""Two hosts, each with its own network, made with network namespaces: training, failures, bad input.

    python -m pytest -m long tests/distributed/test_two_hosts.py
    python -m pytest -m several_hosts tests/distributed/test_two_hosts.py       the short form, which CI runs

Proves the launcher, the rendezvous and the failure handling over a real bridge between two network stacks. It cannot
prove anything about NCCL, InfiniBand, or speed.
"""

import contextlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv_accel.config.schema import PeftConfig
from rwkv_accel.launch import LOST_SECONDS
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.plan.communication import Training, update_of
from tests.distributed.cluster import (
    DEMO,
    MAIN_ADDRESS,
    SLOW_SECONDS,
    cut_network,
    hosts,
    kill_host,
    launcher,
    losses,
    make_quiet,
    on_host,
    processes_of,
    wait_for,
)
from tests.helpers import ROOT, environment, train_cli

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
TRAIN = ["-m", "rwkv_accel.train", *DEMO]
STEPS = 60
COMPILE_SECONDS = 500  # offload compiles DeepSpeed's CPU Adam once


@pytest.fixture(scope="module", autouse=True)
def two_hosts():
    with hosts(2):
        yield


@pytest.fixture(autouse=True)
def quiet_hosts(two_hosts):
    make_quiet()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of one process on one host, without any interruption."""
    out_dir = tmp_path_factory.mktemp("alone")
    done = train_cli(*DEMO, f"out_dir={out_dir}", f"trainer.max_steps={STEPS}")
    assert done.returncode == 0, done.stderr
    return losses(out_dir)


def start(host, tmp_path, port, *overrides, config="ddp", name="", folder=ROOT, **options):
    """The run of a test on one host."""
    tmp_path.mkdir(exist_ok=True)
    out_dir = f"out_dir={tmp_path / 'run'}"
    log = tmp_path / f"{name}{host}.log"
    command = [*launcher(host, port, config=config, **options), *TRAIN, out_dir, *overrides]
    return on_host(host, command, log, folder=folder)


def last_step(tmp_path) -> int:
    try:
        return max(losses(tmp_path / "run"), default=0)
    except FileNotFoundError:
        return 0


def assert_same_losses(got, want, steps=STEPS, rel=2e-3):
    assert sorted(got) == list(range(1, steps + 1))
    for step, loss in got.items():
        assert loss == pytest.approx(want[step], rel=rel), step


@pytest.mark.parametrize(
    "config",
    [
        pytest.param("ddp", marks=pytest.mark.several_hosts),
        *("fsdp2", "zero1", "zero2", "zero3"),
        *(path.stem for path in sorted((ROOT / "accelerate_configs").glob("multinode_*.yaml"))),
    ],
)
def test_losses_equal_one_host(config, alone, tmp_path):
    steps = 8
    runs = [start(h, tmp_path, 29500, f"trainer.max_steps={steps}", config=config, with_watch=False) for h in (0, 1)]
    for run in runs:
        assert run.wait(COMPILE_SECONDS if "offload" in config else SLOW_SECONDS) == 0, run.text()
    got = losses(tmp_path / "run")
    assert sorted(got) == list(range(1, steps + 1))
    assert list(got.values()) == pytest.approx([alone[s] for s in got], rel=1e-4)


def sent_bytes() -> int:
    """What host 1 has put onto the bridge so far."""
    return int(Path("/sys/class/net/rwveth1/statistics/rx_bytes").read_text())


@pytest.mark.parametrize("config", ["ddp", "zero2"])
def test_bytes_on_the_bridge_are_those_of_the_formula(config, tmp_path):
    """The difference of two runs takes start and end away."""
    sent = {}
    for steps in (10, 50):
        before = sent_bytes()
        runs = [start(h, tmp_path / str(steps), 29505, f"trainer.max_steps={steps}", config=config) for h in (0, 1)]
        for run in runs:
            assert run.wait(SLOW_SECONDS) == 0, run.text()
        sent[steps] = sent_bytes() - before
    per_update = (sent[50] - sent[10]) / 40
    shape = RWKV7Config.for_new_model(1, 64, 257, 32)
    update = update_of(config, Training.of(shape, PeftConfig(method="full")))
    formula = update.bytes_per_process(2)
    if config == "zero2":
        formula += update.reduced_bytes / 2  # Gloo has no reduce-scatter: DeepSpeed all-reduces, twice the bytes
    # Beside the tensors: TCP and IP headers, acknowledgements, the small collectives of every step.
    assert formula * 0.95 < per_update < formula * 1.1 + 20_000, (per_update, formula)


@pytest.mark.parametrize(
    ("victim", "config"),
    [
        (0, "multinode_ddp"),
        pytest.param(1, "multinode_ddp", marks=pytest.mark.several_hosts),
        (0, "multinode_zero2"),
        (1, "multinode_zero3"),
        (1, "multinode_fsdp2"),
    ],
)
def test_dead_host_ends_the_run_and_is_named_and_the_run_continues(victim, config, alone, tmp_path):
    overrides = [f"trainer.max_steps={STEPS}", "checkpoint.every_n_steps=5"]
    runs = [start(h, tmp_path, 29510, *overrides, config=config) for h in (0, 1)]
    wait_for(lambda: last_step(tmp_path) >= 12, "twelve steps", SLOW_SECONDS)
    kill_host(victim)
    survivor = runs[1 - victim]
    died_at = time.monotonic()
    assert survivor.wait(SLOW_SECONDS) == 1
    assert time.monotonic() - died_at < LOST_SECONDS
    named = "node 1 (rwh1) is lost" if victim == 1 else "node 0 (rwh0), which hosts the rendezvous, is lost"
    assert named in survivor.text()

    again = [start(h, tmp_path, 29515, *overrides, config=config, name="again") for h in (0, 1)]
    for run in again:
        assert run.wait(SLOW_SECONDS) == 0, run.text()
    assert "continuing from" in again[0].text()
    assert_same_losses(losses(tmp_path / "run"), alone)


def test_cut_cable_ends_both_sides_within_the_set_time(tmp_path):
    runs = [start(h, tmp_path, 29520, "trainer.max_steps=5000", own=("--lost_seconds", 15)) for h in (0, 1)]
    wait_for(lambda: last_step(tmp_path) >= 3, "three steps", SLOW_SECONDS)
    cut_network(1)
    cut_at = time.monotonic()
    for run in runs:
        assert run.wait(SLOW_SECONDS) == 1
    assert time.monotonic() - cut_at < 90  # 15, then the end of trainers and launcher
    assert "node 1 (rwh1) is lost: not heard of for" in runs[0].text()
    assert "node 0 (rwh0), which hosts the rendezvous, is lost" in runs[1].text()


def by_hand(host, tmp_path, *overrides, num_nodes=2, name="", **env):
    """launch/multi_node.sh on one host, as one types it there."""
    own = {"NUM_NODES": str(num_nodes), "MAIN_IP": MAIN_ADDRESS, "NODE_RANK": str(host), "MAIN_PORT": "29530"}
    command = ["launch/multi_node.sh", *DEMO, f"out_dir={tmp_path / 'run'}", *overrides]
    # env.sh has to find the interface.
    return on_host(host, command, tmp_path / f"{name}{host}.log", GLOO_SOCKET_IFNAME="", **own, **env)


def test_elastic_run_goes_on_alone_and_takes_the_host_back(tmp_path):
    """Without an end, so that it cannot be over before the host is back; steps slow enough to be counted."""
    shape = ["data.ctx_len=256", "trainer.global_batch_size=32", "trainer.max_epochs=100000"]
    # At the recipe's rate, what another split of the rows rounds differently doubles with every step.
    shape += ["optim.lr_init=3e-5"]
    overrides = [*shape, "checkpoint.every_n_steps=5", "checkpoint.keep_last=3"]
    first, _ = [by_hand(h, tmp_path, *overrides, MIN_NODES="1") for h in (0, 1)]
    wait_for(lambda: last_step(tmp_path) >= 7, "seven steps of both", SLOW_SECONDS)
    kill_host(1)
    here = last_step(tmp_path)
    wait_for(lambda: first.text().count("continuing from") == 1, "the other host goes on", SLOW_SECONDS)
    wait_for(lambda: last_step(tmp_path) > here, "steps of one host alone", SLOW_SECONDS)
    wait_for(lambda: "node 1 (rwh1) is silent" in first.text(), "the dead host is named", LOST_SECONDS)
    back = by_hand(1, tmp_path, *overrides, MIN_NODES="1", name="back")
    wait_for(lambda: first.text().count("continuing from") == 2, "the host is taken back", SLOW_SECONDS)
    here = last_step(tmp_path)
    wait_for(lambda: last_step(tmp_path) > here + 6, "steps of both again", SLOW_SECONDS)
    for run in (first, back):
        run.popen.terminate()
    for run in (first, back):
        run.wait(SLOW_SECONDS)
    assert "node 1 (rwh1) is back" in first.text()
    got, want_dir = losses(tmp_path / "run"), tmp_path / "want"
    assert train_cli(*DEMO, *shape, f"trainer.max_steps={max(got)}", f"out_dir={want_dir}", timeout=500).returncode == 0
    assert_same_losses(got, losses(want_dir), max(got), rel=5e-4)


def test_elastic_run_without_its_main_host_ends_with_the_reason(tmp_path):
    _, second = [by_hand(h, tmp_path, "trainer.max_epochs=100000", MIN_NODES="1") for h in (0, 1)]
    wait_for(lambda: last_step(tmp_path) >= 3, "three steps", SLOW_SECONDS)
    kill_host(0)
    assert second.wait(SLOW_SECONDS) == 1
    assert "node 0, which hosts the rendezvous, has ended or is lost" in second.text()
    assert "\nTraceback" not in second.text()


@pytest.fixture
def ssh_client(tmp_path):
    """A folder with an `ssh` that reaches the sshd of both hosts with a key of its own."""
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    if not Path(sshd).exists() or shutil.which("ssh-keygen") is None:
        pytest.skip("not installed: sshd, ssh-keygen (Debian: openssh-server, openssh-client)")
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    allowed = tmp_path / "allowed"
    shutil.copy(tmp_path / "user_key.pub", allowed)
    Path("/run/sshd").mkdir(exist_ok=True)
    servers = [
        on_host(
            host,
            [sshd, "-D", "-e", "-f", "/dev/null", "-h", tmp_path / "host_key", "-o", f"AuthorizedKeysFile={allowed}",
             "-o", "StrictModes=no", "-o", "PidFile=none"],
            tmp_path / f"sshd{host}.log",
        )
        for host in (0, 1)
    ]  # fmt: skip
    folder = tmp_path / "bin"
    folder.mkdir()
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    (folder / "ssh").write_text(f'#!/bin/bash\nexec {shutil.which("ssh")} -i {tmp_path}/user_key {options} "$@"\n')
    (folder / "ssh").chmod(0o755)
    wait_for(lambda: all("listening on" in server.text() for server in servers), "sshd listens", SLOW_SECONDS)
    return folder


def over_ssh(ssh_client, tmp_path, log, *overrides, **env):
    """launch/multi_node.sh from this machine, with a file of both hosts."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("10.77.0.10 slots=1\n10.77.0.11 slots=1\n")
    settings = environment(HOSTFILE=str(hostfile), **env)
    settings["PATH"] = f"{ssh_client}:{settings['PATH']}"
    command = [ROOT / "launch/multi_node.sh", *DEMO, f"out_dir={tmp_path / 'run'}", *overrides]
    with (tmp_path / log).open("w") as out:
        return subprocess.Popen(command, cwd=ROOT, env=settings, stdout=out, stderr=subprocess.STDOUT)


def test_over_ssh_from_one_machine_and_stopping_there_saves(ssh_client, alone, tmp_path):
    out_dir = tmp_path / "run"
    first = over_ssh(ssh_client, tmp_path, "first.log", f"trainer.max_steps={STEPS}", MAIN_PORT="29550")
    wait_for(lambda: last_step(tmp_path) >= 5, "five steps", SLOW_SECONDS)
    first.terminate()
    first.wait(SLOW_SECONDS)
    wait_for(lambda: (out_dir / "checkpoints/INTERRUPTED").is_dir(), "the trainers save", SLOW_SECONDS)
    # The port is free again when both launchers are gone.
    wait_for(lambda: "rwkv_accel" not in processes(), "both hosts are quiet", SLOW_SECONDS)
    again = over_ssh(ssh_client, tmp_path, "again.log", f"trainer.max_steps={STEPS}", MAIN_PORT="29550")
    assert again.wait(SLOW_SECONDS) == 0, (tmp_path / "again.log").read_text()
    assert "10.77.0.10: continuing from" in (tmp_path / "again.log").read_text()
    assert_same_losses(losses(out_dir), alone)


def test_doctor_over_ssh_runs_once_whatever_it_finds(ssh_client, tmp_path):
    doctor = over_ssh(ssh_client, tmp_path, "doctor.log", "out_dir=/dev/shm/run", ENTRY_POINT="rwkv_accel.doctor")
    assert doctor.wait(SLOW_SECONDS) != 0
    text = (tmp_path / "doctor.log").read_text()
    assert text.count("10.77.0.10: not fit: out_dir") == 1
    assert "rwh1 does not see what rank 0 writes to /dev/shm" in text


def processes() -> str:
    """Command lines of everything that runs on the two hosts."""
    lines = []
    for pid in [*processes_of(0), *processes_of(1)]:
        with contextlib.suppress(OSError):
            lines.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
    return "\n".join(lines)


def test_address_that_nobody_has_is_named_before_the_end(tmp_path):
    run = start(1, tmp_path, 29540, main="10.77.0.99")
    named = "rwh1 has been waiting"
    assert wait_for(lambda: named in run.text(), "the address is named", SLOW_SECONDS) < 60
    assert "s for node 0 at 10.77.0.99:29540 (" in run.text()


def test_address_that_nobody_has(tmp_path):
    run = start(1, tmp_path, 29540, main="10.77.0.99", own=("--join_seconds", 8))
    assert run.wait(60) == 2
    assert "error: rwh1 cannot reach node 0 at 10.77.0.99:29540" in run.text()


def test_main_address_of_another_machine(tmp_path):
    run = start(0, tmp_path, 29541, main="10.77.0.99")
    assert run.wait(60) == 2
    assert "10.77.0.99 is not an address of rwh0, which runs as node 0; its addresses are: 10.77.0.10" in run.text()


@pytest.mark.several_hosts
def test_port_in_use(tmp_path):
    listen = "import socket as s, time; h = s.create_server(('10.77.0.10', 29542)); print('here'); time.sleep(999)"
    holder = on_host(0, [sys.executable, "-u", "-c", listen], tmp_path / "holder.log")
    wait_for(lambda: "here" in holder.text(), "the port is taken", SLOW_SECONDS)
    run = start(0, tmp_path, 29542)
    assert run.wait(SLOW_SECONDS) == 2
    assert "port 29542 of rwh0 cannot be taken" in run.text()


def test_host_that_does_not_come(tmp_path):
    run = start(0, tmp_path, 29543, own=("--join_seconds", 6))
    assert run.wait(60) == 2
    assert "node 1 of 2 did not join within 6 s" in run.text()


def test_other_recipe_on_one_host(tmp_path):
    runs = [start(0, tmp_path, 29544), start(1, tmp_path, 29544, "optim.lr_init=1e-5")]
    for run in runs:
        assert run.wait(60) == 2
        assert "node 1 (rwh1) runs another recipe than node 0 (rwh0)" in run.text()


def test_other_code_on_one_host(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "rwkv_accel", copy / "rwkv_accel")
    shutil.copytree(ROOT / "launch/recipes", copy / "launch/recipes")
    (copy / "rwkv_accel/schedules.py").write_text("# another version\n")
    runs = [start(0, tmp_path, 29545), start(1, tmp_path, 29545, folder=copy)]
    for run in runs:
        assert run.wait(60) == 2
        assert "node 1 (rwh1) runs other rwkv_accel code than node 0 (rwh0)" in run.text()


def test_host_without_the_data(tmp_path):
    # /dev/shm is each host's own.
    copy = f'cp {ROOT}/launch/recipes/data/demo.jsonl /dev/shm/; exec "$@"'
    for host, prefix in ((0, ["bash", "-c", copy, "_"]), (1, [])):
        command = [*prefix, *launcher(host, 29546, config="ddp"), *TRAIN, "data.path=/dev/shm/demo.jsonl"]
        run = on_host(host, [*command, f"out_dir={tmp_path / 'run'}"], tmp_path / f"{host}.log")
    assert run.wait(60) == 2
    assert "node 1 (rwh1) does not have /dev/shm/demo.jsonl" in run.text()


def test_doctor_shows_both_hosts(tmp_path):
    runs = [
        on_host(
            host,
            [*launcher(host, 29547, config="ddp"), "-m", "rwkv_accel.doctor", DEMO[0], f"out_dir={tmp_path}"],
            tmp_path / f"{host}.log",
        )
        for host in (0, 1)
    ]
    for run in runs:
        assert run.wait(SLOW_SECONDS) == 0, run.text()
    rows = [line.split() for line in runs[0].text().splitlines() if line[:1] in "01"]
    assert [(row[1], row[-4], row[-3]) for row in rows] == [
        ("rwh0", "eth0", "10.77.0.10"),
        ("rwh1", "eth0", "10.77.0.11"),
    ]
    assert "rank 0 - rank 1 on rwh1:" in runs[0].text()
    assert "nothing wrong with rwh1" in runs[0].text()


def test_doctor_without_our_launcher_names_what_differs(tmp_path):
    copy = tmp_path / "copy"
    for folder in ("rwkv_accel", "launch/recipes", "accelerate_configs"):
        shutil.copytree(ROOT / folder, copy / folder)
    (copy / "rwkv_accel/schedules.py").write_text("# another version\n")
    (copy / "launch/recipes/data/demo.jsonl").unlink()
    runs = []
    for host, folder in ((0, ROOT), (1, copy)):
        command = [*launcher(host, 29548, config="ddp", with_watch=False), "-m", "rwkv_accel.doctor", DEMO[0]]
        # Each host has a /dev/shm of its own.
        overrides = [f"trainer.seed={host}", "out_dir=/dev/shm/run"]
        runs.append(on_host(host, [*command, *overrides], tmp_path / f"{host}.log", folder=folder))
    for run in runs:
        assert run.wait(SLOW_SECONDS) == 1, run.text()
    found = runs[0].text()
    assert "rank 1 (rwh1) does not have launch/recipes/data/demo.jsonl" in found
    assert "rank 1 (rwh1) runs other rwkv_accel code than rank 0 (rwh0)" in found
    assert "rank 1 (rwh1) runs another recipe than rank 0 (rwh0)" in found
    assert "rwh1 does not see what rank 0 writes to /dev/shm" in found


def test_doctor_says_which_host_froze(tmp_path):
    """Alive and silent: a driver that hangs, a frozen kernel."""
    command = ["-m", "rwkv_accel.doctor", DEMO[0], f"out_dir={tmp_path}"]
    frozen = [sys.executable, "-c", "import time; time.sleep(999)"]
    first = on_host(0, [*launcher(0, 29549, config="ddp", with_watch=False), *command], tmp_path / "0.log")
    plain = launcher(1, 29549, config="ddp", with_watch=False)
    on_host(1, [*plain, "--no_python", *frozen], tmp_path / "1.log")
    assert first.wait(SLOW_SECONDS) == 1
    assert "rank 1 of 2 did not answer within 15 s; rwh0 did" in first.text()
    assert "not fit: network" in first.text()
