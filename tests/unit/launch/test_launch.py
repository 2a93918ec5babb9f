"""The launcher: own options, checks before the start, exit codes, and what it finds different between nodes."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace

import pytest
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousConnectionError

from rwkv_accel import launch
from rwkv_accel.cluster import PeerWatch, network
from rwkv_accel.cluster.facts import NodeFacts, code_digest, compare, gather_facts, missing_paths, read_recipe
from rwkv_accel.cluster.watch import _Peer
from rwkv_accel.errors import UserError
from tests.helpers import ROOT, environment

RECIPE = "launch/recipes/demo.yaml"


def run(*arguments):
    """`python -m rwkv_accel.launch ...` -> (exit code, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_accel.launch", *map(str, arguments)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_own_options_stand_in_front_of_the_script():
    own, rest = launch.parse_args(["--lost_seconds", "5", "--cpu", "-m", "x", "--lost_seconds", "7"])
    assert own.lost_seconds == 5
    assert rest == ["--cpu", "-m", "x", "--lost_seconds", "7"]


def test_wrong_recipe_ends_before_anything_starts():
    code, text = run("--config_file", "accelerate_configs/ddp.yaml", "-m", "rwkv_accel.train", RECIPE, "optim.lr=1")
    assert code == 2
    assert text.splitlines()[-1].endswith("error: unknown key optim.lr; here it is optim.lr_init")


@pytest.mark.parametrize("config", ["cpu", "ddp"])
@pytest.mark.parametrize("code", [0, 2, 75])
def test_exit_code_is_the_scripts_own(config, code, tmp_path):
    if (config, code) == ("cpu", 2):
        pytest.skip("the other three cover one process")
    script = tmp_path / "ends.py"
    script.write_text(f"import sys; sys.exit({code})")
    processes = ("--num_processes", 1 if config == "cpu" else 2)
    got, text = run("--config_file", f"accelerate_configs/{config}.yaml", *processes, script)
    assert got == code, text


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("config", ["cpu", "ddp"])
def test_signal_to_the_launcher_alone_stops_the_trainers_and_waits_for_them(config, number, tmp_path):
    script = tmp_path / "saves.py"
    script.write_text(f"""
import os, pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    here.with_suffix(".saved").touch()
    sys.exit(75)
signal.signal(signal.{number.name}, save)
here = pathlib.Path({str(tmp_path)!r}, os.environ.get("LOCAL_RANK", "0"))
here.touch()
while True: signal.pause()
""")
    processes = 1 if config == "cpu" else 2
    command = ["-m", "rwkv_accel.launch", "--config_file", f"accelerate_configs/{config}.yaml"]
    launcher = subprocess.Popen(
        [sys.executable, *command, "--num_processes", str(processes), str(script)],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not all((tmp_path / str(rank)).exists() for rank in range(processes)):
            assert time.monotonic() < deadline
            assert launcher.poll() is None
            time.sleep(0.05)
        launcher.send_signal(number)
        _, text = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode == 75, text
    assert all((tmp_path / f"{rank}.saved").exists() for rank in range(processes))
    assert "Traceback" not in text


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (3, 2)])
def test_users_mistake_is_not_tried_again_and_other_failures_are(code, starts, tmp_path):
    script = tmp_path / "ends.py"
    script.write_text(f"""
import os, sys, time
if os.environ["RANK"] == "1":
    time.sleep(600)  # until the launcher ends it
open({str(tmp_path / "starts")!r}, "a").write("x")
sys.exit({code})
""")
    options = ("--num_processes", 2, "--max_restarts", 1, "--monitor_interval", 0.1)
    got, text = run("--config_file", "accelerate_configs/ddp.yaml", *options, script)
    assert got == code, text
    assert (tmp_path / "starts").read_text() == "x" * starts


def test_codes_that_disagree_or_signals_are_1():
    assert launch._agreed_code([75, 75, -15]) == 75
    assert launch._agreed_code([2, 75]) == 1
    assert launch._agreed_code([-9]) == 1
    assert launch._how(-9) == "was ended by SIGKILL"


