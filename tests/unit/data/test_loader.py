"""Windows: every row once per epoch, for any number of processes, from any position on."""

import json
import threading

import pytest

from rwkv_accel.config.schema import DataConfig, TrainerConfig
from rwkv_accel.data.loader import build_train_loader
from rwkv_accel.data.packing import Subset
from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.errors import UserError

from .conftest import make_loader


@pytest.fixture
def texts(write_jsonl):
    return write_jsonl([{"text": "x" * (3 + index % 7)} for index in range(23)])


def windows_of(loader, epoch=0, rows_consumed=0):
    """sample_ids of every window, as [[ids of micro-batch 0, ...], ...]."""
    return [[b.sample_ids for b in w.batches] for w in loader.windows(epoch, rows_consumed)]


def global_rows(path, world_size, epoch=0, rows_consumed=0, **kwargs):
    """Rows of each window over all ranks, in the global order of positions."""
    per_rank = [
        windows_of(make_loader(path, rank=r, world_size=world_size, **kwargs), epoch, rows_consumed)
        for r in range(world_size)
    ]
    assert len({len(windows) for windows in per_rank}) == 1
    result = []
    for windows in zip(*per_rank):
        assert len({len(batches) for batches in windows}) == 1
        result.append([i for micro in zip(*windows) for ids in micro for i in ids])
    return result


PAD = {"packing": "pad"}


@pytest.mark.parametrize("world_size", range(1, 9))
def test_ranks_are_disjoint_and_complete(texts, world_size):
    trainer = {"global_batch_size": world_size * 2, "micro_batch_size": 1}
    rows = [i for w in global_rows(texts, world_size, trainer=trainer, **PAD) for i in w]
    assert sorted(rows) == list(range(23))


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (2, 1), (4, 2), (8, 1), (2, 4)])
def test_windows_do_not_depend_on_the_number_of_processes(texts, world_size, micro):
    alone = global_rows(texts, 1, trainer={"global_batch_size": 8}, epoch=3, **PAD)
    trainer = {"global_batch_size": 8, "micro_batch_size": micro}
    assert global_rows(texts, world_size, trainer=trainer, epoch=3, **PAD) == alone
    assert [len(w) for w in alone] == [8, 8, 7]


def test_each_rank_takes_the_agreed_positions(texts):
    trainer = {"global_batch_size": 8, "micro_batch_size": 2}
    loader = make_loader(texts, rank=1, world_size=2, trainer=trainer, shuffle=False, **PAD)
    assert windows_of(loader) == [[(2, 3), (6, 7)], [(10, 11), (14, 15)], [(18, 19), (22,)]]
    other = make_loader(texts, rank=0, world_size=2, trainer=trainer, shuffle=False, **PAD)
    assert windows_of(other) == [[(0, 1), (4, 5)], [(8, 9), (12, 13)], [(16, 17), (20, 21)]]


def test_ragged_tail_has_as_many_micro_batches_on_every_rank(write_jsonl):
    path = write_jsonl([{"text": "abc"}] * 9)
    trainer = {"global_batch_size": 8}
    windows = [list(make_loader(path, rank=r, world_size=4, trainer=trainer, **PAD).windows(0, 0)) for r in range(4)]
    assert [w[1].num_rows for w in windows] == [1, 1, 1, 1]
    assert [[len(b.sample_ids) for b in w[1].batches] for w in windows] == [[1, 0], [0, 0], [0, 0], [0, 0]]
    dummy = windows[3][1].batches[1]
    assert (dummy.num_targets, dummy.num_tokens, dummy.labels_BT.unique().tolist()) == (0, 0, [-100])


ORDERS = [
    PAD,
    {"packing": "pack", "ctx_len": 10},
    {"packing": "bucket"},
    {"packing": "pad", "weights": (1, 2)},
    {"packing": "pack", "ctx_len": 10, "weights": (3, 1)},
]


