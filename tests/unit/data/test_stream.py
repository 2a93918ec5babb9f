"""Streams: rows without end, the same on any number of processes, and from any place again."""

import json
from itertools import islice

import datasets
import pytest

from rwkv_accel.data import record_streams, stream
from rwkv_accel.data.binidx import write_binidx
from rwkv_accel.errors import UserError

from .conftest import make_loader

TEXTS = [f"{index:02d}" + "x" * (index * 7 % 11) for index in range(23)]


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def make_stream(path, *, block=5, **settings):
    return make_loader(path, streaming=True, stream_block=block, cache_dir=None, **{"packing": "pad", **settings})


def text_of(batch):
    """The documents in a batch."""
    ids, borders = batch.ids_BT, batch.cu_seqlens
    if borders is None:
        rows = [row[row != 0] for row in ids.numpy() if row.any()]
    else:
        rows = [ids[0, a:b].numpy() for a, b in zip(borders[:-1], borders[1:])]
    return [bytes(int(i) - 1 for i in row).decode() for row in rows]


def rows_of(loader, number, start=0):
    """Documents of the next windows, window by window."""
    windows = loader.windows(0, start)
    found = [[text for batch in window.batches for text in text_of(batch)] for window in islice(windows, number)]
    windows.close()
    return found


def flat(rows):
    return [text for row in rows for text in row]


@pytest.fixture(params=["jsonl", "txt", "parquet", "csv", "arrow", "hub", "folder", "url"])
def source(request, tmp_path):
    """The texts in every kind of source."""
    records = [{"text": text} for text in TEXTS]
    table, path = datasets.Dataset.from_list(records), tmp_path / f"data.{request.param}"
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if request.param == "jsonl":
        path.write_text("\ufeff" + lines.replace("\n", "\n\n", 3))
    elif request.param == "txt":
        path.write_text("\n\n\n".join(TEXTS))
    elif request.param == "url":
        import fsspec

        with fsspec.open(f"memory://{tmp_path.name}/d.jsonl", "w") as file:
            file.write(lines)
        return f"memory://{tmp_path.name}/d.jsonl"
    elif request.param == "hub":
        # load_dataset treats a folder of files as it does a name on the hub; here of two shards.
        (tmp_path / "repo").mkdir()
        table.select(range(9)).to_parquet(tmp_path / "repo" / "train-0.parquet", batch_size=4)
        table.select(range(9, 23)).to_parquet(tmp_path / "repo" / "train-1.parquet", batch_size=4)
        return f"hub:{tmp_path}/repo"
    elif request.param == "folder":
        table.save_to_disk(path)
    elif request.param == "arrow":
        table.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    else:
        getattr(table, f"to_{request.param}")(path)
    return str(path)


def test_every_pass_reads_every_document_once(source):
    rows = flat(rows_of(make_stream(source), 46))
    assert sorted(rows[:23]) == sorted(rows[23:]) == sorted(TEXTS)
    assert rows[:23] != rows[23:], "shuffled anew"
    assert sorted(rows[:5]) == sorted(TEXTS[:5]), "within blocks"
    assert rows[:5] != TEXTS[:5]
    assert flat(rows_of(make_stream(source, shuffle=False), 46)) == TEXTS * 2


def test_going_on_from_any_row_gives_the_same_rows(source):
    whole, states = make_stream(source), {}
    rows = []
    for position, window in enumerate(islice(whole.windows(0, 0), 33)):
        states[position] = json.dumps(whole.state_dict(position))
        rows.append(text_of(window.batches[0]))
    for position in (0, 1, 4, 5, 6, 13, 22, 23, 24, 29):
        again = make_stream(source)
        again.load_state_dict(json.loads(states[position]))
        assert rows_of(again, 33 - position, position) == rows[position:]


@pytest.fixture
def path(write_jsonl):
    return write_jsonl([{"text": text} for text in TEXTS])


def test_packed_rows_go_on_from_anywhere_on_any_number_of_processes(path):
    trainer = {"global_batch_size": 4}
    settings = {"packing": "pack", "ctx_len": 32}
    whole = make_stream(path, trainer=trainer, **settings)
    windows, states, batches = whole.windows(0, 0), [], []
    for number in range(6):
        batches.append(flat([text_of(batch) for batch in next(windows).batches]))
        states.append(json.dumps(whole.state_dict(4 * (number + 1))))
    assert len(json.loads(states[-1])["chains"]) == 1
    assert any(len(texts) > 5 for texts in batches), "rows hold several documents"
    for done in (0, 1, 3):
        for world_size in (1, 2, 4):
            parts = []
            for rank in range(world_size):
                loader = make_stream(path, rank=rank, world_size=world_size, trainer=trainer, **settings)
                if done:
                    loader.load_state_dict(json.loads(states[done - 1]))
                parts.append([[text_of(b) for b in w.batches] for w in islice(loader.windows(0, 4 * done), 6 - done)])
            together = [[text for micro in zip(*window) for texts in micro for text in texts] for window in zip(*parts)]
            assert together == batches[done:]


def test_going_on_reads_nothing_of_what_has_been(path):
    whole = make_stream(path, shuffle=False)
    assert flat(rows_of(whole, 12)) == TEXTS[:12]
    state = whole.state_dict(12)
    with open(path, "r+b") as file:
        file.write(b"#" * state["chains"][0]["place"]["offset"])
    again = make_stream(path, shuffle=False, on_bad_line="skip")
    again.load_state_dict(json.loads(json.dumps(state)))
    assert flat(rows_of(again, 11, 12)) == TEXTS[12:]


