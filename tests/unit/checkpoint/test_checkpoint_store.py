"""Files in remote storage, against a real S3 server behind a proxy that fails, stalls and cuts answers short."""

import hashlib
import os
from dataclasses import replace

import pytest

from rwkv_accel.checkpoint import store as store_module
from rwkv_accel.checkpoint.store import RemoteError, RemoteStore, WrongBytes
from rwkv_accel.errors import UserError
from tests.faulty_s3 import BUCKET, CREDENTIALS, FaultProxy, S3Server, nth

CONTENT = os.urandom(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module", autouse=True)
def credentials():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setattr(store_module, "CHUNK_BYTES", 100_000)
        yield


@pytest.fixture(scope="module")
def shared():
    """A server, a proxy and a store, whose client takes a while to start; each test has a folder of its own."""
    server = S3Server()
    proxy = FaultProxy(server.port)
    yield proxy, open_store(proxy)
    proxy.close()
    server.close()


@pytest.fixture
def proxy(shared):
    shared[0].forget()
    return shared[0]


@pytest.fixture
def store(shared, proxy):
    return shared[1]


@pytest.fixture
def local(tmp_path):
    (tmp_path / "local.bin").write_bytes(CONTENT)
    return tmp_path / "local.bin"


def open_store(proxy, read_timeout=60):
    # One attempt per request below: what is seen here are the attempts of the store itself.
    config = {"read_timeout": read_timeout, "retries": {"total_max_attempts": 1}}
    options = {"endpoint_url": proxy.url, "config_kwargs": config}
    return RemoteStore(f"s3://{BUCKET}/x/", options, first_wait_seconds=0.01)


def test_what_is_put_is_listed_read_and_removed(store, local, tmp_path):
    store.check()
    assert store.files("") == {}, "the probe is gone"
    store.put(local, "a/b/c.bin", len(CONTENT), SHA256)
    store.put_bytes(b"small", "a/d.txt")
    assert store.files("a") == {"b/c.bin": len(CONTENT), "d.txt": 5}
    assert store.files("a/b") == {"c.bin": len(CONTENT)}
    assert store.files("nothing") == {}
    assert store.get_bytes("a/d.txt") == b"small"
    assert store.get_bytes("a/nothing") is None
    store.get("a/b/c.bin", tmp_path / "back", len(CONTENT), SHA256)
    assert (tmp_path / "back").read_bytes() == CONTENT
    store.remove(["a/d.txt", "a/gone", "a/b/c.bin"])
    assert store.files("a") == {}


@pytest.mark.parametrize(
    ("verify", "steps"), [(True, [150_000, 200_000, 250_000, 300_000]), (False, [300_000])], ids=["verify", "trust"]
)
def test_how_far_a_transfer_is_can_be_heard(store, local, tmp_path, verify, steps):
    sent, read = [], []
    name = f"heard/{verify}"
    replace(store, verify=verify).put(local, name, len(CONTENT), SHA256, sent.append)
    assert [position for position in sent if position] == steps
    store.get(name, tmp_path / "back", len(CONTENT), SHA256, read.append)
    assert read == [100_000, 200_000, 300_000]


@pytest.mark.parametrize("fault", ["500", "503", "half", "short"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_download_survives_a_fault_at_any_request(store, proxy, local, tmp_path, fault, number):
    name = f"get/{fault}-{number}"
    store.put(local, name, len(CONTENT), SHA256)
    proxy.fault = nth(number, fault, "GET")
    store.get(name, tmp_path / "back", len(CONTENT), SHA256)
    assert (tmp_path / "back").read_bytes() == CONTENT
    assert len(proxy.hit) == 1


@pytest.mark.parametrize(
    ("fault", "method", "number"), [("500", "PUT", 1), ("503", "HEAD", 1), ("500", "GET", 1), ("503", "GET", 3)]
)
def test_an_upload_survives_a_fault_at_any_request(store, proxy, local, fault, method, number):
    folder = f"put/{fault}-{method}-{number}"
    proxy.fault = nth(number, fault, method)
    store.put(local, f"{folder}/f", len(CONTENT), SHA256)
    assert len(proxy.hit) == 1
    assert store.files(folder) == {"f": len(CONTENT)}


def test_a_stalled_request_ends_by_the_timeout_and_is_repeated(proxy, local, tmp_path):
    store = open_store(proxy, read_timeout=2)
    store.put(local, "stall", len(CONTENT), SHA256)
    proxy.fault = nth(2, "stall", "GET")
    store.get("stall", tmp_path / "back", len(CONTENT), SHA256)
    assert len(proxy.hit) == 1
    assert (tmp_path / "back").read_bytes() == CONTENT
    proxy.fault = nth(1, "stall", "PUT")
    store.put_bytes(b"small", "g")
    assert len(proxy.hit) == 2
    assert store.get_bytes("g") == b"small"


def test_a_server_that_never_recovers_is_given_up(store, proxy, local):
    proxy.fault = nth(1, "500", "PUT", times=1000)
    with pytest.raises(RemoteError, match=r"cannot write down at s3://runs/x: .*InternalError"):
        store.put(local, "down", len(CONTENT), SHA256)
    assert len(proxy.hit) == store_module.ATTEMPTS


def test_bytes_that_changed_on_the_way_are_found(store, local, tmp_path):
    other = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(WrongBytes, match="changed arrived with other bytes"):
        store.put(local, "changed", len(CONTENT), other)
    with pytest.raises(WrongBytes, match=f"changed arrived with {len(CONTENT)} bytes instead of 7"):
        store.put(local, "changed", 7, SHA256)
    with pytest.raises(WrongBytes, match="the bytes of changed do not fit its checksum"):
        store.get("changed", tmp_path / "back", len(CONTENT), other)


def test_without_verification_nothing_is_read_back(shared, proxy, local):
    store = replace(shared[1], verify=False)
    store.put(local, "unverified", len(CONTENT), hashlib.sha256(b"other").hexdigest())
    assert "GET" not in {method for method, _ in proxy.seen}
    with pytest.raises(WrongBytes, match="instead of 7"):
        store.put(local, "unverified", 7, SHA256)


def test_unusable_storage_is_one_line_before_the_training(store, proxy, monkeypatch):
    proxy.fault = nth(1, "500", "PUT", times=1000)
    with pytest.raises(UserError, match=r"^checkpoint.remote_url s3://runs/x cannot be used: .*Internal.*; check") as e:
        store.check()
    assert "\n" not in str(e.value)
    assert len(proxy.hit) == 1, "no waiting for a server that is wrong from the start"
    proxy.forget()
    with pytest.raises(UserError, match="cannot be used: The specified bucket does not exist"):
        RemoteStore("s3://nobody/x", store.options).check()
    with pytest.raises(UserError, match=r"cannot be used: .*unexpected keyword argument 'endpint_url'"):
        RemoteStore(f"s3://{BUCKET}/x", {"endpint_url": proxy.url}).check()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match=r"cannot be used: Unable to locate credentials; check .*AWS_ACCESS_KEY_ID"):
        RemoteStore(f"s3://{BUCKET}/x", store.options).check()


def test_urls_that_nothing_can_open_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"storage nowhere://x cannot be opened: Protocol not known: nowhere"):
        RemoteStore("nowhere://x")

    def not_installed(*args, **kwargs):
        raise ImportError

    monkeypatch.setattr("fsspec.core.url_to_fs", not_installed)
    with pytest.raises(UserError, match=r"needs a package that is missing: pip install 'rwkv_accel\[s3\]'"):
        RemoteStore("s3://runs/x")


def test_any_other_kind_of_url_works_the_same(tmp_path, local):
    store = RemoteStore(f"file://{tmp_path}/remote", first_wait_seconds=0.01)
    store.check()
    store.put(local, "a/f", len(CONTENT), SHA256)
    assert store.files("a") == {"f": len(CONTENT)}
    store.get("a/f", tmp_path / "back", len(CONTENT), SHA256)
    assert (tmp_path / "back").read_bytes() == CONTENT
    store.remove(["a/f"])
    assert store.files("a") == {}
