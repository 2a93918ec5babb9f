"""Which save of a run is its newest, also after a power cut or a hand that removed it."""

import pytest

from rwkv_accel.checkpoint.weights import LATEST_FILE, WEIGHTS_DIR, has_weights, latest_weights
from rwkv_accel.errors import UserError


@pytest.fixture
def saves(tmp_path):
    for name in ("epoch-0001", "epoch-0002"):
        (tmp_path / WEIGHTS_DIR / name).mkdir(parents=True)
    (tmp_path / WEIGHTS_DIR / LATEST_FILE).write_text("epoch-0002\n")
    return tmp_path / WEIGHTS_DIR


def test_the_newest_is_the_one_that_is_named(saves):
    assert has_weights(saves.parent)
    assert latest_weights(saves.parent) == saves / "epoch-0002"


def test_a_run_without_a_save(tmp_path):
    assert not has_weights(tmp_path)
    with pytest.raises(UserError, match=r"holds no saved weights .* let its run finish first"):
        latest_weights(tmp_path)


@pytest.mark.parametrize("name", ["", "epoch-0003\n"])
def test_a_name_that_leads_nowhere_is_no_save(saves, name):
    (saves / LATEST_FILE).write_text(name)
    assert not has_weights(saves.parent)
    with pytest.raises(UserError, match=r"names no save that is there; saves there are: .*epoch-0001, .*epoch-0002$"):
        latest_weights(saves.parent)
