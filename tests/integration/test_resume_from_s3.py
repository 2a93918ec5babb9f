"""A run with a copy in S3: its folder may be lost, the storage may fail, and nothing is lost by either."""

import re
import shutil
import signal

import pytest

from rwkv_accel.checkpoint.store import RemoteStore
from tests.faulty_s3 import BUCKET, CREDENTIALS, FaultProxy, S3Server, nth
from tests.helpers import ragged_jsonl, tiny_checkpoint, train_cli
from tests.integration.test_resume import (
    assert_same_end,
    recipe,
    start_and_wait_for_step,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s3")
    tiny_checkpoint(folder / "base.pth")
    ragged_jsonl(folder / "data.jsonl", 20)
    return folder


@pytest.fixture(scope="module")
def proxy():
    server = S3Server()
    proxy = FaultProxy(server.port)
    yield proxy
    proxy.close()
    server.close()


@pytest.fixture(scope="module")
def undisturbed(work):
    done = train_cli(recipe(work, "undisturbed"))
    assert done.returncode == 0, done.stderr
    return work / "undisturbed"


def recipe_with_copy(work, name, **more):
    checkpoint = {"every_n_steps": 3, "epoch_save": 1, "remote_url": f"s3://{BUCKET}/{name}", **more}
    return recipe(work, name, checkpoint=checkpoint)


def variables(proxy):
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": proxy.url}


def test_a_stopped_run_whose_folder_is_lost_continues_from_s3_bit_for_bit(work, undisturbed, proxy, monkeypatch):
    path, out_dir = recipe_with_copy(work, "lost"), work / "lost"
    process = start_and_wait_for_step(path, out_dir, 5, **variables(proxy))
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 75, out
    step = int(re.search(r"stopped by SIGTERM after step (\d+)", out)[1])
    shutil.rmtree(out_dir)
    again = train_cli(path, **variables(proxy))
    assert again.returncode == 0, again.stderr
    assert f"downloaded s3://{BUCKET}/lost/checkpoints/INTERRUPTED-" in again.stderr
    assert f"continuing from {out_dir}/checkpoints/INTERRUPTED: step {step} of 12" in again.stderr
    assert_same_end(out_dir, undisturbed)
    for name, value in variables(proxy).items():
        monkeypatch.setenv(name, value)
    store = RemoteStore(f"s3://{BUCKET}/lost")
    assert store.get_bytes("logs/report.html") == (out_dir / "report.html").read_bytes()
    assert store._files.info(f"{BUCKET}/lost/logs/report.html")["ContentType"] == "text/html", "a browser shows it"
    # Lost again after its end: nothing is left to train, and everything comes back.
    shutil.rmtree(out_dir)
    last = train_cli(path, **variables(proxy))
    assert last.returncode == 0, last.stderr
    assert "step 12 of 12" in last.stderr
    assert_same_end(out_dir, undisturbed)


def test_storage_that_fails_never_stops_the_run_and_the_same_command_catches_up(work, undisturbed, proxy):
    path = recipe_with_copy(work, "failing", remote_wait_seconds=1)
    proxy.forget()
    proxy.fault = nth(2, "500", "PUT", times=10**6)  # the proof before the training succeeds, nothing after it
    done = train_cli(path, **variables(proxy))
    assert done.returncode == 0, done.stderr
    assert_same_end(work / "failing", undisturbed)
    left = re.search(f"not uploaded to s3://{BUCKET}/failing: (.*); all of it is in {work}/failing", done.stderr)[1]
    assert {"adapter/epoch-0001", "adapter/epoch-0003"} < set(left.split(", "))
    assert "checkpoints/step-00000012-" in left
    proxy.forget()
    again = train_cli(path, "checkpoint.remote_wait_seconds=120", **variables(proxy))
    assert again.returncode == 0, again.stderr
    assert "not uploaded" not in again.stderr
    shutil.rmtree(work / "failing")
    elsewhere = work / "failing-elsewhere"
    third = train_cli(path, f"out_dir={elsewhere}", **variables(proxy))
    assert third.returncode == 0, third.stderr
    assert_same_end(elsewhere, undisturbed)


def test_storage_that_cannot_be_used_is_one_line_before_anything_is_read(work, proxy):
    proxy.forget()
    path = recipe_with_copy(work, "unusable", remote_url="s3://nobodys-bucket/run")
    done = train_cli(path, **variables(proxy))
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert (
        "checkpoint.remote_url s3://nobodys-bucket/run cannot be used: The specified bucket does not exist" in errors[0]
    )
    assert "Traceback" not in done.stderr
