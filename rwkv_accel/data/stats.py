"""Numbers of a data set before a run: lengths as a picture, tokens, rows, steps, and what padding would cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rwkv_accel.config.schema import DataConfig, TrainerConfig
from rwkv_accel.data.corpus import Corpus, open_corpora
from rwkv_accel.data.packing import plan_rows
from rwkv_accel.data.tokenizer import Tokenizer
from rwkv_accel.errors import UserError

BAR_WIDTH = 48
EIGHTHS = " ▏▎▍▌▋▊▉"


def stats_lines(data: DataConfig, trainer: TrainerConfig, tokenizer: Tokenizer, world_size: int) -> Iterator[str]:
    """The report, line by line."""
    corpora = open_corpora(data, tokenizer, lambda action: action())
    lengths = np.concatenate([np.diff(corpus.store.offsets) for corpus in corpora])
    tokens, targets = int(lengths.sum()), sum(corpus.store.total_targets for corpus in corpora)
    if not len(lengths):
        raise UserError(f"data.path {data.shown_path} holds no documents")
    yield f"{len(lengths):,} documents, {tokens:,} tokens per epoch, {targets:,} of them targets"
    quantiles = np.quantile(lengths, (0, 0.5, 0.9, 0.99, 1)).astype(int).tolist()
    yield "length in tokens: " + ", ".join(
        f"{name} {value:,}" for name, value in zip(("shortest", "median", "90%", "99%", "longest"), quantiles)
    )
    yield from histogram(lengths)
    yield from _rows(corpora, data, trainer, world_size)


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """Bars over classes of doubling length."""
    exponents = np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1
    counts = np.bincount(exponents)
    for exponent in range(int(exponents.min()), len(counts)):
        low, high = 1 << exponent, (2 << exponent) - 1
        yield f"{low:>9,} - {high:<9,} {bar(counts[exponent] / counts.max())} {counts[exponent]:,}"


def bar(share: float) -> str:
    """A bar of share * BAR_WIDTH characters, exact to an eighth."""
    eighths = round(share * BAR_WIDTH * 8)
    text = "█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")
    return text.ljust(BAR_WIDTH)


def _rows(corpora: Sequence[Corpus], data: DataConfig, trainer: TrainerConfig, world_size: int) -> Iterator[str]:
    rows_per_update = trainer.micro_batches(world_size) * trainer.micro_batch_size * world_size
    for packing in ("pack", "pad"):
        plans = [
            plan_rows(
                c.store,
                ctx_len=data.ctx_len,
                packing=packing,
                overlong=data.overlong,
                keep_order=not data.shuffle,
            )
            for c in corpora
        ]
        rows, used = sum(p.num_rows for p in plans), sum(p.num_tokens for p in plans)
        if not rows:
            yield f"{packing}: no rows: no document has a target within data.ctx_len {data.ctx_len}"
            continue
        unused = 1 - used / (rows * data.ctx_len)
        chosen = " (this recipe)" if packing == data.packing else ""
        yield (
            f"{packing}: {rows:,} rows of up to {data.ctx_len} tokens, {100 * unused:.1f}% unused, "
            f"{-(-rows // rows_per_update):,} updates of {rows_per_update} rows per epoch{chosen}"
        )
    overlong = sum(p.num_overlong for p in plans)
    share = overlong / sum(corpus.store.num_documents for corpus in corpora)
    yield f"{overlong:,} documents ({100 * share:.1f}%) are longer than ctx_len"
