"""The example lines of docs/data.md are what the reader takes them for."""

import json
import re
from pathlib import Path

from rwkv_accel.config.schema import DataConfig
from rwkv_accel.data.documents import DocumentReader
from rwkv_accel.data.tokenizer import build_tokenizer

WORLD = build_tokenizer("world")
PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")


def test_example_lines_read_as_the_page_says():
    lines = re.search(r"```jsonl\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()
    reader = DocumentReader(DataConfig(path="x.jsonl"), WORLD)
    documents = [reader.document("here", json.loads(line)) for line in lines]
    targets = [WORLD.decode(i for i, flag in zip(d.ids, d.is_target) if flag) for d in documents]
    assert targets[1:] == [" 2", " 2", "A whole document, every token of which is learnt.", " 2", " 2", " 2"]
    assert (documents[0].ids, documents[0].is_target) == ([24281, 59, 308, 0], [False, False, True, True])
    records = [json.loads(line) for line in lines]
    for document, first, second in zip(documents, records, records[1:]):
        others = {name: value for name, value in second.items() if name != "system"}  # which joins any turns
        if not set(first) & set(others):
            assert reader.document("here", {**others, **first}).ids == document.ids, "the first that fits is taken"


def test_every_key_is_explained():
    missing = [name for name in DataConfig.model_fields if not re.search(rf"\b{name}\b", PAGE)]
    assert missing == []


def test_official_form():
    form = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)[1].strip()
    roles = {"system": "Be brief.", "user": "1+1?", "assistant": "2"}
    messages = [{"role": role, "content": content} for role, content in roles.items()]
    spans = DocumentReader(DataConfig(path="x.jsonl"), WORLD).document("here", {"messages": messages}).spans
    assert "".join(span.text for span in spans) + "<end of text>" == form
