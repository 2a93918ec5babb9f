"""The server of a live run over real sockets: pages, news, refusals; and the command that starts it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from rwkv_accel.errors import UserError
from rwkv_accel.report.serve import ReportServer
from tests.helpers import ROOT, environment
from tests.report_runs import append, step_records, write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", num_steps=20, resumed_at=10)


@pytest.fixture
def server(run):
    with ReportServer([run], "127.0.0.1", 0, 1000) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join(60)


def get(server, path, host=None):
    """(status, headers, body)."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_page_and_news(server, run):
    status, headers, body = get(server, "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"connect-src 'self'" in body
    data = json.loads(get(server, "/data.json")[2])
    assert data["runs"][0]["num_records"] == 20
    status, _, body = get(server, f"/data.json?since={data['tag']}")
    assert (status, body) == (204, b"")
    append(run, "loss_data.json", step_records(21)[-1:])
    status, _, body = get(server, f"/data.json?since={data['tag']}")
    assert status == 200
    news = json.loads(body)
    assert news["runs"][0]["num_records"] == 21
    assert news["tag"] != data["tag"]


def test_only_these_pages_and_only_by_the_name_of_this_machine(server):
    assert get(server, "/run.yaml")[0] == 404
    assert get(server, "/../run.yaml")[0] == 404
    assert get(server, "/", host="evil.example:8720")[0] == 403
    assert get(server, "/", host="localhost:8720")[0] == 200


def test_a_folder_that_is_gone_is_said(server, run):
    tag = json.loads(get(server, "/data.json")[2])["tag"]
    for file in run.iterdir():
        file.unlink()
    status, _, body = get(server, f"/data.json?since={tag}")
    assert status == 503
    assert b"holds no run" in body


def test_a_taken_port_names_the_remedy(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="Address already in use; use --serve 0 for a free port"):
            ReportServer([run], "127.0.0.1", taken.getsockname()[1], 1000)


def test_the_command_prints_its_address_and_ends_with_ctrl_c(run):
    command = [sys.executable, "-m", "rwkv_accel.report", str(run), "--serve", "0"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        port = int(line.split("http://127.0.0.1:")[1].split("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
    assert not (run / "report.html").exists()