def test_too_few_gpus_are_named(monkeypatch):
    session = launch.Session(Namespace())
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UserError, match=f"{socket.gethostname()} has 4 GPUs but 8 processes were asked for"):
        session._check_gpus(Namespace(nproc_per_node="8"))
    session._check_gpus(Namespace(nproc_per_node="4"))


def test_gpus_that_the_job_does_not_see_are_mentioned(monkeypatch, capsys, tmp_path):
    session = launch.Session(Namespace())
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(launch, "GPU_DRIVERS", (tmp_path / "none",))
    session._check_gpus(Namespace(nproc_per_node="8"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(launch, "GPU_DRIVERS", (tmp_path,))
    session._check_gpus(Namespace(nproc_per_node="8"))
    assert "this machine has GPUs, but none for this job: it trains on the CPU" in capsys.readouterr().err


def test_several_machines_need_an_address():
    code, text = run("--config_file", "accelerate_configs/multinode_ddp.yaml", "--machine_rank", 0, "-m", "this")
    assert code == 2
    assert "several machines need --main_process_ip" in text


def test_fewer_machines_need_the_elastic_rendezvous():
    session = launch.Session(Namespace(min_machines=1))
    with pytest.raises(UserError, match="--min_machines needs --rdzv_backend c10d"):
        session._watch_nodes(Namespace(rdzv_backend="static"), 2)


def test_main_address_and_port(monkeypatch):
    with pytest.raises(UserError, match=r"203\.0\.113\.7 is not an address of"):
        network.check_can_host("203.0.113.7", 29500)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of .* cannot be taken"):
            network.check_can_host("127.0.0.1", port)
        network.wait_until_reachable("127.0.0.1", port, 5, print)
    network.check_can_host("127.0.0.1", port)
    with pytest.raises(UserError, match=rf"cannot reach node 0 at 127\.0\.0\.1:{port} \(Connection refused\)"):
        network.wait_until_reachable("127.0.0.1", port, 1, print)


FIRST = NodeFacts(0, "a", {"torch": "2.13.0", "python": "3.11"}, "code", "recipe", 8, ())


def test_equal_nodes_have_no_problem():
    assert compare([FIRST, replace(FIRST, node=1, hostname="b")]) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"code": "x"}, "node 1 (b) runs other rwkv_accel code than node 0 (a); update it there"),
        ({"recipe": "x"}, "node 1 (b) runs another recipe than node 0 (a); give all nodes the same command"),
        (
            {"versions": {"torch": "2.12.0", "python": "3.11"}},
            "node 1 (b) has torch 2.12.0, node 0 (a) has 2.13.0; use one environment",
        ),
        ({"num_gpus": 7}, "node 1 (b) has 7 GPUs, node 0 (a) has 8; check the driver there, or leave the node out"),
        ({"missing": ("d.jsonl",)}, "node 1 (b) does not have d.jsonl, which the recipe names; mount or copy it there"),
    ],
)
def test_each_difference_is_one_line(change, line):
    assert compare([FIRST, replace(FIRST, node=1, hostname="b", **change)]) == [line]


