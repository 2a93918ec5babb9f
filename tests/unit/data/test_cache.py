"""The token cache: built once, found again, never stale; equal to what is made in memory."""

import os
from pathlib import Path

import numpy as np
import pytest

from rwkv_accel.data import cache, corpus, rows
from rwkv_accel.errors import UserError

from .conftest import make_loader

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "aé"}]}


@pytest.fixture
def always_cached(monkeypatch, tmp_path):
    """Cache tiny data too; returns a loader factory with a cache folder of its own."""
    monkeypatch.setattr(corpus, "CACHE_MIN_BYTES", 0)
    monkeypatch.setattr(rows, "CACHE_MIN_DOCUMENTS", 0)

    def make(path, **data):
        return make_loader(path, cache_dir=str(tmp_path / "cache"), **data)

    return make


def folders(tmp_path, kind):
    root = tmp_path / "cache" / kind
    return sorted(p.name for p in root.iterdir()) if root.exists() else []


def batches_of(loader):
    return [
        (b.ids_BT.tolist(), b.labels_BT.tolist(), b.cu_seqlens, b.sample_ids)
        for w in loader.windows(0, 0)
        for b in w.batches
    ]


@pytest.mark.parametrize("records", [[{"text": "abc" * i} for i in range(1, 9)], [CHAT] * 5 + [{"text": "xyz"}]])
def test_cached_equals_in_memory(always_cached, write_jsonl, tmp_path, records):
    path = write_jsonl(records)
    plain = make_loader(path, cache_dir=None)
    built, found = always_cached(path), always_cached(path)
    assert batches_of(plain) == batches_of(built) == batches_of(found)
    assert plain.describe() == built.describe() == found.describe()
    assert len(folders(tmp_path, "tokens")) == len(folders(tmp_path, "rows")) == 1


def test_a_second_start_reads_no_text(always_cached, write_jsonl, monkeypatch):
    path = write_jsonl([{"text": "abc"}])
    want = batches_of(always_cached(path))
    monkeypatch.setattr(corpus, "read_records", lambda *_: pytest.fail("tokenised again"))
    assert batches_of(always_cached(path)) == want


def test_flushing_to_disk_changes_nothing(always_cached, write_jsonl, monkeypatch):
    monkeypatch.setattr("rwkv_accel.data.store.FLUSH_TOKENS", 10)
    path = write_jsonl([{"text": "abcd" * i} for i in range(1, 9)] + [CHAT])
    assert batches_of(always_cached(path)) == batches_of(make_loader(path, cache_dir=None))


@pytest.mark.parametrize(
    "change",
    [
        {"text_column": "other"},
        {"max_documents": 2},
        {"target_roles": ("user",)},
        {"thinking": "drop"},
        {"template": "raw"},
        {"on_bad_line": "skip"},
    ],
)
def test_settings_that_change_tokens_make_a_new_cache(always_cached, write_jsonl, tmp_path, change):
    path = write_jsonl([{"text": "abc", "other": "de"}] * 3)
    always_cached(path)
    always_cached(path, **change)
    assert len(folders(tmp_path, "tokens")) == 2


def test_content_tokenizer_and_code_make_a_new_cache(always_cached, write_jsonl, tmp_path, monkeypatch):
    path = write_jsonl([{"text": "abc"}])
    always_cached(path)
    always_cached(path, tokenizer="world", vocab_size=65536)
    assert len(folders(tmp_path, "tokens")) == 2
    stat = os.stat(path)
    Path(path).write_text('{"text": "abd"}\n')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert batches_of(always_cached(path))[0][0] == [[98, 99, 101]]
    assert len(folders(tmp_path, "tokens")) == 3
    monkeypatch.setattr(cache, "code_version", lambda: "newer")
    always_cached(path)
    assert len(folders(tmp_path, "tokens")) == 4


def test_same_content_elsewhere_is_found(always_cached, write_jsonl, tmp_path):
    always_cached(write_jsonl([{"text": "abc"}], "a.jsonl"))
    always_cached(write_jsonl([{"text": "abc"}], "b.jsonl"))
    assert len(folders(tmp_path, "tokens")) == 1


