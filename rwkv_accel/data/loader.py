"""TrainLoader: the rows of an epoch in global windows, of which each process takes its share.

The order of rows depends on (seed, epoch, position) alone, never on the number of processes, so a run resumes
at any position in O(1), also on another number of processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from rwkv_accel.config.base import share_of
from rwkv_accel.config.schema import DataConfig, TrainerConfig
from rwkv_accel.data.batch import Batch, dummy_batch, pack_batch, pad_batch
from rwkv_accel.data.binidx import open_binidx
from rwkv_accel.data.corpus import Corpus, RunFirst, open_corpora
from rwkv_accel.data.documents import ReadReport
from rwkv_accel.data.packing import Subset
from rwkv_accel.data.rows import FlatRows, PlannedRows, RowSource, digest_rows, highest_token, plan_corpus
from rwkv_accel.data.sampler import (
    BucketOrder,
    FileOrder,
    MagicPrimeOrder,
    MixtureOrder,
    RowOrder,
    ShuffledOrder,
)
from rwkv_accel.data.sources import find_sources
from rwkv_accel.data.stream import ENDLESS, StreamRows
from rwkv_accel.data.tokenizer import Tokenizer, build_tokenizer
from rwkv_accel.errors import UserError

PREFETCHED_WINDOWS = 2
COUNTED_ROWS = 1 << 16
"""Rows whose tokens are counted at a time."""


@dataclass(frozen=True)
class Window:
    """One optimizer update: this process's micro-batches, and the rows that all processes together take."""

    batches: list[Batch]
    num_rows: int


