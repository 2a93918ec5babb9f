"""Job scripts: what they run on each node, against golden files; shellcheck; the rules of requeueing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SLURM = ROOT / "launch/slurm"
GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = sorted(
    [*ROOT.glob("launch/**/*.sh"), *SLURM.glob("*.sbatch"), *ROOT.glob("tests/distributed/**/*.sh"), ROOT / ".ci/run"]
)
RECIPE = ["launch/recipes/lora_7b.yaml", "peft.rank=64", "samples.prompts=[Hello you, it's me]"]


def plan(*args, **env) -> str:
    """The dry run in a clean environment."""
    clean = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_accel.launch_plan", *map(str, args)],
        cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def blocks(text: str) -> dict[str, str]:
    """Node -> what runs there."""
    return dict(re.findall(r"^on (\S+):\n((?:  .*\n)+)", text, re.MULTILINE))


SBATCH_ARGUMENTS = {
    "single_node": ["--gpus-per-node", 8, "launch/slurm/single_node.sbatch", *RECIPE],
    "multi_node": ["--gpus-per-node", 8, "launch/slurm/multi_node.sbatch", *RECIPE],
    "multi_node_ft": ["--gpus-per-node", 8, "launch/slurm/multi_node_ft.sbatch", *RECIPE],
    "array_sweep": ["--array-task", 1, "launch/slurm/array_sweep.sbatch", "a.yaml", "b.yaml", "--", *RECIPE[1:]],
}
NODES = (1, 2, 4, 64)


def planned(script: str, nodes: int) -> str:
    """The plan of a job script; of many nodes, the first and the last, once the others are found to be equal."""
    text = plan("-N", nodes, *SBATCH_ARGUMENTS[script])
    found = blocks(text)
    assert list(found) == [f"node{i}" for i in range(nodes)]
    for rank in range(nodes):
        assert found[f"node{rank}"] == found["node0"].replace("--machine_rank 0 ", f"--machine_rank {rank} ")
        if nodes > 4 and 0 < rank < nodes - 1:
            text = text.replace(f"on node{rank}:\n{found[f'node{rank}']}", "...\n" if rank == 1 else "")
    return text


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("script", SBATCH_ARGUMENTS)
def test_plan_equals_golden_file(script, nodes):
    assert planned(script, nodes) == (GOLDEN / f"{script}_{nodes}.txt").read_text()


def test_bare_metal_over_ssh_equals_golden_file(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\nnode1 slots=8\n\nnode2 slots=8\n")
    text = plan("launch/multi_node.sh", *RECIPE, HOSTFILE=str(hosts), MIN_NODES="1")
    assert text == (GOLDEN / "multi_node_ssh.txt").read_text()


def test_processes_follow_the_granted_gpus_and_the_port_the_job():
    assert "--num_processes 6 " in plan("-N", 3, "--gpus-per-node", 2, "launch/slurm/multi_node.sbatch", "a.yaml")
    assert "--num_processes 3 " in plan("-N", 3, "launch/slurm/multi_node.sbatch", "a.yaml")
    typed = plan("-N", 3, "launch/slurm/multi_node.sbatch", "a.yaml", SLURM_GPUS_PER_NODE="a100:4")
    assert "--num_processes 12 " in typed
    asked = plan("-N", 3, "--gpus-per-node", 2, "launch/slurm/multi_node.sbatch", "a.yaml", PROCESSES_PER_NODE="1")
    assert "--num_processes 3 " in asked
    assert "--main_process_port 20345 " in asked  # of job 12345


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--array-task", 2, "launch/slurm/array_sweep.sbatch", "a", "b"], "array task 2 has no recipe; 2 were given"),
        (["launch/slurm/none.sbatch"], "script launch/slurm/none.sbatch does not exist"),
        (["launch/multi_node.sh"], "no recipe; example: launch/multi_node.sh"),
        (["launch/multi_node.sh", "a.yaml"], "NUM_NODES is not set; on each machine: NUM_NODES=2 MAIN_IP="),
        (["launch/slurm/multi_node.sbatch"], "no recipe; example: sbatch launch/slurm/multi_node.sbatch"),
        (["launch/slurm/array_sweep.sbatch"], "array task 0 has no recipe; 0 were given"),
    ],
)
def test_bad_input_is_one_line(arguments, line):
    text = plan(*arguments)
    assert text.startswith("error: ")
    assert line in text
    assert len(text.splitlines()) == 1


def test_job_script_outside_of_slurm_says_how_it_is_meant():
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "launch/slurm/multi_node.sbatch", "a.yaml"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout.startswith("error: submit with sbatch; to see what would run: python -m rwkv_accel.launch_plan")


def test_node_without_python_says_where_to_activate_one(tmp_path):
    for name in ("dirname", "hostname", "nproc"):
        (tmp_path / name).symlink_to(shutil.which(name))
    env = {"PATH": str(tmp_path), "NUM_NODES": "1", "MAIN_IP": "127.0.0.1", "NODE_RANK": "0"}
    done = subprocess.run(
        [shutil.which("bash"), "launch/multi_node.sh", "a.yaml"],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "has no python on its PATH: activate the environment" in done.stderr


def test_plan_of_one_machine_by_hand_begins_with_its_name():
    text = plan("launch/multi_node.sh", "a.yaml", NUM_NODES="2", MAIN_IP="10.0.0.1", NODE_RANK="1")
    assert text.startswith("on this machine:\n  GLOO_SOCKET_IFNAME=eth0\n")
    assert "--machine_rank 1 --main_process_ip 10.0.0.1 " in text.splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_hyper_parameters_in_job_scripts():
    for script in SCRIPTS:
        text = script.read_text()
        code = "\n".join(line for line in text.splitlines() if not line.startswith("#") or line.startswith("#SBATCH"))
        assert not re.search(r"\b(optim|trainer|peft|data|model)\.\w+=", code), script


# What happened in the attempt: exit code of srun, marker files, stop requested -> is the job queued again?
REQUEUE_CASES = {
    "finished": (0, [], False, 0, False),
    "saved_by_request": (75, ["requeue", "started"], True, 2, True),
    "saved_but_launcher_killed": (1, ["requeue", "started"], False, 0, True),
    "crash_after_first_update": (1, ["started"], False, 0, True),
    "crash_for_the_fourth_time": (1, ["started"], False, 3, False),
    "wrong_recipe": (2, [], False, 0, False),
    "crash_before_first_update": (1, [], False, 0, False),
    "preempted_while_starting": (75, [], True, 0, True),
    "preempted_while_starting_too_often": (75, ["requeue"], True, 3, False),
}


def requeue(folder, *, exit_code, markers, stop_requested, failures=0, state="RUNNING None", **env):
    """Output of requeue_if_worthwhile after an attempt that ended so, with stand-ins for Slurm's commands."""
    for marker in markers:
        (folder / marker).write_text("7\n")
    (folder / "failures").write_text(f"{failures}\n")
    script = f"""
    . launch/slurm/common.sh
    scontrol() {{ echo "CALLED scontrol $*"; }}
    squeue() {{ echo "{state}"; }}
    job_files={folder} exit_code={exit_code} stop_requested={"USR1" if stop_requested else ""}
    RWKV_ACCEL_REQUEUE_FILE=$job_files/requeue RWKV_ACCEL_STARTED_FILE=$job_files/started
    requeue_if_worthwhile
    """
    env = {**os.environ, "SLURM_JOB_ID": "7", "REQUEUE_WAIT_SECONDS": "0", **env}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("case", REQUEUE_CASES)
def test_requeue_rules(case, tmp_path):
    exit_code, markers, stop_requested, failures, queued_again = REQUEUE_CASES[case]
    out = requeue(
        tmp_path, exit_code=exit_code, markers=markers, stop_requested=stop_requested, failures=failures
    )  # fmt: skip
    assert ("CALLED scontrol requeue 7" in out) == queued_again, out
    if queued_again:
        progress = "requeue" in markers and "started" in markers
        assert int((tmp_path / "failures").read_text()) == (0 if progress else failures + 1)


SAVED = {"exit_code": 75, "markers": ["requeue", "started"], "stop_requested": True}


def test_restarts_are_bounded(tmp_path):
    out = requeue(tmp_path, **SAVED, SLURM_RESTART_COUNT="5", MAX_RESTARTS="5")
    assert "CALLED" not in out
    assert "5 restarts are the limit" in out


def test_cancelled_job_stays_cancelled_and_one_at_its_limit_does_not(tmp_path):
    out = requeue(tmp_path, **SAVED, state="COMPLETING None")
    assert "CALLED" not in out
    assert "Slurm ends this job" in out
    assert "CALLED scontrol requeue 7" in requeue(tmp_path, **SAVED, state="COMPLETING TimeLimit")
