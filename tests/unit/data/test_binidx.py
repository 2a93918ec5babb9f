"""binidx: byte-exact layout, damage, the published primes."""

import struct

import numpy as np
import pytest

from rwkv_accel.data.binidx import magic_prime, magic_slot, open_binidx, write_binidx
from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.errors import UserError

from .conftest import make_loader

DOCUMENTS = [[5, 6, 0], [65535, 0], [7, 8, 9, 0]]


def test_layout_byte_by_byte(tmp_path):
    assert write_binidx(tmp_path / "x", DOCUMENTS) == (3, 9)
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<9H", 5, 6, 0, 65535, 0, 7, 8, 9, 0)
    assert (tmp_path / "x.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, 3, 4)
        + struct.pack("<3i", 3, 2, 4)
        + struct.pack("<3q", 0, 6, 10)
        + struct.pack("<4q", 0, 1, 2, 3)
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@pytest.mark.parametrize(("dtype", "code", "width"), [(np.uint16, 8, 2), (np.int32, 4, 4)])
def test_round_trip(tmp_path, dtype, code, width):
    write_binidx(tmp_path / "x.bin", DOCUMENTS, dtype)
    assert (tmp_path / "x.idx").read_bytes()[17] == code
    assert (tmp_path / "x.bin").stat().st_size == 9 * width
    for name in ("x", "x.bin", "x.idx"):
        opened = open_binidx(tmp_path / name)
        borders = opened.offsets.tolist()
        assert [opened.tokens[a:b].tolist() for a, b in zip(borders, borders[1:])] == DOCUMENTS
        assert opened.tokens.dtype == dtype


def test_documents_of_several_items(tmp_path):
    # Two items make one document: borders count items, not documents.
    tokens, sizes = [1, 2, 3, 0, 4, 0], [2, 2, 2]
    (tmp_path / "x.bin").write_bytes(struct.pack("<6i", *tokens))
    (tmp_path / "x.idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3)
        + struct.pack("<3i", *sizes) + struct.pack("<3q", 0, 8, 16) + struct.pack("<3q", 0, 2, 3)
    )  # fmt: skip
    assert open_binidx(tmp_path / "x").offsets.tolist() == [0, 4, 6]


def test_name_with_dots_keeps_them(tmp_path):
    write_binidx(tmp_path / "my.v1.bin", DOCUMENTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my.v1.bin", "my.v1.idx"]


def test_token_that_does_not_fit_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="document 1 holds token 70000, too large for uint16; use i32"):
        write_binidx(tmp_path / "x", [[1, 0], [70000, 0]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda b, i: (b[:-1], i), "17 bytes are no whole number of uint16 tokens"),
        (lambda b, i: (b[:-2], i), "item 2 ends at byte 18, but .*x.bin has only 16"),
        (lambda b, i: (b, i[:-1]), "its header announces"),
        (lambda b, i: (b, i[:20]), "does not begin with MMIDIDX"),
        (lambda b, i: (b, b"X" + i[1:]), "does not begin with MMIDIDX"),
        (lambda b, i: (b, i[:9] + b"\x02" + i[10:]), "version 2 with dtype code 8 is not read"),
        (lambda b, i: (b, i[:17] + b"\x06" + i[18:]), "version 1 with dtype code 6 is not read"),
        (lambda b, i: (b, i[:34] + struct.pack("<i", -3) + i[38:]), "item 0 has a negative length"),
        (lambda b, i: (b, i[:46] + struct.pack("<q", 2) + i[54:]), "do not lie back to back"),
        (lambda b, i: (b, i[:-8] + struct.pack("<q", 9)), "borders do not rise from 0 to 3"),
    ],
)
def test_damage_is_named(tmp_path, damage, problem):
    write_binidx(tmp_path / "x", DOCUMENTS)
    files = tmp_path / "x.bin", tmp_path / "x.idx"
    for file, content in zip(files, damage(*(f.read_bytes() for f in files))):
        file.write_bytes(content)
    with pytest.raises(UserError, match=problem):
        open_binidx(tmp_path / "x")


