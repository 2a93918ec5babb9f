"""How sequences are cut for the Triton kernels: every token in one chunk, every chunk in one piece, in order."""

import pytest
import torch

from rwkv_accel.ops.wkv7 import pieces
from rwkv_accel.ops.wkv7.pieces import build_pieces

CPU = torch.device("cpu")


@pytest.fixture
def wanted(monkeypatch):
    def set_to(programs, least_chunks):
        monkeypatch.setattr(pieces, "WANTED_PROGRAMS", programs)
        monkeypatch.setattr(pieces, "LEAST_CHUNKS", least_chunks)
        build_pieces.cache_clear()

    yield set_to
    build_pieces.cache_clear()


@pytest.mark.parametrize(("programs", "least_chunks"), [(1, 16), (16, 1), (64, 2), (1000, 1)])
@pytest.mark.parametrize(
    ("batch", "num_tokens", "borders"),
    [(1, 1, None), (3, 70, None), (1, 512, None), (1, 300, (0, 3, 200, 216, 300)), (1, 40, tuple(range(41)))],
)
def test_tables_cover_all_tokens_once(batch, num_tokens, borders, programs, least_chunks, wanted):
    wanted(programs, least_chunks)
    tables = build_pieces(batch, num_tokens, borders, 16, 2, CPU)
    edges = borders or tuple(range(0, batch * num_tokens + 1, num_tokens))
    tokens, chunk = [], 0
    for sequence, (first_piece, count) in enumerate(tables.spans_S2.tolist()):
        assert int(tables.last_S[sequence]) == first_piece + count - 1
        at = edges[sequence]
        for first_token, length, first_chunk in tables.pieces_P3[first_piece : first_piece + count].tolist():
            assert (first_token, first_chunk) == (at, chunk)
            for _ in range(-(-length // 16)):
                first, here = tables.chunks_n2[chunk].tolist()
                assert first == at
                assert here == min(16, edges[sequence + 1] - at)
                tokens += range(first, first + here)
                at, chunk = at + here, chunk + 1
            assert at == first_token + length
        assert at == edges[sequence + 1]
    assert chunk == tables.num_chunks
    assert tokens == list(range(batch * num_tokens))


def test_sequences_are_cut_only_where_programs_are_missing(wanted):
    wanted(64, 2)

    def lengths(*arguments):
        return build_pieces(*arguments, 16, 4, CPU).pieces_P3[:, 1].tolist()

    assert lengths(8, 1024, None) == [1024] * 8  # 32 programs: half of those wanted
    assert lengths(7, 1024, None) == [336, 336, 352] * 7  # 448 chunks in 16 pieces: three of at most 28 per row
    assert lengths(1, 1024, None) == [64] * 16
    assert lengths(1, 64, None) == [32, 32]  # no shorter than two chunks
    assert lengths(1, 976, (0, 16, 976)) == [16, *[64] * 15]


def test_long_row_of_the_bench_is_cut_and_the_batch_is_not():
    # 64 heads in slices of 64 values: one program per head and sequence.
    assert not build_pieces(8, 4096, None, 32, 64, CPU).is_cut
    assert build_pieces(1, 32768, None, 32, 64, CPU).num_pieces == 8