class TrainLoader:
    """Windows of an epoch for one process."""

    def __init__(
        self,
        sources: Sequence[RowSource],
        order: RowOrder,
        data: DataConfig,
        trainer: TrainerConfig,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        vocab_size: int,
        description: Sequence[str] = (),
    ) -> None:
        self.micro_batches_per_window = trainer.micro_batches(world_size)
        self.global_batch_size = self.micro_batches_per_window * trainer.micro_batch_size * world_size
        limit = trainer.limit_train_batches if trainer.overfit_batches is None else trainer.overfit_batches
        num_windows = share_of(limit, -(-order.rows_per_epoch // self.global_batch_size))
        self.rows_per_epoch = min(order.rows_per_epoch, num_windows * self.global_batch_size)
        self._sources, self._order, self._description = sources, order, description
        self._stream = sources[0] if isinstance(sources[0], StreamRows) else None
        self._first_rows = np.cumsum([0, *(source.num_rows for source in sources)])
        self._packed = data.packing == "pack" and data.sampling == "documents"
        self._micro_batch_size, self._vocab_size = trainer.micro_batch_size, vocab_size
        self._rank, self._world_size, self._device = rank, world_size, device

    @property
    def windows_per_epoch(self) -> int:
        return -(-self.rows_per_epoch // self.global_batch_size)

    @cached_property
    def digest(self) -> str | None:
        """Names what the rows hold, on any number of processes; None for a stream, of which nobody has seen the end."""
        known = [source for source in self._sources if isinstance(source, (PlannedRows, FlatRows))]
        return digest_rows(known) if known else None

    def total_steps(self, max_epochs: int, max_steps: int | None, max_tokens: int | None = None) -> int:
        """Optimizer updates of the whole run. Known before it begins, also for a number of tokens."""
        steps = max_epochs * self.windows_per_epoch
        steps = steps if max_steps is None else min(steps, max_steps)
        return steps if max_tokens is None else self._steps_of_tokens(max_tokens, steps)

    def windows(self, epoch: int, rows_consumed: int) -> Generator[Window, None, None]:
        """The windows of an epoch that follow its first rows_consumed rows; the last one may be short.

        A thread of its own prepares the next windows while one is trained on.
        """
        assert 0 <= rows_consumed <= self.rows_per_epoch
        ahead: deque[Future[Window]] = deque()
        with self._at(rows_consumed), ThreadPoolExecutor(1, thread_name_prefix="data") as worker:
            for start in range(rows_consumed, self.rows_per_epoch, self.global_batch_size):
                ahead.append(worker.submit(self._window, epoch, start))
                if len(ahead) > PREFETCHED_WINDOWS:
                    if self._stream:
                        self._stream.forget(start - PREFETCHED_WINDOWS * self.global_batch_size)
                    yield self._on_device(ahead.popleft().result())
            while ahead:
                yield self._on_device(ahead.popleft().result())

    def state_dict(self, rows_consumed: int) -> dict[str, Any] | None:
        """What a stream needs, beside the position, to go on from it; None where the position is all. JSON-ready."""
        return self._stream.state_dict(rows_consumed) if self._stream else None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if self._stream:
            assert state is not None, "the checkpoint holds no place in the stream"
            self._stream.load_state_dict(state)

    def documents(self, row: int) -> list[int]:
        """Which documents, in the order of reading (`data preview --skip`), are in a row; empty for other data."""
        index = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        source, local = self._sources[index], row - int(self._first_rows[index])
        if not isinstance(source, PlannedRows):
            return []
        before = sum(s.store.num_documents for s in self._sources[:index] if isinstance(s, PlannedRows))
        return [before + document for document in source.documents(local)]

    def summary(self, rows_consumed: int) -> str:
        """What a stream has read and left out so far; empty for data that describe() knows as a whole."""
        return self._stream.summary(rows_consumed) if self._stream else ""

    def describe(self) -> str:
        """Documents, tokens, rows, unused share of the rows, and everything that was left out or cut."""
        if self._stream:
            return "\n".join(self._description)
        updates = f"data: {self.windows_per_epoch:,} updates of {self.global_batch_size} rows per epoch"
        if self.rows_per_epoch < self._order.rows_per_epoch:
            updates += f", limited to {self.rows_per_epoch:,} of {self._order.rows_per_epoch:,} rows"
        return "\n".join([*self._description, updates])

    @contextmanager
    def _at(self, row: int) -> Iterator[None]:
        """A stream stands at this row, and stops reading ahead in the end."""
        if not self._stream:
            yield
            return
        self._stream.seek(row)
        try:
            yield
        finally:
            self._stream.close()

    def _steps_of_tokens(self, max_tokens: int, max_steps: int) -> int:
        """Updates until max_tokens are reached, at most max_steps."""
        steps, left, size = 0, max_tokens, self.global_batch_size
        rows_at_a_time = -(-COUNTED_ROWS // size) * size
        while True:
            epoch, done = divmod(steps, self.windows_per_epoch)
            first = done * size
            positions = np.arange(first, min(first + rows_at_a_time, self.rows_per_epoch), dtype=np.int64)
            tokens = np.add.reduceat(self._tokens_of_rows(epoch, positions), np.arange(0, len(positions), size))
            needed = int(np.searchsorted(np.cumsum(tokens), left)) + 1
            if needed <= len(tokens) or steps + len(tokens) >= max_steps:
                return min(steps + needed, max_steps)
            steps, left = steps + len(tokens), left - int(tokens.sum())

    def _tokens_of_rows(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        # All rows of a flat stream are of one length, and their order is slow to name.
        flat = isinstance(self._order, MagicPrimeOrder)
        rows = positions if flat else self._order.rows_at(epoch, positions)
        tokens = np.empty(len(rows), np.int64)
        source_of = np.searchsorted(self._first_rows, rows, side="right") - 1
        for index in np.unique(source_of).tolist():
            chosen = source_of == index
            source = self._sources[index]
            assert isinstance(source, (PlannedRows, FlatRows)), "a stream's rows are not known beforehand"
            tokens[chosen] = source.num_tokens(rows[chosen] - self._first_rows[index])
        return tokens

    def _window(self, epoch: int, start: int) -> Window:
        stop = min(start + self.global_batch_size, self.rows_per_epoch)
        batches = [self._micro_batch(epoch, start, stop, m) for m in range(self.micro_batches_per_window)]
        if self._device.type == "cuda":
            batches = [batch.pinned() for batch in batches]
        return Window(batches, stop - start)

    def _on_device(self, window: Window) -> Window:
        return Window([batch.to(self._device) for batch in window.batches], window.num_rows)

    def _micro_batch(self, epoch: int, start: int, stop: int, index: int) -> Batch:
        first = start + (index * self._world_size + self._rank) * self._micro_batch_size
        positions = np.arange(first, min(first + self._micro_batch_size, stop), dtype=np.int64)
        if not len(positions):
            return dummy_batch(self._packed)
        row_ids = self._order.rows_at(epoch, positions).tolist()
        rows = []
        for row in row_ids:
            source = int(np.searchsorted(self._first_rows, row, side="right")) - 1
            rows.append(self._sources[source].pieces(row - int(self._first_rows[source])))
        if (top := highest_token(rows)) >= self._vocab_size:
            raise UserError(f"data: rows {row_ids} hold token {top}, the model has {self._vocab_size} embedding rows")
        return (pack_batch if self._packed else pad_batch)(rows, row_ids)


def build_train_loader(
    data: DataConfig,
    trainer: TrainerConfig,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    vocab_size: int,
    run_first: RunFirst | None = None,
    subset: Subset | None = None,
) -> TrainLoader:
    """Read, tokenise and pack the training data. Collective only as far as run_first is.

    vocab_size: rows of the model's embedding.
    subset: take one side of a split of the documents.
    run_first: calls its argument on one process of each node while the others wait, and raises its
    UserError on all; large data is then tokenised once per node. Without it every process looks for itself,
    which is correct but may do the work several times.

    Raises:
        UserError: the files, the batch sizes or the vocabulary do not fit; says which and the remedy.
    """
    micro_batches = trainer.micro_batches(world_size)  # a wrong batch size must not cost the time of reading
    sources: Sequence[RowSource]
    order: RowOrder
    if data.sampling == "magic_prime":
        if subset is not None:
            raise UserError("eval.split_fraction needs documents: with data.sampling magic_prime give eval.path")
        flat = _open_flat(data)
        sources = [flat]
        overfit = trainer.overfit_batches is not None
        order = FileOrder(flat.num_rows) if overfit else MagicPrimeOrder(flat.num_rows)
        lines = [f"data: {len(flat.binidx.tokens):,} tokens in {flat.num_rows:,} rows of {data.ctx_len} (magic prime)"]
    elif data.is_endless:
        if subset is not None:
            raise UserError("eval.split_fraction needs a whole to take a part of: with data.streaming give eval.path")
        tokenizer = build_tokenizer(data.tokenizer)
        stream = StreamRows(data, tokenizer, trainer.seed)
        lines = _describe_stream(stream, tokenizer, data, vocab_size)
        sources, order = [stream], FileOrder(ENDLESS)
    else:
        tokenizer = build_tokenizer(data.tokenizer)
        first = run_first or (lambda action: action())
        corpora = open_corpora(data, tokenizer, first)
        for corpus in corpora:
            _check(corpus, tokenizer, vocab_size)
        sources = planned = [plan_corpus(corpus, data, first, subset) for corpus in corpora]
        if not all(rows.num_rows for rows in planned):
            if subset is not None:
                num_documents = sum(corpus.store.num_documents for corpus in corpora)
                raise UserError(
                    f"eval.split_fraction {subset.fraction:g} of the {num_documents} documents of data.path "
                    f"{data.shown_path} leaves nothing to {'validate' if subset.held_out else 'train'} on; "
                    "take another share, or give eval.path"
                )
            raise UserError(
                f"data.path {data.shown_path}: no document of it has a target within data.ctx_len {data.ctx_len}; "
                "raise data.ctx_len or set data.overlong=split"
            )
        order = _order(planned, data, trainer, micro_batches * trainer.micro_batch_size * world_size)
        lines = _describe(corpora, planned, data, order)
    return TrainLoader(
        sources,
        order,
        data,
        trainer,
        rank=rank,
        world_size=world_size,
        device=device,
        vocab_size=vocab_size,
        description=lines,
    )


def _open_flat(data: DataConfig) -> FlatRows:
    (source,) = find_sources(data)
    if not source.is_binidx:
        raise UserError(f"data.sampling magic_prime needs a binidx, data.path is {source.path}")
    return FlatRows(open_binidx(source.path), data.ctx_len)


def _order(rows: list[PlannedRows], data: DataConfig, trainer: TrainerConfig, rows_per_window: int) -> RowOrder:
    sizes = [source.num_rows for source in rows]
    if trainer.overfit_batches is not None and data.weights is not None:
        raise UserError("trainer.overfit_batches takes the first rows as they stand; remove data.weights")
    if not data.shuffle or trainer.overfit_batches is not None:
        return FileOrder(sum(sizes))
    if data.weights is not None:
        return MixtureOrder(sizes, data.weights, trainer.seed)
    if data.packing == "bucket":
        if len(sizes) > 1:
            raise UserError("data.packing bucket cannot join binidx with other files; use pack")
        return BucketOrder(sum(sizes), trainer.seed, rows_per_window)
    return ShuffledOrder(sum(sizes), trainer.seed)


def _check(corpus: Corpus, tokenizer: Tokenizer, vocab_size: int) -> None:
    store, report = corpus.store, corpus.report
    if not store.num_documents:
        skipped = f"; {report.num_skipped} skipped, first: {report.first_skipped}" if report.num_skipped else ""
        raise UserError(f"data.path {corpus.name} holds no documents{skipped}")
    if store.max_id >= vocab_size:
        raise UserError(
            f"data.tokenizer {tokenizer.name} ({tokenizer.vocab_size} ids) gives token {store.max_id}, but "
            f"the model has only {vocab_size} embedding rows; use the tokenizer that the model was made for"
        )
    if not store.total_targets:
        raise UserError(
            f"data.path {corpus.name}: none of {store.num_documents} documents has a target token; "
            "conversations need an assistant turn, texts must not be empty"
        )


def _describe(corpora: list[Corpus], rows: list[PlannedRows], data: DataConfig, order: RowOrder) -> list[str]:
    stores, plans = [c.store for c in corpora], [r.plan for r in rows]
    num_rows = sum(plan.num_rows for plan in plans)
    length = sum(plan.num_tokens for plan in plans) / num_rows
    fill = f"{100 * (1 - length / data.ctx_len):.1f}% of them unused"
    if data.packing != "pack":
        fill = f"{length:.1f} on average"
    kind = {"pack": "packed", "pad": "padded", "bucket": "bucketed"}[data.packing]
    lines = [
        f"data: {sum(s.num_documents for s in stores):,} documents, {sum(s.num_tokens for s in stores):,} tokens, "
        f"{sum(s.total_targets for s in stores):,} of them targets; "
        f"{num_rows:,} {kind} rows of up to {data.ctx_len} tokens, {fill}"
    ]
    if isinstance(order, MixtureOrder):
        for corpus, quota, size in zip(corpora, order.quotas(), order.sizes):
            lines.append(f"data: {quota:,} rows per epoch from the {size:,} of {corpus.name}")
    if overlong := sum(plan.num_overlong for plan in plans):
        done = {"split": "split", "truncate": "truncated", "drop": "dropped"}[data.overlong]
        lines.append(f"data: {overlong:,} documents are longer than {data.ctx_len} tokens and were {done}")
    if empty := sum(plan.num_without_target for plan in plans):
        lines.append(f"data: {empty:,} documents or pieces without a target were left out")
    return [*lines, *(line for corpus in corpora for line in _skipped(corpus.report))]


def _skipped(report: ReadReport) -> list[str]:
    if not report.num_skipped:
        return []
    return [f"data: {report.num_skipped:,} lines skipped, first: {report.first_skipped}"]


def _describe_stream(stream: StreamRows, tokenizer: Tokenizer, data: DataConfig, vocab_size: int) -> list[str]:
    rows = stream.first_block().rows
    corpus = Corpus(data.shown_path, rows.store, stream.report, None)
    _check(corpus, tokenizer, vocab_size)
    first, *rest = _describe([corpus], [rows], data, FileOrder(rows.num_rows))
    return [f"data: a stream, read {data.stream_block:,} documents at a time; this is the first block", first, *rest]