def test_missing_partner(tmp_path):
    write_binidx(tmp_path / "x", DOCUMENTS)
    (tmp_path / "x.idx").unlink()
    with pytest.raises(UserError, match=r"x.idx does not exist; a binidx is name.bin with name.idx"):
        open_binidx(tmp_path / "x.bin")


def test_published_magic_primes():
    # RWKV-LM train_temp: MiniPile with ctx_len 512; the World v3 sample with 4096.
    assert magic_prime(1498226207, 512) == 2926181
    assert magic_prime(332115325534, 4096) == 81082817


def test_published_slots():
    assert [magic_slot(i, 2926181) for i in range(1, 6)] == [1808479, 2763108, 2010037, 1621597, 743938]


def test_prime_is_the_largest_that_permutes_the_slots():
    prime = magic_prime(1000 * 16, 16)
    assert prime == 983  # 991 and 997 are 1 modulo 3
    assert sorted(magic_slot(i, prime) for i in range(1, prime + 1)) == list(range(prime))


def test_too_few_rows_for_a_prime():
    with pytest.raises(UserError, match="30 tokens give 3 rows of ctx_len 10, too few"):
        magic_prime(30, 10)


def flat_binidx(tmp_path, num_tokens=16 * 60):
    write_binidx(tmp_path / "x", [[1 + i % 200 for i in range(num_tokens - 1)] + [0]])
    return str(tmp_path / "x.bin")


def test_magic_prime_sampling_reads_the_official_rows(tmp_path):
    path = flat_binidx(tmp_path)
    tokens = open_binidx(path).tokens
    loader = make_loader(path, sampling="magic_prime", ctx_len=16, trainer={"micro_batch_size": 2})
    assert loader.rows_per_epoch == 59
    for epoch in (0, 1):
        for index, window in enumerate(loader.windows(epoch, 0)):
            (batch,) = window.batches
            first = 1 + epoch * 59 + 2 * index
            slots = [magic_slot(first + i, 59) for i in range(window.num_rows)]
            assert batch.sample_ids == tuple(slots)
            assert batch.ids_BT.tolist() == [tokens[16 * s : 16 * s + 16].tolist() for s in slots]
            assert batch.labels_BT.tolist() == [tokens[16 * s + 1 : 16 * s + 17].tolist() for s in slots]
            assert batch.cu_seqlens is None


def test_magic_prime_needs_a_binidx(write_jsonl):
    with pytest.raises(UserError, match="magic_prime needs a binidx"):
        make_loader(write_jsonl([{"text": "a"}]), sampling="magic_prime")


def test_documents_of_a_binidx_train_without_a_copy(tmp_path):
    write_binidx(tmp_path / "x", [[5, 6, 7, 0], [8, 9, 0]], np.int32)
    loader = make_loader(str(tmp_path / "x"), shuffle=False, ctx_len=8)
    (batch,) = next(loader.windows(0, 0)).batches
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.labels_BT.tolist() == [[6, 7, 0, 9, 0]]
    assert batch.cu_seqlens == (0, 3, 5)
    limited = make_loader(str(tmp_path / "x.idx"), shuffle=False, max_documents=1)
    assert limited.describe().startswith("data: 1 documents, 4 tokens, 3 of them targets; 1 packed rows")


def test_unknown_token_deep_in_a_binidx_is_named_when_it_is_met(tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_accel.data.corpus.SCANNED_TOKENS", 2)
    write_binidx(tmp_path / "x", [[5, 6, 300, 0]])
    loader = make_loader(str(tmp_path / "x"))
    with pytest.raises(UserError, match=r"rows \[0\] hold token 300, the model has 257 embedding rows"):
        list(loader.windows(0, 0))


def test_world_text_survives_binidx(tmp_path):
    tokenizer = build_tokenizer("world")
    texts = ["Hello 你好 😀", "。\n\n", "\x00\x17"]
    write_binidx(tmp_path / "x", [[*tokenizer.encode(t), 0] for t in texts])
    opened = open_binidx(tmp_path / "x")
    borders = opened.offsets.tolist()
    assert [tokenizer.decode(opened.tokens[a:b].tolist()) for a, b in zip(borders, borders[1:])] == texts
