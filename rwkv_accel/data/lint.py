"""Faults of a data set that do not stop a run but spoil it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rwkv_accel.config.schema import DataConfig
from rwkv_accel.data.binidx import open_binidx
from rwkv_accel.data.corpus import read_documents
from rwkv_accel.data.documents import Document, ReadReport
from rwkv_accel.data.sources import find_sources
from rwkv_accel.data.template import TURN_END
from rwkv_accel.data.tokenizer import Tokenizer
from rwkv_accel.errors import UserError

# Name -> (explanation, whether it is an error).
KINDS = {
    "broken": ("records that cannot be read", True),
    "no_target": ("documents without a target; nothing is learnt from them", True),
    "unknown_token": ("documents with tokens that the model does not have", True),
    "open_end": ("documents of a binidx that do not end with token 0; the model does not learn to stop there", False),
    "surplus": ("tokens of a binidx that belong to no document; only data.sampling=magic_prime reads them", False),
    "no_end": ("documents whose end of text is not a target; the model does not learn to stop there", False),
    "cut_end": ("documents longer than ctx_len that lose their end (data.overlong)", False),
    "too_long": ("documents longer than ctx_len that are split; the later pieces do not see the earlier", False),
    "empty_reply": ("conversations in which a reply is empty; the model learns to say nothing", False),
    "blank_line": ("conversations with a blank line inside a turn; a reader may take it for the turn's end", False),
    "replacement": ("documents with U+FFFD; text was decoded wrongly before it came here", False),
    "duplicate": ("documents that repeat an earlier one token by token", False),
}


@dataclass
class Finding:
    """How often a fault was found, and where first."""

    count: int = 0
    first: str = ""


def lint(data: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> tuple[int, dict[str, Finding]]:
    """(documents read, findings by name of KINDS, only those that occur). Broken records are counted, not raised.

    Raises:
        UserError: there is nothing to read.
    """
    report, findings, seen = ReadReport(), {kind: Finding() for kind in KINDS}, set()
    num_documents = 0
    for document in read_documents(data.model_copy(update={"on_bad_line": "skip"}), tokenizer, report):
        num_documents += 1
        # 16 bytes per document: a set of a hundred million still fits into memory.
        digest = hashlib.blake2b(np.array(document.ids, np.int64).tobytes(), digest_size=16).digest()
        kinds = [*_faults(document, data, vocab_size, tokenizer.eot_id), *(["duplicate"] if digest in seen else [])]
        seen.add(digest)
        for kind in kinds:
            findings[kind].count += 1
            findings[kind].first = findings[kind].first or document.place
    if not num_documents and not report.num_skipped:
        raise UserError(f"data.path {data.shown_path} holds no documents")
    for source in find_sources(data):
        if source.is_binidx and (surplus := open_binidx(source.path).num_surplus):
            known = findings["surplus"]
            findings["surplus"] = Finding(known.count + surplus, known.first or source.path)
    findings["broken"] = Finding(report.num_skipped, report.first_skipped)
    return num_documents, {kind: finding for kind, finding in findings.items() if finding.count}


def lint_lines(num_documents: int, findings: dict[str, Finding]) -> Iterator[str]:
    """The findings as text, errors first."""
    for kind, finding in sorted(findings.items(), key=lambda item: not KINDS[item[0]][1]):
        text, is_error = KINDS[kind]
        share = (
            f" ({100 * finding.count / num_documents:.1f}%)"
            if num_documents and kind not in ("broken", "surplus")
            else ""
        )
        yield f"{'error' if is_error else 'warning'}: {finding.count:,}{share} {text}; first: {finding.first}"
    if not findings:
        yield f"{num_documents:,} documents, nothing found"


def has_errors(findings: dict[str, Finding]) -> bool:
    return any(KINDS[kind][1] for kind in findings)


def _faults(document: Document, data: DataConfig, vocab_size: int, eot_id: int) -> Iterator[str]:
    if not any(document.is_target[1:]):
        yield "no_target"
    elif document.ids[-1] != eot_id:
        yield "open_end"
    elif not document.is_target[-1]:
        yield "no_end"
    if max(document.ids, default=0) >= vocab_size or min(document.ids, default=0) < 0:
        yield "unknown_token"
    if len(document.ids) - 1 > data.ctx_len:
        yield "too_long" if data.overlong == "split" else "cut_end"
    if len(document.spans) > 1 and any(span.is_target and not span.text.strip() for span in document.spans):
        yield "empty_reply"
    if len(document.spans) > 1 and any(TURN_END in span.text.removesuffix(TURN_END) for span in document.spans):
        yield "blank_line"
    if any("\ufffd" in span.text for span in document.spans):
        yield "replacement"
