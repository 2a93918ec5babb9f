"""Sources that go through `datasets` and fsspec: tables, saved folders, data sets, URLs."""

import json

import datasets
import fsspec
import pytest

from rwkv_accel.errors import UserError

from .conftest import make_loader

RECORDS = [{"text": f"text {index}"} for index in range(7)]


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def texts(loader):
    rows = [b.ids_BT[0].tolist() for w in loader.windows(0, 0) for b in w.batches]
    return [bytes(i - 1 for i in row).decode() for row in rows]


def load(path, **data):
    return make_loader(path, packing="pad", shuffle=False, cache_dir=None, **data)


WANT = [r["text"] for r in RECORDS]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "json"])
def test_tables(tmp_path, kind):
    table, path = datasets.Dataset.from_list(RECORDS), tmp_path / f"data.{kind}"
    if kind == "arrow":
        table.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    elif kind == "json":
        path.write_text(json.dumps(RECORDS))
    else:
        getattr(table, f"to_{kind}")(path)
    assert texts(load(str(path))) == WANT
    assert texts(load(str(path), max_documents=3)) == WANT[:3]


def test_saved_folders(tmp_path):
    table = datasets.Dataset.from_list(RECORDS)
    table.save_to_disk(tmp_path / "one")
    assert texts(load(str(tmp_path / "one"))) == WANT
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "two")
    assert texts(load(str(tmp_path / "two"))) == WANT
    assert texts(load(str(tmp_path / "two"), split="test")) == WANT[1:2]
    with pytest.raises(UserError, match="no split 'dev', only train, test"):
        load(str(tmp_path / "two"), split="dev")


@pytest.fixture
def hub_folder(tmp_path):
    # load_dataset treats a folder of files as it does a name on the hub.
    (tmp_path / "repo").mkdir()
    datasets.Dataset.from_list(RECORDS).to_parquet(tmp_path / "repo" / "train.parquet")
    return f"hub:{tmp_path}/repo"


def test_data_set_by_name(hub_folder):
    assert texts(load(hub_folder)) == WANT
    assert texts(load(hub_folder, streaming=True, max_documents=2)) == WANT[:2]
    with pytest.raises(UserError, match="cannot be read: ValueError: Unknown split"):
        load(hub_folder, split="nope")


def test_subset_is_the_configuration_of_that_name(tmp_path):
    rows = {"german": WANT[:3], "french": WANT[3:]}
    head = ["---", "configs:"]
    for name, found in rows.items():
        datasets.Dataset.from_dict({"text": found}).to_parquet(tmp_path / f"{name}.parquet")
        head += [f"- config_name: {name}", f"  data_files: {name}.parquet"]
    (tmp_path / "README.md").write_text("\n".join([*head, "---", ""]))
    for name, found in rows.items():
        assert texts(load(f"hub:{tmp_path}", subset=name)) == found


def test_data_set_is_cached(hub_folder, tmp_path):
    settings = {"packing": "pad", "shuffle": False, "cache_dir": str(tmp_path / "cache")}
    assert texts(make_loader(hub_folder, **settings)) == WANT
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1
    assert texts(make_loader(hub_folder, **settings)) == WANT


def test_name_that_cannot_be_reached():
    with pytest.raises(UserError, match="hub:no-such/name cannot be read"):
        make_loader("hub:no-such/name")


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_urls(name, tmp_path):
    content = "".join(json.dumps(r) + "\n" for r in RECORDS) if name == "d.jsonl" else "\n\n\n".join(WANT)
    with fsspec.open(f"memory://{tmp_path.name}/{name}", "w") as file:
        file.write(content)
    url = f"memory://{tmp_path.name}/{name}"
    assert texts(load(url)) == WANT
    cached = make_loader(url, packing="pad", shuffle=False, cache_dir=str(tmp_path / "cache"))
    assert texts(cached) == WANT
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_bad_urls_and_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read: FileNotFoundError"):
        load("memory://absent/d.jsonl")
    with pytest.raises(UserError, match="Protocol not known: foo"):
        load("foo://x/d.jsonl")
    with pytest.raises(UserError, match=r"of a URL only .jsonl, .txt"):
        load("memory://x/d.bin")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"d.parquet cannot be read: ") as caught:
        load(str(tmp_path / "d.parquet"))
    assert "\n" not in str(caught.value)


def test_broken_record_of_a_table_is_named_by_its_row(tmp_path):
    datasets.Dataset.from_list([{"text": "a"}, {"text": None}]).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d.parquet row 2: column 'text' is null; repair it"):
        load(str(tmp_path / "d.parquet"))
    assert texts(load(str(tmp_path / "d.parquet"), on_bad_line="skip")) == ["a"]


def test_tokenised_arrow_keeps_ids_and_labels(tmp_path):
    records = [{"input_ids": [98, 99, 0], "labels": [-100, 99, 0]}, {"input_ids": [100, 0], "labels": [-100, -100]}]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "d.parquet")
    (window,) = load(str(tmp_path / "d.parquet")).windows(0, 0)
    assert window.batches[0].ids_BT.tolist() == [[98, 99]]
    assert window.batches[0].labels_BT.tolist() == [[99, 0]]


def test_token_beyond_the_tokenizer_is_named(tmp_path):
    datasets.Dataset.from_list([{"input_ids": [1, 70000]}]).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d.parquet row 1: token 70000, but the tokenizer has only 257 ids"):
        load(str(tmp_path / "d.parquet"))