def test_jinja_file_belongs_to_the_fingerprint(always_cached, write_jsonl, tmp_path):
    path, template = write_jsonl([CHAT]), tmp_path / "t.jinja"
    body = "{% for m in messages %}{{ m.content }}@{% endfor %}"
    template.write_text(body.replace("@", ""))
    always_cached(path, template=str(template))
    template.write_text(body)
    always_cached(path, template=str(template))
    assert len(folders(tmp_path, "tokens")) == 2


def test_rows_are_planned_per_setting(always_cached, write_jsonl, tmp_path):
    path = write_jsonl([{"text": "abc" * i} for i in range(1, 9)])
    for settings in ({}, {"ctx_len": 8}, {"packing": "pad"}, {"overlong": "drop"}, {"shuffle": False}):
        loader = always_cached(path, **settings)
        assert loader.describe() == make_loader(path, cache_dir=None, **settings).describe()
    assert len(folders(tmp_path, "rows")) == 5
    assert len(folders(tmp_path, "tokens")) == 1


def test_failed_build_leaves_nothing(always_cached, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "abc"}\nbroken\n')
    with pytest.raises(UserError, match=r"d.jsonl:2"):
        always_cached(str(tmp_path / "d.jsonl"))
    assert folders(tmp_path, "tokens") == []


def test_skipped_lines_are_reported_from_the_cache_too(always_cached, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "abc"}\nbroken\n')
    first, second = (always_cached(str(tmp_path / "d.jsonl"), on_bad_line="skip").describe() for _ in range(2))
    assert first == second
    assert "1 lines skipped" in first


def test_one_process_builds_and_the_others_find_it(always_cached, write_jsonl, monkeypatch):
    path, calls = write_jsonl([{"text": "abc"}]), []

    def run_first(action):
        calls.append("build")
        action()
        # From here on this is another process: it must not tokenise.
        monkeypatch.setattr(corpus, "read_records", lambda *_: pytest.fail("tokenised again"))

    always_cached(path, run_first=run_first)
    assert calls == ["build", "build"]  # tokens, then rows


def test_two_builders_at_once_do_no_harm(tmp_path):
    def build(folder):
        (folder / "x").write_text("1")
        if not (tmp_path / "root" / "name").exists():
            cache.make_once(tmp_path / "root", "name", lambda f: (f / "x").write_text("2") and None)

    with pytest.MonkeyPatch.context() as patch:
        pids = iter(range(100))
        patch.setattr(cache.os, "getpid", lambda: next(pids))
        final = cache.make_once(tmp_path / "root", "name", build)
    assert (final / "x").read_text() == "2"
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["name"]


def test_leftovers_of_killed_builders_are_removed_when_old(tmp_path):
    for name, age in (("old.host.1.tmp", 30 * 24 * 3600), ("new.host.2.tmp", 0)):
        (tmp_path / name).mkdir()
        then = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (then, then))
    cache.make_once(tmp_path, "x", lambda folder: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.host.2.tmp", "x"]


def test_cache_that_cannot_be_written_is_one_line(write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CACHE_MIN_BYTES", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache_dir .* cannot be written .*; choose another, or null"):
        make_loader(write_jsonl([{"text": "abc"}]), cache_dir=str(tmp_path / "file" / "sub"))


def test_small_data_is_not_cached(write_jsonl, tmp_path):
    make_loader(write_jsonl([{"text": "abc"}]), cache_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_arrays_come_from_the_disk(always_cached, write_jsonl):
    loader = always_cached(write_jsonl([CHAT] * 3))
    (source,) = loader._sources
    for array in (source.store.ids, source.store.is_target, source.store.offsets, source.plan.row_offsets):
        assert isinstance(array, np.memmap)


def test_digest_is_remembered(tmp_path, monkeypatch):
    file = tmp_path / "f"
    file.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert cache.content_digest(file, tmp_path / "root") == known
    memo = next((tmp_path / "root" / "digests").iterdir())
    memo.write_text("0" * 64)
    assert cache.content_digest(file, tmp_path / "root") == "0" * 64
    memo.write_text("torn")
    assert cache.content_digest(file, tmp_path / "root") == known
