"""JSONL in, JSONL out: complete or not there, the same after a stop, and clear about broken lines."""

import json

import pytest

from rwkv_accel.errors import UserError
from rwkv_accel.generation.engine import TextGenerator
from rwkv_accel.generation.jobs import run_job
from rwkv_accel.generation.params import SamplingParams

PARAMS = SamplingParams(max_new_tokens=8, seed=5)


def plain(prompt: str, raw: bool) -> str:
    return prompt if raw else f"<{prompt}>"


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + "\n", encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


RECORDS = [
    {"prompt": "one", "id": 7},
    {"prompt": "two", "temperature": None, "max_new_tokens": 3},
    {"prompt": "three", "raw": True, "seed": 99},
    {"prompt": "four", "stop_set": "line", "stop_ids": [0, 5]},
    {"prompt": "five", "ban_ids": [0]},
]


def expected(generator):
    def one(prompt, **settings):
        settings = {"max_new_tokens": 8, "stop": (), **settings}
        return generator.generate([prompt], **settings)[0]

    return [
        one("<one>", seed=5),
        one("<two>", temperature=None, max_new_tokens=3),
        one("three", seed=99),
        one("<four>", seed=8, stop=("\n",), stop_ids=(0, 5)),
        one("<five>", seed=9, ban_ids=(0,)),
    ]


def test_job_answers_every_line_in_order(generator, tmp_path):
    source, target = write(tmp_path / "in.jsonl", RECORDS), tmp_path / "out.jsonl"
    assert run_job(generator, source, target, PARAMS, plain) == 5
    results = read(target)
    for record, result, want in zip(RECORDS, results, expected(generator)):
        assert {k: result[k] for k in record} == record
        assert (result["text"], result["stop_reason"]) == (want.text, want.stop_reason)
        assert (result["num_tokens"], result["num_prompt_tokens"]) == (len(want.ids), want.num_prompt_tokens)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


class StopsAfter(TextGenerator):
    """Is interrupted when the given number of requests is done."""

    completions = 0

    def run(self, requests):
        for piece in super().run(requests):
            self.completions += piece.completion is not None
            if self.completions == 2:
                self.interrupted = True
            yield piece


def test_an_interrupted_job_goes_on_and_gives_the_same_file(byte_model, byte_tokenizer, generator, tmp_path):
    source = write(tmp_path / "in.jsonl", RECORDS)
    whole, target = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run_job(generator, source, whole, PARAMS, plain)
    stopping = StopsAfter(byte_model, byte_tokenizer, batch_size=1)
    assert run_job(stopping, source, target, PARAMS, plain) == 2
    assert not target.exists()
    part = tmp_path / "out.jsonl.tmp"
    part.write_bytes(part.read_bytes() + b'[4, {"prompt": "fi')  # killed while writing
    again = StopsAfter(byte_model, byte_tokenizer, batch_size=1)
    again.completions = 1
    assert run_job(again, source, target, PARAMS, plain) == 3
    counting = StopsAfter(byte_model, byte_tokenizer, batch_size=1)
    counting.completions = -100
    assert run_job(counting, source, target, PARAMS, plain) == 5
    assert counting.completions == -98
    assert target.read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_unfinished_results_of_another_input_are_not_mixed_in(byte_model, byte_tokenizer, generator, tmp_path):
    target = tmp_path / "out.jsonl"
    stopping = StopsAfter(byte_model, byte_tokenizer, batch_size=1)
    run_job(stopping, write(tmp_path / "a.jsonl", RECORDS), target, PARAMS, plain)
    other = write(tmp_path / "b.jsonl", [{"prompt": "other"}])
    with pytest.raises(UserError, match="unfinished results of another input"):
        run_job(generator, other, target, PARAMS, plain)


@pytest.mark.parametrize("other", [{"model_id": "other"}, {"raw": True}, {"params": SamplingParams(seed=5)}])
def test_unfinished_results_of_another_model_or_settings_are_not_mixed_in(byte_model, byte_tokenizer, tmp_path, other):
    source, target = write(tmp_path / "a.jsonl", RECORDS), tmp_path / "out.jsonl"
    run_job(StopsAfter(byte_model, byte_tokenizer, batch_size=1), source, target, PARAMS, plain, model_id="one")
    again = {"params": PARAMS, "prepare": plain, "model_id": "one", **other}
    with pytest.raises(UserError, match="unfinished results of another model or of other settings"):
        run_job(StopsAfter(byte_model, byte_tokenizer, batch_size=1), source, target, **again)


def test_the_questions_are_not_written_over(generator, tmp_path):
    source = write(tmp_path / "in.jsonl", RECORDS)
    before = source.read_bytes()
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match="give another --output"):
        run_job(generator, source, tmp_path / "sub" / ".." / "in.jsonl", PARAMS, plain)
    assert source.read_bytes() == before


def test_one_stop_text_is_one_text(generator, tmp_path):
    (free,) = generator.generate(["<one>"], max_new_tokens=8, temperature=None, stop=())
    records = [{"prompt": "one", "stop": free.text + "|", "temperature": None}]
    run_job(generator, write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl", PARAMS, plain)
    assert free.text
    assert read(tmp_path / "out.jsonl")[0]["text"] == free.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"in.jsonl:2: not valid JSON"),
        ('{"prompt": ""}', r'in.jsonl:2: needs a non-empty "prompt"'),
        ('["prompt"]', r'in.jsonl:2: needs a non-empty "prompt"'),
        ('{"prompt": "a", "text": "b"}', r"in.jsonl:2: the key text is written by this program"),
        ('{"prompt": "a", "top_p": 0}', r"prompt 2 \('a'\): top_p 0 is out of range"),
        ('{"prompt": "a", "temperature": "hot"}', r"prompt 2 \('a'\): temperature 'hot' is not a number"),
        ('{"prompt": "a", "max_new_tokens": 2.5}', r"max_new_tokens 2.5 is not a whole number"),
        ('{"prompt": "a", "max_new_tokens": true}', r"max_new_tokens True is not a whole number"),
        ('{"prompt": "a", "stop": ["x", 3]}', r"stop \['x', 3\] is not a text or a list of texts"),
        ('{"prompt": "a", "ban_ids": ["x"]}', r"ban_ids \['x'\] is not a token id"),
        ('{"prompt": "a", "raw": "false"}', r"raw 'false' is not true or false"),
        ('{"prompt": "a", "stop_set": 3}', r"stop_set 3 is not a name"),
        ('{"prompt": "a", "stop_set": "chatt"}', r"unknown stop 'chatt'"),
    ],
)
def test_broken_lines_are_named_before_anything_is_generated(generator, tmp_path, line, message):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        run_job(generator, source, tmp_path / "out.jsonl", PARAMS, plain)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_missing_and_empty_inputs(generator, tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        run_job(generator, tmp_path / "none", tmp_path / "out", PARAMS, plain)
    with pytest.raises(UserError, match="has no lines"):
        run_job(generator, write(tmp_path / "empty", []), tmp_path / "out", PARAMS, plain)
