"""Data in an S3 bucket, served by moto on this machine: files, tables, streams, and what can go wrong."""

import json
import sys
import urllib.request
from itertools import islice

import boto3
import datasets
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from rwkv_accel.errors import UserError

from .conftest import make_loader

TEXTS = [f"text {index}" for index in range(12)]


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def stored(endpoint, tmp_path_factory):
    records = [{"text": text} for text in TEXTS]
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
    )
    client.create_bucket(Bucket="data")
    client.put_object(Bucket="data", Key="d.jsonl", Body="".join(json.dumps(r) + "\n" for r in records).encode())
    path = tmp_path_factory.mktemp("s3") / "d.parquet"
    datasets.Dataset.from_list(records).to_parquet(path, batch_size=5)
    client.upload_file(str(path), "data", "folder/d.parquet")


@pytest.fixture(autouse=True)
def credentials(endpoint, stored, monkeypatch, tmp_path):
    datasets.disable_progress_bars()
    s3fs.S3FileSystem.clear_instance_cache()
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)


def load(path, **data):
    return make_loader(path, packing="pad", shuffle=False, cache_dir=None, **data)


def texts(windows):
    return [bytes(int(i) - 1 for i in batch.ids_BT[0]).decode() for window in windows for batch in window.batches]


@pytest.mark.parametrize("path", ["s3://data/d.jsonl", "s3://data/folder/d.parquet"])
def test_files_and_tables_are_read(path):
    assert texts(load(path).windows(0, 0)) == TEXTS


def test_a_changed_object_is_read_anew(endpoint, tmp_path):
    client = boto3.client("s3", endpoint_url=endpoint)
    for word in ("old", "new"):
        client.put_object(Bucket="data", Key="changing.jsonl", Body=json.dumps({"text": word}).encode())
        s3fs.S3FileSystem.clear_instance_cache()
        loader = make_loader("s3://data/changing.jsonl", cache_dir=str(tmp_path / "cache"))
        assert texts(loader.windows(0, 0)) == [word]
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


@pytest.mark.parametrize("path", ["s3://data/d.jsonl", "s3://data/folder/d.parquet"])
def test_streams_go_on_where_they_were(path):
    whole = load(path, streaming=True, stream_block=4)
    assert texts(islice(whole.windows(0, 0), 7)) == TEXTS[:7]
    again = load(path, streaming=True, stream_block=4)
    again.load_state_dict(json.loads(json.dumps(whole.state_dict(7))))
    assert texts(islice(again.windows(0, 7), 8)) == [*TEXTS[7:], *TEXTS[:3]]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("s3://data/absent.jsonl", r"s3://data/absent.jsonl cannot be read: FileNotFoundError"),
        ("s3://nowhere/d.jsonl", r"s3://nowhere/d.jsonl cannot be read: FileNotFoundError: .*bucket does not exist"),
        ("s3://nowhere/d.parquet", r"s3://nowhere/d.parquet cannot be read: FileNotFoundError"),
    ],
)
def test_what_is_not_there_is_one_line(path, problem):
    with pytest.raises(UserError, match=problem) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_no_credentials_is_one_line(monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=r"NoCredentialsError: .*; set AWS_ACCESS_KEY_ID and") as caught:
        load("s3://data/d.jsonl")
    assert "\n" not in str(caught.value)


def test_no_permission_is_one_line(endpoint):
    def ask_for_credentials_after(requests):
        url = f"{endpoint}/moto-api/reset-auth"
        kind = {"Content-Type": "application/octet-stream"}
        urllib.request.urlopen(urllib.request.Request(url, str(requests).encode(), kind, method="POST")).read()

    ask_for_credentials_after(0)
    try:
        with pytest.raises(UserError, match=r"PermissionError: .*; check the credentials") as caught:
            load("s3://data/d.jsonl")
    finally:
        ask_for_credentials_after(1_000_000)
    assert "\n" not in str(caught.value)


def test_without_s3fs_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"ImportError: .*; pip install s3fs"):
        load("s3://data/d.jsonl")
