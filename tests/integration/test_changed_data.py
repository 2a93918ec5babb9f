"""A run does not go on in data that is not the data it stopped in."""

import json

import pytest

from tests.helpers import ragged_jsonl


@pytest.fixture
def data(tmp_path):
    return ragged_jsonl(tmp_path / "changing.jsonl", 20)


def other_word(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[7]["a"] = lines[7]["a"][:-1] + "#"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def other_order(path):
    path.write_text("".join(line + "\n" for line in reversed(path.read_text().splitlines())))


def one_more(path):
    path.write_text(path.read_text() + json.dumps({"q": "one", "a": "more"}) + "\n")


def test_a_file_written_anew_with_the_same_text_goes_on(run, data):
    assert run(f"data.path={data}", "trainer.max_steps=2") == 0
    data.write_text(data.read_text())
    assert run(f"data.path={data}", "trainer.max_steps=4") == 0


@pytest.mark.parametrize("change", [other_word, other_order, one_more])
def test_a_changed_file_is_refused(run, data, capfd, change):
    assert run(f"data.path={data}", "trainer.max_steps=2") == 0
    change(data)
    assert run(f"data.path={data}", "trainer.max_steps=4") == 2
    assert "no longer gives the rows that it gave when checkpoint" in capfd.readouterr().err


def test_held_out_documents_cannot_become_others_on_the_way(run, data, capfd):
    assert run(f"data.path={data}", "trainer.max_steps=2", "eval.split_fraction=0.2") == 0
    assert run(f"data.path={data}", "trainer.max_steps=4", "eval.split_fraction=0.4") == 2
    assert "eval.split_fraction was 0.2 and is now 0.4" in capfd.readouterr().err