@pytest.mark.parametrize(
    ("silent_seconds", "restarts", "ended"), [(100, True, False), (10, True, True), (100, False, True)]
)
def test_trainers_of_a_lost_node_are_ended_and_those_of_a_newer_group_are_not(silent_seconds, restarts, ended):
    script = f"""
import subprocess, threading
from rwkv_accel import launch
launch.threading.Timer = lambda *_: threading.Thread()
child = subprocess.Popen(["sleep", "300"])
launch._end_trainers({silent_seconds}, restarts={restarts})
print(child.wait(60) if {ended} else child.poll())
child.kill()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["-9" if ended else "None"], done.stderr


def test_node_that_falls_silent_is_named_given_up_and_welcomed_back():
    lines, given_up = [], []
    watch = PeerWatch(
        "10.0.0.1", 29500, FIRST, 2, min_nodes=1, join_seconds=9, lost_seconds=120,
        on_lost=lambda silent: given_up.append((len(lines), round(silent))), say=lines.append,
    )  # fmt: skip
    peer = _Peer(beat=b"1")
    watch._peers, watch._names = {1: peer}, {1: "node 1 (b)"}
    for silent_seconds in (10, 20, 60, 130, 140, 10, 1, 1, 20):
        peer.changed_at = time.monotonic() - silent_seconds
        watch._judge_peer(1, peer)
    assert [line.split(":")[0] for line in lines] == [
        "node 1 (b) is silent", "node 1 (b) is lost", "node 1 (b) is back", "node 1 (b) is silent",
    ]  # fmt: skip
    assert given_up == [(2, 130)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RendezvousConnectionError, "node 0, which hosts the rendezvous, has ended"),
        (RendezvousClosedError, "has ended"),
    ],
)
def test_node_that_finds_no_place_any_more_is_told_why(error, reason, capsys):
    def refuses(args):
        raise error("no")

    session = launch.Session(launch.parse_args([])[0])
    with pytest.raises(launch._Ended) as ended:
        session._torchrun(refuses, Namespace(nnodes="1", nproc_per_node="1"))
    assert ended.value.code == 1
    assert reason in capsys.readouterr().err


def test_of_several_nodes_the_odd_one_out_is_named():
    nodes = [replace(FIRST, node=n, hostname=h) for n, h in enumerate("abc")]
    nodes[0] = replace(nodes[0], code="x")
    nodes[2] = replace(nodes[2], recipe="x", num_gpus=0)
    assert [line.split(";")[0] for line in compare(nodes)] == [
        "node 0 (a) runs other rwkv_accel code than node 1 (b)",
        "node 2 (c) runs another recipe than node 0 (a)",
        "node 2 (c) has 0 GPUs, node 0 (a) has 8",
    ]


def test_every_file_that_a_recipe_reads_is_looked_for_and_names_elsewhere_are_not(tmp_path):
    for name in ("pairs.bin", "pairs.idx", "half.bin"):
        (tmp_path / name).touch()
    here = [f"{tmp_path}/pairs", f"{tmp_path}/pairs.bin", "hub:owner/name", "s3://bucket/x.jsonl", "launch/README.md"]
    absent = [f"{tmp_path}/half.bin", f"{tmp_path}/none.jsonl"]
    config = read_recipe(
        [str(ROOT / RECIPE), f"data.path=[{', '.join(here + absent)}]", "eval.path=e.jsonl", "eval.every_n_steps=5",
         "eval.choices_path=[c.jsonl]", "eval.answers_path=a.jsonl", "data.tokenizer=t.json", "data.template=t.jinja"]
    )  # fmt: skip
    assert missing_paths(config) == [
        f"{tmp_path}/half.idx", f"{tmp_path}/none.jsonl", "e.jsonl", "c.jsonl", "a.jsonl", "t.json", "t.jinja",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "seconds", "restarts"), [("rwkv_accel.doctor", 45, 0), ("rwkv_accel.train", 120, 3)]
)
def test_doctor_waits_less_for_a_node_than_the_trainer_and_runs_once(script, seconds, restarts, monkeypatch):
    seen = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", seen.append)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    session = launch.Session(launch.parse_args([])[0])
    assert session.run(["--max_restarts", "3", "-m", script]) == 0
    assert session.own.join_seconds == seconds
    assert [args.max_restarts for args in seen] == [restarts]


def test_facts_survive_the_store_and_follow_code_and_recipe(tmp_path):
    config = read_recipe([str(ROOT / RECIPE), "data.path=none.jsonl"])
    facts = gather_facts(3, config)
    assert NodeFacts.loads(facts.dumps()) == facts
    assert facts.missing == ("none.jsonl",)
    assert facts.recipe != gather_facts(3, read_recipe([str(ROOT / RECIPE)])).recipe
    assert read_recipe(["--flag"]) is None
    shutil.copytree(ROOT / "rwkv_accel/cluster", tmp_path / "code")
    before = code_digest(tmp_path / "code")
    (tmp_path / "code/facts.py").write_text("")
    assert code_digest(tmp_path / "code") != before
