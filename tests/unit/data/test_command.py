"""python -m rwkv_accel.data: what each command prints, writes and returns."""

import json
import subprocess
import sys

import datasets
import pytest

from rwkv_accel.data.__main__ import main
from rwkv_accel.data.binidx import open_binidx, write_binidx

from .conftest import make_loader

BYTE = "data.tokenizer=byte"
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "aé"}]}


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_preview_brackets_the_targets(capsys, write_jsonl):
    path = write_jsonl([{"text": "skipped"}, CHAT, {"text": "\x1b[31m"}])
    code, out, _ = run(capsys, "preview", path, BYTE, "--skip", 1, "-n", 1)
    block = f"{path}:2: 24 tokens, 5 targets\nUser: q\n\nAssistant:⟦ aé<end of text>⟧\n\n"
    assert (code, out) == (0, f"{block}⟦ ⟧: what the loss counts\n")
    out = run(capsys, "preview", path, "--skip", 1, "-n", 1)[1]
    assert "Assistant:⟦ aé<end of text>⟧" in out
    assert "\x1b" not in run(capsys, "preview", path, "--skip", 2)[1]


def test_preview_shows_cut_characters_as_bytes(capsys, tmp_path):
    write_binidx(tmp_path / "x", [[3319, 0, 33155, 65531, 3319, 153, 129]])
    out = run(capsys, "preview", tmp_path / "x.bin")[1]
    assert out.splitlines()[1:3] == ["⟦\\xf0\\x9f<end of text>", "Hello<unknown token 65531>😀⟧"]


def test_preview_in_colour(capsys, write_jsonl):
    out = run(capsys, "preview", write_jsonl([CHAT]), BYTE, "--color", "always")[1]
    assert "\x1b[2mU\x1b[0m\x1b[2;4ms\x1b[0m" in out
    assert "\x1b[1;36m \x1b[0m\x1b[1;32ma\x1b[0m\x1b[1;36mé\x1b[0m" in out