@pytest.mark.parametrize("data", ORDERS, ids=["pad", "pack", "bucket", "mixture", "packed mixture"])
def test_resume_at_every_position_gives_the_same_rest(texts, write_jsonl, data):
    trainer = {"global_batch_size": 4}
    if "weights" in data:
        texts = (texts, write_jsonl([{"text": "y" * (2 + index % 5)} for index in range(9)], "second.jsonl"))
    whole = global_rows(texts, 1, trainer=trainer, **data)
    flat = [i for w in whole for i in w]
    assert global_rows(texts, 1, trainer=trainer, **data) == whole
    for consumed in range(0, len(flat) + 1):
        for world_size in (1, 2, 4):
            rest = global_rows(texts, world_size, trainer=trainer, rows_consumed=consumed, **data)
            assert [i for w in rest for i in w] == flat[consumed:]
            if consumed % 4 == 0:
                assert rest == whole[consumed // 4 :]


def test_epochs_and_seeds_differ_and_repeat(texts):
    def order(epoch, seed):
        return global_rows(texts, 1, epoch=epoch, trainer={"seed": seed}, **PAD)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(1, 1)
    assert order(0, 1) != order(0, 2)


def test_without_shuffle_the_file_order_is_kept(texts):
    for epoch in (0, 1):
        assert global_rows(texts, 1, epoch=epoch, shuffle=False, **PAD) == [[i] for i in range(23)]


def test_packed_batch_is_the_documents_side_by_side(write_jsonl):
    path = write_jsonl([{"text": "abc"}, {"text": "de"}, {"text": "fghij"}])
    loader = make_loader(path, shuffle=False, ctx_len=6, trainer={"micro_batch_size": 2})
    (window,) = loader.windows(0, 0)
    (batch,) = window.batches
    a, z = 98, 0
    assert batch.ids_BT.tolist() == [[a, a + 1, a + 2, a + 3, a + 4, a + 5, a + 6, a + 7, a + 8, a + 9]]
    assert batch.labels_BT.tolist() == [[a + 1, a + 2, z, a + 4, z, a + 6, a + 7, a + 8, a + 9, z]]
    assert batch.cu_seqlens == (0, 3, 5, 10)
    assert (window.num_rows, batch.sample_ids, batch.num_targets, batch.num_tokens) == (2, (0, 1), 10, 10)


def test_reply_only_targets_of_two_columns(write_jsonl):
    path = write_jsonl([{"q": "1+1?", "a": "2"}])
    loader = make_loader(path, prompt_column="q", response_column="a", ctx_len=64)
    (batch,) = next(loader.windows(0, 0)).batches
    text = bytes(i - 1 for i in batch.ids_BT[0].tolist()).decode()
    assert text == "User: 1+1?\n\nAssistant: 2"
    assert batch.labels_BT[0].tolist() == [-100] * (len(text) - 3) + [33, 51, 0]


def test_messages_column(write_jsonl):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_jsonl([{"id": 1, "chat": messages}])
    (batch,) = next(make_loader(path, messages_column="chat").windows(0, 0)).batches
    assert batch.num_targets == 3


def test_counts_and_steps(texts):
    loader = make_loader(texts, trainer={"global_batch_size": 10}, world_size=2, **PAD)
    assert (loader.rows_per_epoch, loader.windows_per_epoch, loader.global_batch_size) == (23, 3, 10)
    assert loader.micro_batches_per_window == 5
    assert loader.total_steps(4, None) == 12
    assert loader.total_steps(4, 7) == 7
    assert loader.total_steps(1, 70) == 3


def test_describe_tells_what_was_left_out(tmp_path):
    lines = ['{"text": "abcdefgh"}', "broken", '{"text": "ab"}', '{"text": ""}']
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    loader = make_loader(str(tmp_path / "d.jsonl"), ctx_len=4, on_bad_line="skip")
    assert loader.describe().splitlines() == [
        "data: 3 documents, 13 tokens, 10 of them targets; 3 packed rows of up to 4 tokens, 16.7% of them unused",
        "data: 1 documents are longer than 4 tokens and were split",
        "data: 1 documents or pieces without a target were left out",
        f"data: 1 lines skipped, first: {tmp_path}/d.jsonl:2: not JSON (Expecting value at column 1)",
        "data: 3 updates of 1 rows per epoch",
    ]


def test_max_documents_counts_over_all_files(write_jsonl):
    paths = (write_jsonl([{"text": "a"}] * 3, "1.jsonl"), write_jsonl([{"text": "b"}] * 3, "2.jsonl"))
    loader = make_loader(paths, max_documents=4, shuffle=False, **PAD)
    assert [b.ids_BT.tolist() for w in loader.windows(0, 0) for b in w.batches] == [[[98]]] * 3 + [[[99]]]


def test_world_tokens_for_a_byte_model_are_refused(write_jsonl):
    path = write_jsonl([{"text": "Hello"}])
    with pytest.raises(UserError, match=r"world \(65536 ids\) gives token 33155, .* only 257 embedding rows"):
        make_loader(path, tokenizer="world")


def test_batch_size_that_does_not_divide_is_refused_before_reading():
    with pytest.raises(UserError, match=r"global_batch_size 10 is not a multiple .* use 8 or 12"):
        make_loader("/nowhere.jsonl", world_size=2, trainer={"global_batch_size": 10, "micro_batch_size": 2})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "holds no documents"),
        ("\n\n", "holds no documents"),
        (json.dumps({"text": ""}), "none of 1 documents has a target token"),
        (
            json.dumps({"messages": [{"role": "user", "content": "q"}]}),
            "none of 1 documents has a target token",
        ),
        (
            '{"text": "a"}\n{"text": ',
            r"d.jsonl:2: not JSON \(Expecting value at column 10\); repair it, or set data.on_bad_line=skip",
        ),
        ("[1, 2]", "d.jsonl:1: a line must be a JSON object, got list"),
        (
            json.dumps({"txt": "a", "id": 1}),
            "d.jsonl:1: no column 'text' or 'messages', and no known pair; the columns are 'txt', 'id'",
        ),
        (json.dumps({"text": 5}), "d.jsonl:1: column 'text' must hold text, got int"),
        (
            json.dumps({"prompt": None, "completion": "b"}),
            "d.jsonl:1: column 'prompt' is null; repair it, or set data.on_bad_line=skip",
        ),
        (json.dumps({"prompt": "a", "completion": None}), "d.jsonl:1: column 'completion' is null; repair it"),
        (json.dumps({"messages": "hi"}), "d.jsonl:1: messages must be a non-empty list"),
        ('{"text": "\\ud83d"}', "d.jsonl:1: text holds half of a surrogate pair"),
    ],
)
def test_bad_files_give_one_line(tmp_path, content, problem):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(UserError, match=problem) as caught:
        make_loader(str(tmp_path / "d.jsonl"))
    assert "\n" not in str(caught.value)


