"""The data section of a recipe -> tokenised stores, read from their cache where there is one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from rwkv_accel.config.schema import DataConfig
from rwkv_accel.data.binidx import open_binidx
from rwkv_accel.data.cache import content_digest, fingerprint, make_once
from rwkv_accel.data.documents import Document, DocumentReader, ReadReport
from rwkv_accel.data.sources import Record, Source, find_sources, read_records, remote_identity
from rwkv_accel.data.store import DocumentStore, build_store, open_store, store_of_binidx
from rwkv_accel.data.tokenizer import Tokenizer
from rwkv_accel.progress import progress

CACHE_MIN_BYTES = 32 << 20
REPORT = "report.json"
SCANNED_TOKENS = 1 << 24
# Settings that the tokens of a document depend on, beside content and tokenizer.
READ_KEYS = (
    "split", "subset", "text_column", "messages_column", "prompt_column", "response_column", "template",
    "target_roles", "target_turns", "thinking", "max_documents", "on_bad_line",
)  # fmt: skip

RunFirst = Callable[[Callable[[], object]], object]


@dataclass(frozen=True)
class Corpus:
    """One store of documents: the paths that are read one after the other, or one binidx."""

    name: str
    store: DocumentStore
    report: ReadReport
    identity: str | None
    """Names content and settings; None for data too small to be worth a cache."""


def open_corpora(data: DataConfig, tokenizer: Tokenizer, run_first: RunFirst) -> list[Corpus]:
    """Stores of all paths: one per path if they are mixed by weights, else one per run of textual paths.

    run_first: calls its argument on one process of each node before it returns on the others.
    """
    groups: list[list[Source]] = []
    for source in find_sources(data):
        joins = groups and data.weights is None and not source.is_binidx and not groups[-1][-1].is_binidx
        groups[-1].append(source) if joins else groups.append([source])
    corpora: list[Corpus] = []
    budget = data.max_documents
    for group in groups:
        corpus = _open_group(group, data, tokenizer, budget, run_first)
        corpora.append(corpus)
        if budget is not None and data.weights is None:
            budget -= corpus.store.num_documents
            if budget == 0:
                break
    return corpora


def read_documents(data: DataConfig, tokenizer: Tokenizer, report: ReadReport) -> Iterator[Document]:
    """Documents of all paths one by one, in their order. Raises UserError for a record that cannot be used."""
    reader = DocumentReader(data, tokenizer)

    def each() -> Iterator[Document]:
        for source in find_sources(data):
            if source.is_binidx:
                yield from _binidx_documents(source)
            else:
                yield from reader.documents(_records([source], data), report)

    return islice(each(), data.max_documents)


def _binidx_documents(source: Source) -> Iterator[Document]:
    binidx = open_binidx(source.path)
    for number in progress(range(len(binidx.offsets) - 1), f"reading {binidx.path.name}", unit="documents"):
        begin, end = int(binidx.offsets[number]), int(binidx.offsets[number + 1])
        ids = binidx.tokens[begin:end].tolist()
        yield Document(f"{source.path} document {number}", ids, [True] * len(ids))


def _open_group(
    group: list[Source], data: DataConfig, tokenizer: Tokenizer, budget: int | None, run_first: RunFirst
) -> Corpus:
    root = Path(data.cache_dir) if data.cache_dir else None
    name = ", ".join(source.path for source in group)
    if group[0].is_binidx:
        binidx = open_binidx(group[0].path)
        store = store_of_binidx(binidx, budget, binidx.highest_token(SCANNED_TOKENS))
        index = binidx.path.with_suffix(".idx")
        return Corpus(name, store, ReadReport(), f"{content_digest(index, root)} {budget}" if root else None)
    limited = data.model_copy(update={"max_documents": budget})

    def build(folder: Path | None) -> tuple[DocumentStore, ReadReport]:
        report = ReadReport()
        records = _records(group, limited)
        documents = islice(DocumentReader(limited, tokenizer).documents(records, report), budget)
        return build_store(documents, tokenizer.vocab_size, folder), report

    def build_in(folder: Path) -> None:
        _, report = build(folder)
        (folder / REPORT).write_text(json.dumps(asdict(report)))

    if root is None or not _is_large(group):
        return Corpus(name, *build(None), identity=None)
    identity = _identity(group, limited, tokenizer, root)
    run_first(lambda: make_once(root / "tokens", identity, build_in))
    folder = make_once(root / "tokens", identity, build_in)
    report = ReadReport(**json.loads((folder / REPORT).read_text()))
    return Corpus(name, open_store(folder), report, identity)


def _is_large(group: list[Source]) -> bool:
    sizes = [sum(file.stat().st_size for file in source.local_files()) for source in group]
    return any(not source.is_local for source in group) or sum(sizes) >= CACHE_MIN_BYTES


def _identity(group: list[Source], data: DataConfig, tokenizer: Tokenizer, root: Path) -> str:
    template = Path(data.template)
    return fingerprint(
        {
            "content": [_content(source, data, root) for source in group],
            "tokenizer": tokenizer.identity,
            "template_file": content_digest(template, root) if template.is_file() else None,
            **{key: getattr(data, key) for key in READ_KEYS},
        }
    )


def _content(source: Source, data: DataConfig, root: Path) -> list[str]:
    if source.is_local:
        return [source.kind, *(content_digest(file, root) for file in source.local_files())]
    return remote_identity(source, data)


def _records(sources: Iterable[Source], data: DataConfig) -> Iterator[Record]:
    for source in sources:
        records = read_records(source, data)
        yield from progress(records, f"tokenising {Path(source.path).name}", unit="documents")
