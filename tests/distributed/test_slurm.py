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

from rwkv_accel.config.load import dump_config, load_config
from rwkv_accel.launch import LOST_SECONDS
from tests.distributed.cluster import DEMO, SLOW_SECONDS, kill_host, losses, slurm, start_slurm, wait_for
from tests.helpers import ROOT, environment, launch, train_cli

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
# Slow enough to be caught in the middle.
LONG = [*DEMO, "data.ctx_len=256", "trainer.max_epochs=100000", "checkpoint.every_n_steps=5"]


@pytest.fixture(scope="module")
def started_slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with slurm(folder):
        yield folder


@pytest.fixture
def cluster(started_slurm):
    """The Slurm without any job and with all nodes, whatever the last test left."""
    running = Cluster(started_slurm)
    running.run("scancel", "--user=root")
    start_slurm(started_slurm)
    return running


class Cluster:
    """The commands of Slurm, with its configuration."""

    def __init__(self, folder):
        self.folder = folder
        self.env = {**environment(), "SLURM_CONF": str(folder / "slurm.conf"), "REQUEUE_WAIT_SECONDS": "20"}

    def run(self, *command):
        done = subprocess.run(
            [str(c) for c in command], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=120, check=False
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

    def wait_until(self, job, *states, timeout=SLOW_SECONDS):
        return wait_for(lambda: self.state(job)[0] in states, f"job {job} is {states}", timeout)

    def wait_for_requeue(self, job):
        """The job waits in the queue for its next attempt, and nothing of the last one runs any more."""
        wait_for(lambda: self.state(job)[1] >= 1, f"job {job} is queued again", SLOW_SECONDS)
        wait_for(lambda: self.state(job)[0] == "PENDING", f"job {job} pends", SLOW_SECONDS)
        # Too early a start meets the last attempt's step, which Slurm still clears away.
        wait_for(lambda: self.idle_nodes() == 2, "idle nodes", SLOW_SECONDS)
        time.sleep(10)

    def idle_nodes(self):
        return int(self.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() or 0)

    def start_now(self, job):
        """Begin a job that was queued again, and not in two minutes as Slurm would."""
        self.run("scontrol", "update", f"job={job}", "starttime=now")

    def cancel(self, job):
        self.run("scancel", job)
        wait_for(
            lambda: self.state(job)[0] not in ("RUNNING", "COMPLETING", "PENDING"), f"job {job} ends", SLOW_SECONDS
        )

    def seconds_of(self, job):
        """How long a job ran that has ended, by Slurm's own clock."""
        text = self.run("scontrol", "show", "job", "--oneliner", job).split("RunTime=")[1].split()[0]
        hours, minutes, seconds = map(int, text.split(":"))
        return 3600 * hours + 60 * minutes + seconds


def last_step(out_dir):
    try:
        return max(losses(out_dir), default=0)
    except FileNotFoundError:
        return 0


def recipe_without_end(tmp_path):
    """The demo as a file of its own, which ends at a step that is decided later."""
    path = tmp_path / "recipe.yaml"
    config = load_config(DEMO[0], [*LONG[1:], f"out_dir={tmp_path / 'run'}"])
    path.write_text(dump_config(config))
    return path


def end_at(recipe, step):
    tree = yaml.safe_load(recipe.read_text())
    tree["trainer"]["max_steps"] = step
    recipe.write_text(yaml.safe_dump(tree))


def assert_same_as_undisturbed(recipe, tmp_path):
    """Every loss up to the final one is, to the last bit, that of two processes that nobody interrupted."""
    launch("ddp", 2, "-m", "rwkv_accel.train", recipe, f"out_dir={tmp_path / 'want'}", timeout=SLOW_SECONDS)
    assert losses(tmp_path / "run") == losses(tmp_path / "want")


def saved_at(log):
    """Steps at which the trainer saved by request, from the job's log."""
    return [int(line.split("saved at step ")[1].split(",")[0]) for line in log.splitlines() if "saved at step" in line]


@pytest.mark.several_hosts
def test_two_nodes_train(cluster, tmp_path):
    out_dir, log = tmp_path / "run", tmp_path / "job.log"
    job = cluster.submit("multi_node", log, *DEMO, f"out_dir={out_dir}", "trainer.max_steps=8", options=["-N", 2])
    cluster.wait_until(job, "COMPLETED")
    want_dir = tmp_path / "want"
    assert train_cli(*DEMO, f"out_dir={want_dir}", "trainer.max_steps=8").returncode == 0
    assert list(losses(out_dir).values()) == pytest.approx(list(losses(want_dir).values()), rel=1e-4)
    assert "2 nodes (rwh[0-1]) x 1 processes" in log.read_text()
    assert not (ROOT / "slurm-files" / job).exists()


@pytest.mark.several_hosts
def test_signal_saves_requeues_and_continues_to_the_same_final_loss(cluster, tmp_path):
    recipe, out_dir, log = recipe_without_end(tmp_path), tmp_path / "run", tmp_path / "job.log"
    job = cluster.submit("multi_node_ft", log, recipe, options=["-N", 2])
    wait_for(lambda: last_step(out_dir) >= 7, "seven steps", SLOW_SECONDS)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    cluster.wait_for_requeue(job)
    (step,) = saved_at(log.read_text())
    assert (out_dir / "checkpoints/INTERRUPTED").is_dir()
    end_at(recipe, step + 6)
    cluster.start_now(job)
    cluster.wait_until(job, "COMPLETED")
    assert f"INTERRUPTED: step {step} of" in log.read_text()
    assert last_step(out_dir) == step + 6
    assert_same_as_undisturbed(recipe, tmp_path)


def test_time_limit_saves_requeues_and_continues_to_the_same_final_loss(cluster, tmp_path):
    recipe, out_dir, log = recipe_without_end(tmp_path), tmp_path / "run", tmp_path / "job.log"
    job = cluster.submit("multi_node_ft", log, recipe, options=["-N", 2, "--time=2", "--signal=B:USR1@45"])
    cluster.wait_for_requeue(job)
    (step,) = saved_at(log.read_text())
    end_at(recipe, step + 6)
    cluster.start_now(job)
    cluster.wait_until(job, "COMPLETED")
    assert "USR1: asking the trainer to save and stop" in log.read_text()
    assert f"INTERRUPTED: step {step} of" in log.read_text()
    assert last_step(out_dir) == step + 6
    assert_same_as_undisturbed(recipe, tmp_path)


def test_preemption_saves_and_requeues(cluster, tmp_path):
    out_dir, log = tmp_path / "run", tmp_path / "job.log"
    job = cluster.submit("multi_node_ft", log, *LONG, f"out_dir={out_dir}", options=["-N", 2])
    wait_for(lambda: last_step(out_dir) >= 3, "three steps", SLOW_SECONDS)
    other = cluster.run("sbatch", "--parsable", "-p", "high", "-N", 2, "-c", 2, "-o", "/dev/null", "--wrap=sleep 2")
    cluster.wait_until(other.strip(), "COMPLETED")
    cluster.wait_for_requeue(job)
    (step,) = saved_at(log.read_text())
    cluster.start_now(job)
    wait_for(lambda: last_step(out_dir) > step, "one more step", SLOW_SECONDS)
    cluster.cancel(job)


@pytest.mark.several_hosts
def test_wrong_recipe_fails_in_seconds_and_is_not_queued_again(cluster, tmp_path):
    log = tmp_path / "job.log"
    job = cluster.submit("multi_node_ft", log, DEMO[0], "optim.lr=1", options=["-N", 2])
    cluster.wait_until(job, "FAILED")
    assert "error: unknown key optim.lr; here it is optim.lr_init" in log.read_text()
    assert "not queued again: it failed before the first update" in log.read_text()
    assert cluster.state(job)[1] == 0
    assert cluster.seconds_of(job) < 60


def test_lost_node_is_named_and_the_run_continues_when_it_is_back(cluster, tmp_path):
    recipe, out_dir, log = recipe_without_end(tmp_path), tmp_path / "run", tmp_path / "job.log"
    job = cluster.submit("multi_node_ft", log, recipe, options=["-N", 2])
    wait_for(lambda: last_step(out_dir) >= 7, "seven steps", SLOW_SECONDS)
    kill_host(1)
    wait_for(lambda: "node 1 (rwh1) is lost" in log.read_text(), "the lost node is named", LOST_SECONDS)
    wait_for(lambda: cluster.state(job)[1] >= 1, "the job is queued again", SLOW_SECONDS)
    end_at(recipe, last_step(out_dir) + 6)
    start_slurm(cluster.folder)
    cluster.wait_for_requeue(job)
    cluster.start_now(job)
    cluster.wait_until(job, "COMPLETED")
    assert "continuing from" in log.read_text()
    assert_same_as_undisturbed(recipe, tmp_path)


def test_doctor_as_a_job_shows_both_nodes(cluster, tmp_path):
    log = tmp_path / "job.log"
    cluster.env["ENTRY_POINT"] = "rwkv_accel.doctor"
    job = cluster.submit("multi_node", log, DEMO[0], f"out_dir={tmp_path}", options=["-N", 2])
    cluster.wait_until(job, "COMPLETED")
    text = log.read_text()
    assert "rank 0 - rank 1 on rwh1:" in text
    assert f"{tmp_path} is shared by all hosts" in text
    assert "nothing wrong with rwh1" in text
    assert cluster.seconds_of(job) < 60


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
    cluster.wait_until(job, "COMPLETED+COMPLETED")
    assert sorted(losses(tmp_path / "a")) == sorted(losses(tmp_path / "b")) == [1, 2, 3]
    assert os.path.exists(tmp_path / "job_1.log")