def test_missing_prompt_column_names_the_columns(write_jsonl):
    path = write_jsonl([{"question": "q", "answer": "a"}])
    with pytest.raises(UserError, match="no column 'prompt'; the columns are 'question', 'answer'"):
        make_loader(path, prompt_column="prompt", response_column="answer")


def test_not_utf8_names_the_byte(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"d.jsonl:2: not UTF-8 \(byte 0xff at 10\)"):
        make_loader(str(tmp_path / "d.jsonl"))
    (tmp_path / "d.txt").write_bytes(b"one\ntwo \xe9\n")
    with pytest.raises(UserError, match=r"d.txt:2: not UTF-8 \(byte 0xe9\)"):
        make_loader(str(tmp_path / "d.txt"))


def test_paths_that_are_no_data_file(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    with pytest.raises(UserError, match=r"does not exist; did you mean .*train.jsonl\?"):
        make_loader(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match="is a folder"):
        make_loader(str(tmp_path))
    (tmp_path / "x.doc").write_text("a")
    with pytest.raises(UserError, match=r"files of kind .doc are not read"):
        make_loader(str(tmp_path / "x.doc"))


def test_everything_too_long_is_refused(write_jsonl):
    path = write_jsonl([{"text": "abcdefgh"}] * 2)
    with pytest.raises(UserError, match=r"no document of it has a target within data.ctx_len 4"):
        make_loader(path, ctx_len=4, overlong="drop")


def test_plain_text_is_cut_at_two_blank_lines(tmp_path):
    (tmp_path / "d.txt").write_bytes("\ufeffone\r\n\r\ntwo\n\n\n\nthree\n".encode())
    loader = make_loader(str(tmp_path / "d.txt"), shuffle=False, **PAD)
    texts = [bytes(i - 1 for i in w.batches[0].ids_BT[0].tolist()).decode() for w in loader.windows(0, 0)]
    assert texts == ["one\n\ntwo", "three"]


def test_a_document_of_ten_megabytes_on_one_line(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "word " * 2_000_000}))
    loader = make_loader(str(tmp_path / "d.jsonl"), tokenizer="world", vocab_size=65536, ctx_len=4096)
    # One document: every token but the first is a target, end of text included.
    num_tokens = len(build_tokenizer("world").encode("word " * 2_000_000)) + 1
    assert sum(b.num_targets for w in loader.windows(0, 0) for b in w.batches) == num_tokens - 1


