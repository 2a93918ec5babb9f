"""Names of validation files in logs and trackers: short, and one for each."""

import pytest

from rwkv_accel.data.sources import set_names
from rwkv_accel.errors import UserError


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/d/code/valid.jsonl", "test.jsonl"], ["valid", "test"]),
        (["/d/code/valid.jsonl", "/d/chat/valid.jsonl"], ["code/valid", "chat/valid"]),
        (["/a/x/valid.jsonl", "/b/x/valid.jsonl", "/b/y/valid.jsonl"], ["a/x/valid", "b/x/valid", "y/valid"]),
        (["valid.jsonl", "b/valid.jsonl"], ["valid", "b/valid"]),
        (["d/valid.jsonl", "d/valid.parquet"], ["d/valid.jsonl", "d/valid.parquet"]),
    ],
)
def test_as_many_folders_as_tell_files_apart(paths, names):
    assert set_names(paths) == names


def test_a_file_given_twice_is_refused():
    with pytest.raises(UserError, match=r"^b\.jsonl is given twice in the eval section; name it once$"):
        set_names(["a.jsonl", "b.jsonl", "b.jsonl"])
