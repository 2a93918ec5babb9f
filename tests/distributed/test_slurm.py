"""The job scripts on a real Slurm: slurmctld, two slurmd on hosts of their own, munge; all started and ended here.

    python -m pytest -m long tests/distributed/test_slurm.py
    python -m pytest -m several_hosts tests/distributed/test_slurm.py       the short form, which CI runs

Needs root and Debian's packages slurm-wlm and munge. Cannot prove anything about GPUs granted by Slurm (GRES).
"""

import os
import subprocess
import time

import pytest
import yaml

from tests.distributed.cluster import (
    DEMO,
    kill_host,
    losses,
    slurm,
    wait_for,
)
from tests.helpers import ROOT, environment, train_cli

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
# Slow enough to be caught in the middle.
LONG = [*DEMO, "data.ctx_len=256", "trainer.max_epochs=100000", "checkpoint.every_n_steps=5"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with slurm(folder):
        yield Cluster(folder)


class Cluster:
    """The commands of Slurm, with its configuration."""

    def __init__(self, folder):
        self.folder = folder
        self.env = {**environment(), "SLURM_CONF": str(folder / "slurm.conf"), "REQUEUE_WAIT_SECONDS": "20"}

    def run(self, *command):
        done = subprocess.run(
            [str(c) for c in command], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script, log, *arguments, options=()):
        """Job id of a job script, on two CPUs per node."""
        text = self.run(
            "sbatch", "--parsable", "--cpus-per-task=2", f"--output={log}", *options,
            ROOT / "launch/slurm" / f"{script}.sbatch", *arguments,
        )  # fmt: skip
        return text.strip()

    def state(self, job):
        lines = self.run("scontrol", "show", "job", "--oneliner", job).splitlines()
        fields = [dict(word.partition("=")[::2] for word in line.split()) for line in lines]
        return "+".join(field["JobState"] for field in fields), int(fields[0]["Restarts"])

    def wait_until(self, job, *states, timeout):
        return wait_for(lambda: self.state(job)[0] in states, f"job {job} is {states}", timeout)

    def wait_for_restart(self, job, number=1, timeout=120):
        """The job is queued again; begin it now, and not in two minutes as Slurm would."""
        wait_for(lambda: self.state(job)[1] >= number, f"restart {number} of job {job}", timeout)
        wait_for(lambda: self.state(job)[0] == "PENDING", f"job {job} pends", 60)
        # Too early a start meets the last attempt's step, which Slurm still clears away.
        wait_for(
            lambda: self.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == "2", "idle nodes", 60
        )
        time.sleep(10)
        self.run("scontrol", "update", f"job={job}", "starttime=now")

    def cancel(self, job):
        self.run("scancel", job)
        wait_for(lambda: self.state(job)[0] not in ("RUNNING", "COMPLETING", "PENDING"), f"job {job} ends", 90)


def last_step(out_dir):
    try:
        return max(losses(out_dir), default=0)
    except FileNotFoundError:
        return 0


def assert_continued_exactly(out_dir, tmp_path, until):
    """The first steps of the interrupted run are those of one process that nobody disturbed."""
    want_dir = tmp_path / "want"
    overrides = [*LONG, f"trainer.max_steps={until}", f"out_dir={want_dir}"]
    done = train_cli(*overrides)
    assert done.returncode == 0, done.stderr
    got, want = losses(out_dir), losses(want_dir)
    assert sorted(got)[:until] == list(range(1, until + 1))
    for step in range(1, until + 1):
        assert got[step] == pytest.approx(want[step], rel=2e-3), step


def saved_at(log):
    """Steps at which the trainer saved by request, from the job's log."""
    return [int(line.split("saved at step ")[1].split(",")[0]) for line in log.splitlines() if "saved at step" in line]


@pytest.mark.several_hosts
def test_two_nodes_train(cluster, tmp_path):
    out_dir, log = tmp_path / "run", tmp_path / "job.log"
    job = cluster.submit("multi_node", log, *DEMO, f"out_dir={out_dir}", "trainer.max_steps=8", options=["-N", 2])
    cluster.wait_until(job, "COMPLETED", timeout=180)
    want_dir = tmp_path / "want"
    assert train_cli(*DEMO, f"out_dir={want_dir}", "trainer.max_steps=8").returncode == 0
    assert list(losses(out_dir).values()) == pytest.approx(list(losses(want_dir).values()), rel=1e-4)
    assert "2 nodes (rwh[0-1]) x 1 processes" in log.read_text()
    assert not (ROOT / "slurm-files" / job).exists()


@pytest.mark.several_hosts
def test_signal_saves_requeues_and_continues_exactly(cluster, tmp_path):
    out_dir, log = tmp_path / "run", tmp_path / "job.log"
    job = cluster.submit("multi_node_ft", log, *LONG, f"out_dir={out_dir}", options=["-N", 2])
    wait_for(lambda: last_step(out_dir) >= 7, "seven steps", 180)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    cluster.wait_for_restart(job)
    (step,) = saved_at(log.read_text())
    assert (out_dir / "checkpoints/INTERRUPTED").is_dir()
    wait_for(lambda: last_step(out_dir) >= step + 6, "six more steps", 180)
    cluster.cancel(job)
    assert f"INTERRUPTED: step {step} of" in log.read_text()
    assert_continued_exactly(out_dir, tmp_path, step + 6)


def test_time_limit_saves_requeues_and_continues(cluster, tmp_path):
    out_dir, log = tmp_path / "run", tmp_path / "job.log"
    options = ["-N", 2, "--time=2", "--signal=B:USR1@45"]
    job = cluster.submit("multi_node_ft", log, *LONG, f"out_dir={out_dir}", options=options)
    cluster.wait_for_restart(job, timeout=180)
    (step,) = saved_at(log.read_text())
    wait_for(lambda: last_step(out_dir) >= step + 3, "three more steps", 180)
    cluster.cancel(job)
    assert "USR1: asking the trainer to save and stop" in log.read_text()
    assert f"INTERRUPTED: step {step} of" in log.read_text()


def test_preemption_saves_and_requeues(cluster, tmp_path):
    out_dir, log = tmp_path / "run", tmp_path / "job.log"
    job = cluster.submit("multi_node_ft", log, *LONG, f"out_dir={out_dir}", options=["-N", 2])
    wait_for(lambda: last_step(out_dir) >= 3, "three steps", 180)
    other = cluster.run("sbatch", "--parsable", "-p", "high", "-N", 2, "-c", 2, "-o", "/dev/null", "--wrap=sleep 2")
    cluster.wait_until(other.strip(), "COMPLETED", timeout=120)
    cluster.wait_for_restart(job)
    (step,) = saved_at(log.read_text())
    wait_for(lambda: last_step(out_dir) > step, "one more step", 180)
    cluster.cancel(job)


@pytest.mark.several_hosts
def test_wrong_recipe_fails_in_seconds_and_is_not_queued_again(cluster, tmp_path):
    log = tmp_path / "job.log"
    job = cluster.submit("multi_node_ft", log, DEMO[0], "optim.lr=1", options=["-N", 2])
    assert cluster.wait_until(job, "FAILED", timeout=60) < 60
    assert "error: unknown key optim.lr; here it is optim.lr_init" in log.read_text()
    assert "not queued again: it failed before the first update" in log.read_text()
    assert cluster.state(job)[1] == 0


def test_lost_node_is_named_and_the_run_continues_when_it_is_back(cluster, tmp_path):
    out_dir, log = tmp_path / "run", tmp_path / "job.log"
    job = cluster.submit("multi_node_ft", log, *LONG, f"out_dir={out_dir}", options=["-N", 2])
    wait_for(lambda: last_step(out_dir) >= 7, "seven steps", 180)
    kill_host(1)
    wait_for(lambda: "node 1 (rwh1) is lost" in log.read_text(), "the lost node is named", 60)
    wait_for(lambda: cluster.state(job)[1] >= 1, "the job is queued again", 180)
    subprocess.run([ROOT / "tests/distributed/slurm/up.sh", cluster.folder, "2", "2"], check=False, timeout=120)
    cluster.wait_for_restart(job)
    wait_for(lambda: "continuing from" in log.read_text(), "the run continues", 180)
    step = last_step(out_dir)
    wait_for(lambda: last_step(out_dir) >= step + 3, "three more steps", 180)
    cluster.cancel(job)
    assert_continued_exactly(out_dir, tmp_path, min(step + 3, 30))


def test_array_trains_each_recipe(cluster, tmp_path):
    recipe = yaml.safe_load((ROOT / DEMO[0]).read_text())
    recipes = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**recipe, "out_dir": str(tmp_path / name)}))
        recipes.append(path)
    log = tmp_path / "job_%a.log"
    arguments = [*recipes, "--", *DEMO[1:], "trainer.max_steps=3"]
    job = cluster.submit("array_sweep", log, *arguments, options=["--array=0-1"])
    cluster.wait_until(job, "COMPLETED+COMPLETED", timeout=180)
    assert sorted(losses(tmp_path / "a")) == sorted(losses(tmp_path / "b")) == [1, 2, 3]
    assert os.path.exists(tmp_path / "job_1.log")
