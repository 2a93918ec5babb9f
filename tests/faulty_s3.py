"""A real S3 server in a process of its own (moto), and a proxy in front of it that misbehaves as told."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the tests are gone
"""
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    # Nothing of the machine's profiles.
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
}
BUCKET = "runs"

Fault = Callable[[str, str], "str | None"]
"""(method, path) of a request -> None, or what to do to it: "500", "503", "stall", "half" or "short"."""


class S3Server:
    """moto's S3 with one bucket; `url` is its endpoint."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("PUT", f"/{BUCKET}", headers={"Authorization": "AWS4-HMAC-SHA256 Credential=tests/s3/"})
        assert connection.getresponse().status == 200
        connection.close()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class FaultProxy:
    """Passes requests on to a server; `fault` decides what goes wrong, `seen` lists them all."""

    def __init__(self, port: int) -> None:
        self.forget()
        self.released = threading.Event()
        """Ends all stalls."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy._handle(self, port)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

            def log_message(self, *args: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def forget(self) -> None:
        """No faults from here on, and nothing seen."""
        self.fault: Fault = lambda method, path: None
        self.seen: list[tuple[str, str]] = []
        self.hit: list[tuple[str, str]] = []
        """Requests that met a fault."""

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, request: BaseHTTPRequestHandler, port: int) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        call = (request.command, request.path)
        self.seen.append(call)
        fault = self.fault(*call)
        if fault is not None:
            self.hit.append(call)
        if fault == "stall":
            self.released.wait()
            request.close_connection = True
            return
        if fault in ("500", "503"):
            code = {"500": "InternalError", "503": "SlowDown"}[fault]
            self._answer(request, int(fault), {}, f"<Error><Code>{code}</Code></Error>".encode())
            return
        upstream = HTTPConnection("127.0.0.1", port, timeout=60)
        upstream.request(request.command, request.path, body, dict(request.headers))
        reply = upstream.getresponse()
        content = reply.read()
        headers = {k: v for k, v in reply.getheaders() if k.lower() not in ("connection", "transfer-encoding", "date")}
        upstream.close()
        if fault == "short":  # a consistent answer with half of the content
            content = content[: len(content) // 2]
            headers = {k: v for k, v in headers.items() if k.lower() != "content-length"}
        self._answer(request, reply.status, headers, content, cut=fault == "half")

    def _answer(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes, cut: bool = False
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        if "content-length" not in {name.lower() for name in headers}:
            request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content[: len(content) // 2] if cut else content)
        request.wfile.flush()
        request.close_connection = request.close_connection or cut


def nth(number: int, fault: str, method: str = "", part: str = "", times: int = 1) -> Fault:
    """The n-th request (and the following ones, `times` in all) of this method with this part in its path."""
    count = 0
    lock = threading.Lock()

    def decide(seen_method: str, path: str) -> str | None:
        nonlocal count
        if method not in ("", seen_method) or part not in path:
            return None
        with lock:
            count += 1
            return fault if number <= count < number + times else None

    return decide