def test_a_source_without_end_is_read_no_further_than_needed(monkeypatch):
    read = []

    def numbers():
        number = 0
        while True:
            read.append(number)
            yield {"text": f"n{number}"}
            number += 1

    monkeypatch.setattr(
        record_streams, "open_table", lambda source, data: datasets.IterableDataset.from_generator(numbers)
    )
    loader = make_stream("hub:numbers", block=8, shuffle=False)
    assert read == list(range(8)), "one block to describe"
    assert flat(rows_of(loader, 20)) == [f"n{number}" for number in range(20)]
    assert len(read) <= 40, "a few rows and one block ahead"


def test_weights_are_shares_of_tokens(write_jsonl):
    paths = (write_jsonl([{"text": "a" * 9}] * 7, "a.jsonl"), write_jsonl([{"text": "b" * 4}] * 11, "b.jsonl"))
    loader = make_stream(paths, weights=(3, 1), block=50)
    rows = flat(rows_of(loader, 200))
    tokens = {name: sum(len(text) + 1 for text in rows if text[0] == name) for name in "ab"}
    assert tokens["a"] / tokens["b"] == pytest.approx(3, rel=0.05)
    state = json.loads(json.dumps(loader.state_dict(200)))
    again = make_stream(paths, weights=(3, 1), block=50)
    again.load_state_dict(state)
    assert rows_of(again, 60, 200) == rows_of(make_stream(paths, weights=(3, 1), block=50), 260)[200:]


def test_sources_without_weights_follow_each_other(write_jsonl):
    paths = tuple(write_jsonl([{"text": f"{name}{i}"} for i in range(3)], f"{name}.jsonl") for name in "ab")
    want = ["a0", "a1", "a2", "b0", "b1", "b2"]
    whole = make_stream(paths, block=2, shuffle=False)
    assert flat(rows_of(whole, 12)) == want * 2
    for position in range(9):
        again = make_stream(paths, block=2, shuffle=False)
        whole = make_stream(paths, block=2, shuffle=False)
        rows_of(whole, position)
        again.load_state_dict(whole.state_dict(position))
        assert flat(rows_of(again, 12 - position, position)) == (want * 2)[position:]


def test_broken_lines_are_named_or_counted(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "one"}\n{"text": \n{"text": "three"}\n')
    with pytest.raises(UserError, match=r"d.jsonl:2: not JSON .*on_bad_line=skip"):
        make_stream(str(path))
    loader = make_stream(str(path), on_bad_line="skip", block=1, shuffle=False)
    assert flat(rows_of(loader, 3)) == ["one", "three", "one"]
    again = make_stream(str(path), on_bad_line="skip", block=1, shuffle=False)
    again.load_state_dict(loader.state_dict(2))
    skipped = f"1 lines skipped, first: {path}:2: not JSON (Expecting value at column 10)"
    assert again.summary(2) == loader.summary(2) == f"data: 2 documents read, {skipped}"
    path.write_text('{"text": "one"}\n{"text": \n')
    late = make_stream(str(path), block=1)
    with pytest.raises(UserError, match=r"d.jsonl:2: not JSON"):
        rows_of(late, 3)


def test_what_is_cut_or_left_out_is_counted_over_all_blocks(write_jsonl):
    path = write_jsonl([{"text": "x" * length} for length in (3, 20, 4, 0, 30, 5)])
    loader = make_stream(path, block=2, ctx_len=16, overlong="truncate")
    assert len(flat(rows_of(loader, 5))) == 5
    again = make_stream(path, block=2, ctx_len=16, overlong="truncate")
    again.load_state_dict(loader.state_dict(4))
    assert again.summary(4) == (
        "data: 4 documents read, 1 longer than 16 tokens and truncated, 1 documents or pieces without a target left out"
    )
    assert loader.summary(5) == (
        "data: 6 documents read, 2 longer than 16 tokens and truncated, 1 documents or pieces without a target left out"
    )
    assert make_loader(path).summary(3) == ""


def test_streams_that_give_nothing(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no documents"):
        make_stream(str(path))
    path.write_text('{"text": "far too long for a row"}\n')
    monkeypatch.setattr(stream, "FRUITLESS_DOCUMENTS", 5)
    with pytest.raises(UserError, match=r"none of 5 documents, .*d.jsonl:1, has a target within data.ctx_len 8"):
        make_stream(str(path), ctx_len=8, overlong="drop")
    with pytest.raises(UserError, match=r"world .* gives token .* only 257 embedding rows"):
        make_stream(str(path), tokenizer="world")
    write_binidx(tmp_path / "b.bin", [[1, 0]])
    with pytest.raises(UserError, match=r"memory-mapped and needs no streaming; set data.streaming=false"):
        make_stream(str(tmp_path / "b.bin"))
    with pytest.raises(UserError, match=r"absent.parquet cannot be read: FileNotFoundError"):
        make_stream("memory://absent.parquet")


def test_description_and_length(path):
    loader = make_stream(path, packing="pack", ctx_len=64, block=10)
    assert loader.describe().splitlines() == [
        "data: a stream, read 10 documents at a time; this is the first block",
        "data: 10 documents, 81 tokens, 71 of them targets; 2 packed rows of up to 64 tokens, 44.5% of them unused",
    ]
    assert loader.total_steps(1, 70) == 70
    assert make_loader(path).state_dict(3) is None


def test_with_max_documents_it_is_read_first(path):
    loader = make_loader(path, streaming=True, max_documents=4, packing="pad")
    assert loader.rows_per_epoch == 4
