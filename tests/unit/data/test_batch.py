"""The label shift, and the two shapes of a batch, by hand."""

import numpy as np
import torch

from rwkv_accel.data.batch import Piece, dummy_batch, pack_batch, pad_batch


def piece(ids, flags=None):
    return Piece(np.array(ids, np.uint16), None if flags is None else np.array(flags, bool))


def test_packed_batch():
    batch = pack_batch([[piece([5, 6, 7, 0]), piece([8, 9, 0], [0, 0, 1])], [piece([3, 4], [1, 1])]], (11, 12))
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9, 3]]
    assert batch.labels_BT.tolist() == [[6, 7, 0, -100, 0, 4]]
    assert batch.cu_seqlens == (0, 3, 5, 6)
    assert batch.target_rows_R.tolist() == [0, 1, 2, 4, 5]
    assert batch.ids_BT.dtype == batch.labels_BT.dtype == torch.int64
    assert (batch.num_targets, batch.num_tokens, batch.sample_ids) == (5, 6, (11, 12))


def test_padded_batch():
    batch = pad_batch([[piece([5, 6, 0])], [piece([7, 8, 9, 9, 0], [0, 0, 0, 1, 1])]], (4, 2))
    assert batch.ids_BT.tolist() == [[5, 6, 0, 0], [7, 8, 9, 9]]
    assert batch.labels_BT.tolist() == [[6, 0, -100, -100], [-100, -100, 9, 0]]
    assert batch.cu_seqlens is None
    assert batch.target_rows_R.tolist() == [0, 1, 6, 7]
    assert (batch.num_targets, batch.num_tokens, batch.sample_ids) == (4, 6, (4, 2))


def test_dummy_counts_for_nothing():
    for packed in (True, False):
        batch = dummy_batch(packed)
        assert batch.labels_BT.tolist() == [[-100]]
        assert (batch.num_targets, batch.num_tokens, batch.sample_ids) == (0, 0, ())
        assert (batch.cu_seqlens is not None) == packed