def test_preview_as_a_page(capsys, write_jsonl, tmp_path):
    path = write_jsonl([{"messages": [{"role": "user", "content": "<b>"}, {"role": "assistant", "content": "&"}]}])
    code, out, _ = run(capsys, "preview", path, "--html", tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert (code, out) == (0, f"written to {tmp_path}/p.html\n")
    assert '<span class="t0" title="' in page
    assert 'title="24281">User</span>' in page
    assert "> &amp;</span>" in page
    assert "<b>" not in page
    assert run(capsys, "preview", path, "--html", tmp_path / "no" / "p.html")[0] == 2


def test_lint_finds_everything(capsys, tmp_path):
    def turns(*contents):
        roles = ["user", "assistant"] * 3
        return json.dumps({"messages": [{"role": r, "content": c} for r, c in zip(roles, contents)]})

    lines = [
        turns("q", "a"),
        turns("q", "a"),
        turns("q", "a\n\nb"),
        turns("q"),
        turns("q", "a", "q"),
        json.dumps({"text": "x" * 100}),
        json.dumps({"text": "broken \ufffd"}),
        "nonsense",
    ]
    (tmp_path / "d.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}')
    code, out, _ = run(capsys, "lint", tmp_path / "d.jsonl", BYTE, "data.ctx_len=64", "--vocab-size", 200)
    place = f"first: {tmp_path}/d.jsonl"
    assert code == 1
    assert out.splitlines() == [
        f"error: 2 records that cannot be read; {place}:8: not JSON (Expecting value at column 1)",
        f"error: 1 (14.3%) documents without a target; nothing is learnt from them; {place}:4",
        f"error: 1 (14.3%) documents with tokens that the model does not have; {place}:7",
        f"warning: 1 (14.3%) documents whose end of text is not a target; the model does not learn to stop there; "
        f"{place}:5",
        f"warning: 1 (14.3%) documents longer than ctx_len that are split; the later pieces do not see the earlier; "
        f"{place}:6",
        f"warning: 1 (14.3%) conversations with a blank line inside a turn; a reader may take it for the turn's end; "
        f"{place}:3",
        f"warning: 1 (14.3%) documents with U+FFFD; text was decoded wrongly before it came here; {place}:7",
        f"warning: 1 (14.3%) documents that repeat an earlier one token by token; {place}:2",
    ]
    out = run(capsys, "lint", tmp_path / "d.jsonl", BYTE, "data.ctx_len=64", "data.overlong=truncate")[1]
    assert "documents longer than ctx_len that lose their end" in out


def test_lint_finds_empty_replies(capsys, write_jsonl):
    empty = {"messages": [*CHAT["messages"], {"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}
    path = write_jsonl([CHAT, {"prompt": "q", "completion": ""}, empty, {"prompt": "", "completion": "a"}])
    assert run(capsys, "lint", path, BYTE) == (
        0,
        "warning: 2 (50.0%) conversations in which a reply is empty; the model learns to say nothing; "
        f"first: {path}:2\n",
        "",
    )


def test_lint_of_clean_data(capsys, write_jsonl):
    assert run(capsys, "lint", write_jsonl([CHAT, {"text": "a"}])) == (0, "2 documents, nothing found\n", "")


def test_lint_verifies_a_binidx(capsys, tmp_path):
    write_binidx(tmp_path / "x", [[1, 2, 0], [3, 4], [], [7, 300, 0]])
    with (tmp_path / "x.bin").open("ab") as file:
        file.write(b"\x01\x00\x02\x00")
    code, out, _ = run(capsys, "lint", tmp_path / "x.bin", BYTE)
    first = f"first: {tmp_path}/x.bin"
    assert code == 1
    assert out.splitlines() == [
        f"error: 1 (25.0%) documents without a target; nothing is learnt from them; {first} document 2",
        f"error: 1 (25.0%) documents with tokens that the model does not have; {first} document 3",
        "warning: 1 (25.0%) documents of a binidx that do not end with token 0; the model does not learn to stop "
        f"there; {first} document 1",
        f"warning: 2 tokens of a binidx that belong to no document; only data.sampling=magic_prime reads them; {first}",
    ]


def test_stats(capsys, write_jsonl):
    path = write_jsonl([{"text": "x" * n} for n in (3, 3, 4, 5, 6, 15)])
    code, out, _ = run(capsys, "stats", path, BYTE, "data.ctx_len=8", "--processes", 2)
    full = "█" * 48
    assert code == 0
    assert out.splitlines() == [
        "6 documents, 42 tokens per epoch, 36 of them targets",
        "length in tokens: shortest 4, median 5, 90% 11, 99% 15, longest 16",
        f"        4 - 7         {full} 5",
        f"        8 - 15        {' ' * 48} 0",
        f"       16 - 31        {('█' * 9 + '▋').ljust(48)} 1",
        "pack: 5 rows of up to 8 tokens, 10.0% unused, 3 updates of 2 rows per epoch (this recipe)",
        "pad: 7 rows of up to 8 tokens, 35.7% unused, 4 updates of 2 rows per epoch",
        "1 documents (16.7%) are longer than ctx_len",
    ]


def test_convert_to_binidx_and_back(capsys, write_jsonl, tmp_path):
    path = write_jsonl([{"text": "Hello 你好"}, {"text": "b\n\n"}])
    code, out, _ = run(capsys, "convert", path, tmp_path / "x.bin")
    assert (code, out) == (0, f"2 documents written to {tmp_path}/x.bin\n")
    assert open_binidx(tmp_path / "x").tokens.dtype == "uint16"
    assert run(capsys, "convert", tmp_path / "x.bin", tmp_path / "y.jsonl")[0] == 0
    lines = (tmp_path / "y.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "Hello 你好"}, {"text": "b\n\n"}]


@pytest.mark.parametrize("name", ["x.arrow", "x.parquet"])
def test_convert_to_a_table_keeps_the_mask(capsys, write_jsonl, tmp_path, name):
    datasets.disable_progress_bars()
    path = write_jsonl([CHAT, {"text": "abc"}])
    assert run(capsys, "convert", path, tmp_path / name, BYTE)[:2] == (0, f"2 documents written to {tmp_path}/{name}\n")

    def batches(source):
        return [(b.ids_BT.tolist(), b.labels_BT.tolist()) for w in make_loader(source).windows(0, 0) for b in w.batches]

    assert batches(str(tmp_path / name)) == batches(path)


def test_convert_says_what_is_lost(capsys, write_jsonl, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(CHAT) + "\nbroken\n")
    out = run(capsys, "convert", tmp_path / "d.jsonl", tmp_path / "x.bin", "data.on_bad_line=skip")[1]
    assert out.splitlines()[1:] == [
        "warning: 1 of them have tokens that are no targets; .bin cannot keep that",
        f"1 skipped, first: {tmp_path}/d.jsonl:2: not JSON (Expecting value at column 1)",
    ]


def test_convert_refuses(capsys, write_jsonl, tmp_path):
    path = write_jsonl([{"text": "a"}])
    assert "must end in .bin, .arrow, .parquet, .jsonl" in run(capsys, "convert", path, tmp_path / "x.doc")[2]
    assert "exists; choose another name" in run(capsys, "convert", path, path)[2]
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nbroken')
    assert run(capsys, "convert", tmp_path / "bad.jsonl", tmp_path / "y.jsonl")[0] == 2
    assert run(capsys, "convert", tmp_path / "bad.jsonl", tmp_path / "y.parquet")[0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "data.jsonl"]


def test_a_recipe_is_a_source_too(capsys, write_jsonl, tmp_path):
    path = write_jsonl([{"q": "q", "a": "aé"}])
    (tmp_path / "r.yaml").write_text(
        f"out_dir: x\nmodel: {{init: {{n_layer: 1, n_embd: 64}}}}\n"
        f"data: {{path: {path}, prompt_column: q, response_column: a}}\n"
    )
    assert "Assistant:⟦ aé<end of text>⟧" in run(capsys, "preview", tmp_path / "r.yaml")[1]


def test_mistakes_are_one_line(capsys, tmp_path):
    code, out, err = run(capsys, "preview", tmp_path / "absent.jsonl")
    assert (code, out, err) == (2, "", f"error: data.path {tmp_path}/absent.jsonl does not exist\n")
    assert "unknown key data.ctxlen; did you mean data.ctx_len?" in run(capsys, "stats", "x.jsonl", "data.ctxlen=3")[2]


def test_overrides_may_follow_options(capsys, write_jsonl, tmp_path):
    path = write_jsonl([{"q": "q", "a": "aé"}])
    columns = ("data.prompt_column=q", "data.response_column=a")
    assert "Assistant:⟦ aé<end of text>⟧" in run(capsys, "preview", path, "-n", 1, *columns)[1]
    with pytest.raises(SystemExit):
        run(capsys, "preview", path, "-n", 1, "--colour=never", *columns)
    assert "unrecognized arguments: --colour=never" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(capsys, "convert", path, *columns)
    assert "convert needs the file to write before data.prompt_column=q" in capsys.readouterr().err


def test_unknown_columns_are_named_with_the_keys_to_set(capsys, write_jsonl):
    err = run(capsys, "preview", write_jsonl([{"question": "q", "answer": "a"}]))[2]
    assert "set data.prompt_column=question data.response_column=answer if these are question and reply" in err
    assert "on_bad_line" not in err, "skipping would leave nothing"
    assert "set data.text_column=body\n" in run(capsys, "preview", write_jsonl([{"body": "q", "id": 1}]))[2]
    assert "data.messages_column=chat" in run(capsys, "preview", write_jsonl([{"chat": [], "id": "1"}]))[2]


def test_streams_are_previewed_and_counted_only_in_part(capsys, write_jsonl):
    path = write_jsonl([CHAT] * 9)
    assert run(capsys, "preview", path, "data.streaming=true")[0] == 0
    assert "a stream may have no end: set data.max_documents" in run(capsys, "stats", path, "data.streaming=true")[2]
    out = run(capsys, "stats", path, "data.streaming=true", "data.max_documents=4")[1]
    assert out.startswith("4 documents")


@pytest.mark.parametrize("command", ["preview", "lint", "stats"])
def test_an_empty_file_is_a_mistake(capsys, tmp_path, command):
    (tmp_path / "d.jsonl").write_text("\n")
    code, out, err = run(capsys, command, tmp_path / "d.jsonl")
    assert (code, out, err) == (2, "", f"error: data.path {tmp_path}/d.jsonl holds no documents\n")


def test_preview_beyond_the_end(capsys, write_jsonl):
    assert "holds no documents after these" in run(capsys, "preview", write_jsonl([CHAT]), "--skip", 1)[2]


def test_libraries_do_not_speak_before_the_error(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"")
    command = [sys.executable, "-m", "rwkv_accel.data", "preview", str(tmp_path / "d.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: data.path ")
    assert done.stderr.count("\n") == 1


def test_closed_pipe_is_silent(write_jsonl):
    path = write_jsonl([{"text": "x" * 1000}] * 200)
    command = f"{sys.executable} -m rwkv_accel.data preview {path} {BYTE} -n 200 | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == f"{path}:1: 1001 tokens, 1000 targets\n"
    assert done.stderr == ""