def test_batches_are_on_the_device(texts):
    loader = make_loader(texts, device="meta")
    batch = next(loader.windows(0, 0)).batches[0]
    assert {batch.ids_BT.device.type, batch.labels_BT.device.type, batch.target_rows_R.device.type} == {"meta"}
    assert isinstance(batch.cu_seqlens, tuple)


def test_windows_are_prepared_ahead_but_not_all_at_once(texts, monkeypatch):
    loader, made = make_loader(texts, **PAD), []
    window = loader._window
    monkeypatch.setattr(loader, "_window", lambda epoch, start: made.append(start) or window(epoch, start))
    stream = loader.windows(0, 0)
    next(stream)
    stream.close()  # waits for the thread
    assert made == [0, 1, 2]
    assert not [t for t in threading.enumerate() if t.name.startswith("data")]


def test_a_mistake_in_the_thread_reaches_the_caller(texts, monkeypatch):
    loader = make_loader(texts, **PAD)
    window = loader._window

    def fail_late(epoch, start):
        if start == 4:
            raise UserError("row 4 is damaged")
        return window(epoch, start)

    monkeypatch.setattr(loader, "_window", fail_late)
    seen = []
    with pytest.raises(UserError, match="row 4 is damaged"):
        seen.extend(loader.windows(0, 0))
    stream = loader.windows(0, 0)
    assert len([next(stream) for _ in range(4)]) == 4


def tokens_by_step(loader, steps):
    """Tokens of each of the first updates, counted from the batches themselves."""
    windows = (w for epoch in range(steps) for w in loader.windows(epoch, 0))
    return [sum(b.num_tokens for b in next(windows).batches) for _ in range(steps)]


@pytest.mark.parametrize("data", [{**PAD}, {"packing": "pack"}, {"packing": "bucket"}], ids=lambda d: str(d))
@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_max_tokens_ends_with_the_update_that_reaches_them(texts, monkeypatch, data, block):
    monkeypatch.setattr("rwkv_accel.data.loader.COUNTED_ROWS", block)
    loader = make_loader(texts, trainer={"global_batch_size": 4}, **data)
    per_step = tokens_by_step(loader, 3 * loader.windows_per_epoch)
    for steps in (1, 2, len(per_step) - 1):
        tokens = sum(per_step[:steps])
        assert loader.total_steps(3, None, tokens) == steps
        assert loader.total_steps(3, None, tokens + 1) == steps + 1
        assert loader.total_steps(3, 1, tokens) == 1
    assert loader.total_steps(3, None, 10**9) == len(per_step)


