"""Everything that an eval section asks for: exact losses over data rows, and the task files.

Under every strategy and on any number of processes with the same results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rwkv_accel.config.base import share_of
from rwkv_accel.config.schema import EvalConfig
from rwkv_accel.data.loader import TrainLoader
from rwkv_accel.data.tokenizer import Tokenizer
from rwkv_accel.heartbeat import beat
from rwkv_accel.interrupt import Stopped, StopRequest
from rwkv_accel.tasks.answers import AnswerResult
from rwkv_accel.tasks.choices import ChoiceResult
from rwkv_accel.tasks.run import Tasks, run_tasks

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class EvalResult:
    """Sums over all target tokens of a data set, and what follows from them."""

    name: str
    loss_sum: float
    """Negative log-likelihood in nats."""
    num_targets: int
    num_bytes: int
    """Bytes of the text that the targets decode to."""

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return self.loss_sum / max(self.num_targets, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.loss_sum / math.log(2) / max(self.num_bytes, 1)

    def values(self) -> dict[str, float]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "target_tokens": self.num_targets,
        }

    def describe(self) -> str:
        return (
            f"{self.name} loss {self.loss:.4f}, perplexity {self.perplexity:.3f}, "
            f"{self.bits_per_byte:.4f} bits per byte over {self.num_targets:,} targets"
        )


@dataclass(frozen=True)
class Results:
    """What one evaluation has found, in the order of the recipe."""

    losses: tuple[EvalResult, ...] = ()
    """The first one decides on the learning rate and the best weights."""
    tasks: tuple[ChoiceResult | AnswerResult, ...] = ()


@dataclass(frozen=True)
class Evaluator:
    """The files of an eval section, read once and asked at every evaluation."""

    config: EvalConfig
    tokenizer: Tokenizer
    token_lengths: torch.Tensor
    """[V] bytes of each token."""
    loss_sets: list[tuple[str, TrainLoader]]
    """Names and rows."""
    tasks: Tasks

    def run(self, accelerator: Accelerator, model: Any, stop: StopRequest | None = None) -> Results:
        """Ask everything. Collective; the same results on every rank.

        Raises:
            Stopped: on every rank, when one of them wants to stop.
        """
        options: dict[str, Any] = {"limit_batches": self.config.limit_batches, "stop": stop}
        losses = [
            evaluate(accelerator, model, loader, self.token_lengths, name=name, **options)
            for name, loader in self.loss_sets
        ]
        tasks = run_tasks(accelerator, model, self.tasks, self.tokenizer, self.config, stop)
        return Results(tuple(losses), tuple(tasks))


def token_lengths(tokenizer: Tokenizer, vocab_size: int) -> torch.Tensor:
    """Bytes of each token [vocab_size]; 0 for end of text and for ids that the tokenizer does not have."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    for token in range(1, min(tokenizer.vocab_size, vocab_size)):
        lengths[token] = len(tokenizer.decode_bytes([token]))
    return lengths


def evaluate(
    accelerator: Accelerator,
    model: Any,
    loader: TrainLoader,
    lengths_V: torch.Tensor,
    *,
    name: str,
    limit_batches: int | float | None = None,
    stop: StopRequest | None = None,
) -> EvalResult:
    """Loss over the loader's rows, or the first limit_batches windows (or that share) of them. Collective.

    Every target token counts once and with the same weight, however the rows are spread. The model comes back in
    the mode it was in; dropout is off meanwhile.

    Raises:
        Stopped: on every rank, before a batch, when one of them wants to stop.
    """
    was_training = model.training
    model.eval()
    device = accelerator.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    lengths_V = lengths_V.to(device)
    with torch.no_grad():
        for index, window in enumerate(loader.windows(0, 0)):
            if index == share_of(limit_batches, loader.windows_per_epoch):
                break
            for batch in window.batches:
                beat("validation", in_step=True)
                if stop is not None and stop.agreed():
                    raise Stopped
                labels = batch.labels_BT
                targets = labels.clamp_min(0)
                sums[0] += model(batch.ids_BT, labels, target_rows=batch.target_rows_R, cu_seqlens=batch.cu_seqlens)
                sums[1] += batch.num_targets
                sums[2] += lengths_V[targets].masked_fill(labels < 0, 0).sum()
    model.train(was_training)
    loss_sum, num_targets, num_bytes = accelerator.reduce(sums, "sum").tolist()
    return EvalResult(name, loss_sum, int(num_targets), int(num_bytes))
