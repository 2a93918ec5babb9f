"""The page of a live run: the standard library's HTTP server, which reads the run's files when the page asks for news.

/                     the page with the data of now
/data.json?since=TAG  the data if the files have changed since TAG, else 204
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from rwkv_accel.errors import UserError
from rwkv_accel.report.page import embedded, page, read_runs
from rwkv_accel.report.reading import READ_FILES

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ReportServer(ThreadingHTTPServer):
    """Serves the page about some run folders. `url` says where."""

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], host: str, port: int, num_points: int):
        self._folders, self._num_points = list(folders), num_points
        self._lock = threading.Lock()
        self._tag = ""
        self._data: dict[str, Any] = {}
        self.fresh()  # a folder that is no run is said before the port is taken
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise UserError(
                f"cannot serve on {host} port {port}: {error.strerror}; use --serve 0 for a free port"
            ) from None

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"

    def fresh(self) -> dict[str, Any]:
        """The data with its tag; read again only when a file has changed."""
        with self._lock:
            tag = self._tag_of_files()
            if tag != self._tag:
                self._data = {**read_runs(self._folders, self._num_points), "tag": tag}
                self._tag = tag
            return self._data

    def answers_to(self, host_header: str) -> bool:
        """On the loopback only pages that were asked for by that name: no other site may read through a browser."""
        name = urlsplit(f"//{host_header}").hostname
        return str(self.server_address[0]) not in LOOPBACK or name in LOOPBACK

    def _tag_of_files(self) -> str:
        digest = hashlib.sha256()
        for folder in self._folders:
            for name in READ_FILES:
                try:
                    stat = (folder / name).stat()
                except OSError:
                    continue
                digest.update(f"{folder / name} {stat.st_mtime_ns} {stat.st_size} {stat.st_ino}\n".encode())
        return digest.hexdigest()[:16]


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        try:
            self._get(urlsplit(self.path))
        except UserError as error:  # the folder is gone: the page goes on asking
            self._answer(503, "text/plain; charset=utf-8", f"{error}\n".encode())

    def _get(self, target: SplitResult) -> None:
        if not self.server.answers_to(self.headers.get("Host", "")):
            self._answer(403, "text/plain", b"ask for it as localhost\n")
        elif target.path == "/":
            self._answer(200, "text/html; charset=utf-8", page(self.server.fresh(), is_live=True).encode())
        elif target.path == "/data.json":
            data = self.server.fresh()
            if parse_qs(target.query).get("since") == [data["tag"]]:
                self._answer(204, "application/json", b"")
            else:
                self._answer(200, "application/json", embedded(data).encode())
        else:
            self._answer(404, "text/plain", b"not here\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: a page that asks every two seconds would fill the terminal."""

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        # The page may have been closed meanwhile.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)


def serve(
    folders: Sequence[Path],
    *,
    host: str,
    port: int,
    num_points: int,
    say: Callable[[str], object] = lambda text: sys.stdout.write(f"{text}\n"),
) -> None:
    """Serve until Ctrl-C. Raises UserError when the port is taken or a folder is no run."""
    with ReportServer(folders, host, port, num_points) as server:
        say(f"following {', '.join(map(str, folders))} at {server.url} (Ctrl-C ends it)")
        sys.stdout.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")