def test_max_tokens_over_a_mixture(write_jsonl):
    paths = (
        write_jsonl([{"text": "a" * n} for n in range(3, 9)], "1.jsonl"),
        write_jsonl([{"text": "b"}] * 9, "2.jsonl"),
    )
    loader = make_loader(paths, weights=(1, 3), trainer={"global_batch_size": 2}, **PAD)
    per_step = tokens_by_step(loader, 12)
    assert [loader.total_steps(9, None, sum(per_step[:n])) for n in range(1, 13)] == list(range(1, 13))


def test_digest_names_the_rows_whoever_reads_them(write_jsonl, monkeypatch):
    records = [{"q": "why", "a": "word " * n} for n in range(1, 40)]

    def digest(lines, **more):
        path = write_jsonl(lines, f"{len(lines)}.jsonl")
        return make_loader(path, **{"prompt_column": "q", "response_column": "a", **more}).digest

    whole = digest(records)
    assert whole == digest(records, rank=1, world_size=3)
    changed = [*records[:-1], {"q": "why", "a": records[-1]["a"][:-1] + "!"}]
    others = digest(changed), digest(records[:-1]), digest(records, ctx_len=31), digest(records, target_roles=["user"])
    assert len({whole, *others}) == 5
    # Of many tokens a sample is read, the last ones among it.
    monkeypatch.setattr("rwkv_accel.data.rows.SAMPLED_BLOCKS", 2)
    monkeypatch.setattr("rwkv_accel.data.rows.BLOCK_TOKENS", 64)
    assert len({whole, digest(records), digest(changed), digest(records[:-1])}) == 4


def test_a_stream_has_no_digest(texts):
    assert make_loader(texts, streaming=True, trainer={"max_steps": 1}).digest is None


@pytest.mark.parametrize(("limit", "rows"), [(2, 8), (0.5, 12), (0.01, 4), (1.0, 23), (99, 23)])
def test_limit_train_batches_shortens_every_epoch(texts, limit, rows):
    loader = make_loader(texts, trainer={"global_batch_size": 4, "limit_train_batches": limit}, **PAD)
    assert loader.rows_per_epoch == rows
    assert loader.total_steps(3, None) == 3 * -(-rows // 4)
    seen = [[b.sample_ids for w in loader.windows(epoch, 0) for b in w.batches] for epoch in (0, 1)]
    assert sum(map(len, seen[0])) == rows
    assert seen[0] != seen[1]
    if rows < 23:
        assert f"limited to {rows} of 23 rows" in loader.describe()


def test_overfit_batches_repeats_the_first_rows_in_order(texts):
    loader = make_loader(texts, trainer={"global_batch_size": 4, "overfit_batches": 2}, **PAD)
    first, second = ([i for w in loader.windows(e, 0) for b in w.batches for i in b.sample_ids] for e in (0, 1))
    assert first == second == list(range(8))
    with pytest.raises(UserError, match=r"overfit_batches.*data\.weights"):
        make_loader((texts, texts), weights=(1, 1), trainer={"overfit_batches": 1}, **PAD)


def test_a_split_that_leaves_nothing_is_named(write_jsonl):
    path = write_jsonl([{"text": "one"}, {"text": "two"}])
    data, trainer = DataConfig(path=path, tokenizer="byte"), TrainerConfig()
    with pytest.raises(UserError, match=r"eval.split_fraction 0.9 of the 2 documents of .* nothing to train on"):
        build_train_loader(
            data, trainer, rank=0, world_size=1, device="cpu", vocab_size=257, subset=Subset(0.9, 0, held_out=False)
        )
