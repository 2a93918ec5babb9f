"""Files on any fsspec URL (s3://bucket/prefix and its likes), trusted only after they were read back.

Whatever a server does, a call ends: it is retried a few times, each time after twice the wait, and each attempt has a
deadline. What was written is read again and compared by size and sha256; what is read must fit its size and sha256.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rwkv_accel.errors import UserError

T = TypeVar("T")
logger = logging.getLogger(__name__)

ATTEMPTS = 4
FIRST_WAIT_SECONDS = 1.0
CHUNK_BYTES = 16 << 20
# The deadline of one attempt: a fixed part, and time for the bytes on a very slow line.
DEADLINE_SECONDS = 120
SLOWEST_BYTES_PER_SECOND = 128 << 10
S3_CONFIG = {
    "connect_timeout": 20,
    "read_timeout": 60,
    "retries": {"total_max_attempts": 3, "mode": "standard"},
    # Checksums of newer S3 that other servers do not know; every file is read back here anyway.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}


Moved = Callable[[int], None]
"""Is told how many bytes of a piece of work are done."""


def nowhere(num_bytes: int) -> None:
    """A Moved that nobody listens to."""


class RemoteError(UserError):
    """The remote storage did not do what it was asked for, after all attempts."""


class WrongBytes(RemoteError):
    """A remote file is there and readable, and is not what it should be."""


@dataclass
class RemoteStore:
    """The files below one URL. Names are relative to it, with slashes."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the fsspec filesystem, on top of the defaults here and of what the environment says."""
    verify: bool = True
    """Read back every byte that was written; else its size alone is compared."""
    attempts: int = ATTEMPTS
    first_wait_seconds: float = FIRST_WAIT_SECONDS

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self._files, self._root = _open(self.url, self.options)

    def check(self) -> None:
        """Prove that files can be written, read and removed here, before any training depends on it.

        Raises:
            UserError: in one line, what does not work.
        """
        name, content = f".probe-{uuid.uuid4().hex}", b"rwkv_accel"
        try:
            self._put_bytes(content, name)
            self._read_back(name, len(content), hashlib.sha256(content).hexdigest())
            self._files.rm_file(self._path(name))
        except Exception as error:  # noqa: BLE001  each filesystem has errors of its own
            access = ", the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and the endpoint (AWS_ENDPOINT_URL)"
            raise UserError(
                f"checkpoint.remote_url {self.url} cannot be used: {_reason(error)}; check the URL"
                f"{access if _is_s3(self.url) else ''}, or leave checkpoint.remote_url out"
            ) from None

    def files(self, folder: str) -> dict[str, int]:
        """Bytes of every file below a folder, by its name relative to the folder; empty if there is no such folder."""

        def find() -> dict[str, int]:
            self._files.invalidate_cache()
            top = self._path(folder)
            try:
                found = self._files.find(top, detail=True)
            except FileNotFoundError:
                return {}
            return {name.removeprefix(top).lstrip("/"): int(info["size"]) for name, info in found.items()}

        return self._again(f"list {folder}", find)

    def put(self, local: Path, name: str, num_bytes: int, sha256: str, moved: Moved = nowhere) -> None:
        """Upload a file and see it arrive.

        moved: is told how many of its bytes are dealt with; where they are read back, sending is half the work. Comes
            from any thread, and starts over when the upload does.

        Raises:
            RemoteError: it did not arrive.
        """
        sent_share = 0.5 if self.verify else 1.0

        def upload() -> None:
            callback = _sent_callback(lambda sent: moved(int(sent * sent_share)))
            self._files.put_file(str(local), self._path(name), callback=callback, **self._deadline(num_bytes))
            self._read_back(name, num_bytes, sha256, lambda read: moved((num_bytes + read) // 2))

        self._again(f"write {name}", upload)

    def put_bytes(self, content: bytes, name: str) -> None:
        """Upload a small file and see it arrive. Errors as in put."""

        def upload() -> None:
            self._put_bytes(content, name)
            self._read_back(name, len(content), hashlib.sha256(content).hexdigest())

        self._again(f"write {name}", upload)

    def get(self, name: str, local: Path, num_bytes: int, sha256: str, moved: Moved = nowhere) -> None:
        """Download a file.

        moved: is told how many of its bytes are here.

        Raises:
            WrongBytes: what arrives does not fit its size and checksum, each time.
            RemoteError: it cannot be read.
            OSError: the local disk refused.
        """
        for _ in range(self.attempts):
            digest = hashlib.sha256()
            with local.open("wb") as file:
                for chunk in self._chunks(name, num_bytes):
                    digest.update(chunk)
                    file.write(chunk)
                    moved(file.tell())
            if digest.hexdigest() == sha256:
                return
        raise WrongBytes(f"the bytes of {name} do not fit its checksum")

    def get_bytes(self, name: str) -> bytes | None:
        """Content of a small file; None if there is no such file."""

        def read() -> bytes | None:
            try:
                return self._files.cat_file(self._path(name), **self._deadline(0))
            except FileNotFoundError:
                return None

        return self._again(f"read {name}", read)

    def remove(self, names: list[str]) -> None:
        """Remove files, in this order; one that is gone already is no error."""

        def remove_one(name: str) -> None:
            with suppress(FileNotFoundError):
                self._files.rm_file(self._path(name))
            if "file" in self._files.protocol:  # only disks have folders that stay behind empty
                with suppress(OSError):
                    self._files.rmdir(self._path(name).rpartition("/")[0])

        for name in names:
            self._again(f"remove {name}", partial(remove_one, name))

    def _put_bytes(self, content: bytes, name: str) -> None:
        self._files.pipe_file(self._path(name), content, **self._deadline(len(content)))

    def _read_back(self, name: str, num_bytes: int, sha256: str, read: Moved = nowhere) -> None:
        self._files.invalidate_cache()
        found = self._files.info(self._path(name))["size"]
        if found != num_bytes:
            raise WrongBytes(f"{name} arrived with {found} bytes instead of {num_bytes}")
        if not self.verify:
            return
        digest, num_read = hashlib.sha256(), 0
        for chunk in self._chunks(name, num_bytes):
            digest.update(chunk)
            read(num_read := num_read + len(chunk))
        if digest.hexdigest() != sha256:
            raise WrongBytes(f"{name} arrived with other bytes")

    def _chunks(self, name: str, num_bytes: int) -> Iterator[bytes]:
        # Each chunk has attempts of its own: a long download does not start over.
        for start in range(0, num_bytes, CHUNK_BYTES):
            yield self._again(f"read {name}", partial(self._chunk, name, start, num_bytes))

    def _chunk(self, name: str, start: int, num_bytes: int) -> bytes:
        end = min(start + CHUNK_BYTES, num_bytes)
        chunk = self._files.cat_file(self._path(name), start=start, end=end, **self._deadline(end - start))
        if len(chunk) != end - start:
            raise WrongBytes(f"{name} has {len(chunk)} bytes instead of {end - start} from byte {start} on")
        return chunk

    def _again(self, what: str, action: Callable[[], T]) -> T:
        wait = self.first_wait_seconds
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except RemoteError as error:
                if attempt == self.attempts or not isinstance(error, WrongBytes):
                    raise
            except Exception as error:
                if attempt == self.attempts:
                    raise RemoteError(f"cannot {what} at {self.url}: {_reason(error)}") from error
                logger.debug("attempt %d to %s at %s: %s", attempt, what, self.url, error)
            time.sleep(wait)
            wait *= 2
        raise AssertionError("unreachable")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _deadline(self, num_bytes: int) -> dict[str, float]:
        from fsspec.asyn import AsyncFileSystem

        if not isinstance(self._files, AsyncFileSystem):
            return {}  # no network behind it
        return {"timeout": DEADLINE_SECONDS + num_bytes / SLOWEST_BYTES_PER_SECOND}


def _sent_callback(sent: Moved) -> Any:
    """What fsspec calls while it sends a file."""
    from fsspec.callbacks import Callback

    class Sent(Callback):
        def call(self, *args: Any, **kwargs: Any) -> None:
            sent(self.value)

    return Sent()


def _open(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path within it.

    Raises:
        UserError: no such kind of URL, its package is missing, or an option is unknown.
    """
    import fsspec

    scheme = url.partition("://")[0]
    more: dict[str, Any] = {}
    if _is_s3(url):
        more = {"config_kwargs": {**S3_CONFIG, **options.get("config_kwargs", {})}}
    elif scheme in ("file", "local"):
        more = {"auto_mkdir": True}
    try:
        files, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, **{**options, **more})
    except ImportError:
        package = "'rwkv_accel[s3]'" if _is_s3(url) else f"the fsspec package for {scheme}://"
        raise UserError(f"storage {url} needs a package that is missing: pip install {package}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"storage {url} cannot be opened: {_reason(error)}; check the URL and checkpoint.remote_options"
        ) from None
    if hasattr(files, "retries"):
        files.retries = 1  # s3fs: a third layer of attempts would multiply the other two
    return files, root.rstrip("/")


def _is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if text and text != "None" else type(error).__name__
