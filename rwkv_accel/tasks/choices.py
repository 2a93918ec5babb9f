"""Multiple choice: which of the given texts does the model find the likeliest after the prompt?

The prompt's state is computed once and shared by its choices. Work is cut into the same passes on any number of
processes, so that results are the same bits; every process makes the same number of forward calls, which sharded
models need.

Shapes: T tokens of a packed pass, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwkv_accel.checkpoint.collective import all_ranks
from rwkv_accel.heartbeat import beat
from rwkv_accel.interrupt import Stopped, StopRequest
from rwkv_accel.model.state import RWKV7State
from rwkv_accel.ops.loss import IGNORE_INDEX
from rwkv_accel.tasks.examples import Choice, ChoiceExample, TaskSet

if TYPE_CHECKING:
    from accelerate import Accelerator

PASS_TOKENS = 2048
"""Prompt tokens that are read together."""
LOGIT_TOKENS = 256
"""Choice tokens that are scored together: their logits exist at once."""

Piece = tuple[int, int, int]
"""(sequence, first token, token after the last)."""


@dataclass(frozen=True)
class ChoiceRecord:
    """One example and what the model made of it."""

    place: str
    answer: int
    log_likelihoods: tuple[float, ...]
    """Sum over the tokens of each choice, in nats."""
    num_tokens: tuple[int, ...]
    num_bytes: tuple[int, ...]

    @property
    def chosen(self) -> int:
        """By the sum."""
        return _best(self.log_likelihoods)

    @property
    def chosen_per_token(self) -> int:
        return _best([value / size for value, size in zip(self.log_likelihoods, self.num_tokens)])

    @property
    def chosen_per_byte(self) -> int:
        return _best([value / size for value, size in zip(self.log_likelihoods, self.num_bytes)])


@dataclass(frozen=True)
class ChoiceResult:
    """Accuracies over a set."""

    name: str
    records: tuple[ChoiceRecord, ...]

    def values(self) -> dict[str, float]:
        count = len(self.records)
        return {
            "accuracy": sum(r.chosen == r.answer for r in self.records) / count,
            "accuracy_per_token": sum(r.chosen_per_token == r.answer for r in self.records) / count,
            "accuracy_per_byte": sum(r.chosen_per_byte == r.answer for r in self.records) / count,
            "examples": count,
        }

    def describe(self) -> str:
        values = self.values()
        return (
            f"{self.name} accuracy {values['accuracy']:.2%}, {values['accuracy_per_token']:.2%} per token, "
            f"{values['accuracy_per_byte']:.2%} per byte over {values['examples']:,} questions"
        )


def score_choices(accelerator: Accelerator, model: Any, task: TaskSet, stop: StopRequest | None = None) -> ChoiceResult:
    """Score every choice of every example. Collective; the same result on every rank, for any number of them.

    `model` is what training calls (wrapped, sharded or bare); it comes back in the mode it was in.

    Raises:
        Stopped: on every rank, when one of them wants to stop.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    was_training = model.training
    model.eval()
    device = accelerator.device
    found: list[tuple[int, ChoiceRecord]] = []
    passes = [_Pass(task.examples, rows) for rows in _passes(task.examples)]
    with torch.no_grad():
        for first in range(0, len(passes), world):
            beat("validation", in_step=True)
            if stop is not None and stop.agreed():
                raise Stopped
            together = passes[first : first + world]
            num_calls = max(len(one.prompt_calls) + len(one.choice_calls) for one in together)
            if rank < len(together):
                mine = together[rank]
                found += mine.run(model, device)
                num_calls -= len(mine.prompt_calls) + len(mine.choice_calls)
            for _ in range(num_calls):
                model(torch.zeros(1, 1, dtype=torch.int64, device=device))
    model.train(was_training)
    merged = sorted((item for items in all_ranks(accelerator, found) for item in items), key=lambda item: item[0])
    return ChoiceResult(task.name, tuple(record for _, record in merged))


class _Pass:
    """Some examples that are worked on together: the same ones on any number of processes."""

    def __init__(self, examples: Sequence[ChoiceExample], rows: Sequence[int]) -> None:
        self._rows, self._examples = rows, [examples[row] for row in rows]
        choices = [choice for example in self._examples for choice in example.choices]
        # The last token of a prompt is read with each choice, whose first token it predicts.
        self._prompts = list(dict.fromkeys(choice.prefix[:-1] for choice in choices if len(choice.prefix) > 1))
        number = {prompt: index for index, prompt in enumerate(self._prompts)}
        # Sequences that begin with nothing before them first: a call has a state for all its rows or for none.
        self._order = sorted(range(len(choices)), key=lambda at: len(choices[at].prefix) > 1)
        self._choices: list[Choice] = [choices[at] for at in self._order]
        self._prompt_of = [number.get(choice.prefix[:-1]) for choice in self._choices]
        self.prompt_calls = plan_calls([len(prompt) for prompt in self._prompts], PASS_TOKENS)
        num_fresh = self._prompt_of.count(None)
        lengths = [len(choice.ids) for choice in self._choices]
        self.choice_calls = plan_calls(lengths[:num_fresh], LOGIT_TOKENS) + [
            [(sequence + num_fresh, start, stop) for sequence, start, stop in call]
            for call in plan_calls(lengths[num_fresh:], LOGIT_TOKENS)
        ]

    def run(self, model: Any, device: torch.device) -> list[tuple[int, ChoiceRecord]]:
        """(number of the example, its scores)."""
        before: list[RWKV7State | None] = [None] * len(self._prompts)
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        for call in self.prompt_calls:
            ids_BT, borders = _packed(call, self._prompts, device)
            # Labels that ask for nothing keep the head from making logits.
            labels = {"labels_BT": torch.full_like(ids_BT, IGNORE_INDEX), "target_rows": nothing}
            _, after = model(ids_BT, **labels, state=_join(call, before), cu_seqlens=borders, return_state=True)
            for index, (sequence, _, _) in enumerate(call):
                before[sequence] = after.select([index])
        return self._records(self._score(model, device, before))

    def _score(self, model: Any, device: torch.device, prompts: Sequence[RWKV7State | None]) -> list[float]:
        """Log-likelihood of each choice, in the order of the examples."""
        inputs = [(*choice.prefix[-1:], *choice.ids[:-1]) for choice in self._choices]
        states = [None if at is None else prompts[at] for at in self._prompt_of]
        sums = [0.0] * len(self._choices)
        for call in self.choice_calls:
            ids_BT, borders = _packed(call, inputs, device)
            logits_BTV, after = model(ids_BT, state=_join(call, states), cu_seqlens=borders, return_state=True)
            targets = torch.tensor([t for s, start, stop in call for t in self._choices[s].ids[start:stop]])
            scores_T = _log_likelihood(logits_BTV[0], targets.to(device))
            sizes = [stop - start for _, start, stop in call]
            for index, ((sequence, _, stop), score) in enumerate(zip(call, scores_T.split(sizes))):
                sums[self._order[sequence]] += score.sum().item()
                if stop < len(inputs[sequence]):
                    states[sequence] = after.select([index])
        return sums

    def _records(self, sums: list[float]) -> list[tuple[int, ChoiceRecord]]:
        records, first = [], 0
        for row, example in zip(self._rows, self._examples):
            scores = tuple(sums[first : first + len(example.choices)])
            first += len(example.choices)
            sizes = tuple(len(choice.ids) for choice in example.choices)
            num_bytes = tuple(choice.num_bytes for choice in example.choices)
            records.append((row, ChoiceRecord(example.place, example.answer, scores, sizes, num_bytes)))
        return records


def plan_calls(lengths: Sequence[int], limit: int) -> list[list[Piece]]:
    """Cut sequences of these lengths into calls of at most `limit` tokens; all pieces of a call begin at the same
    token of their sequences, and the pieces of a sequence come in order."""
    calls: list[list[Piece]] = []
    for start in range(0, max(lengths, default=0), limit):
        call: list[Piece] = []
        total = 0
        for sequence, length in enumerate(lengths):
            size = min(length - start, limit)
            if size <= 0:
                continue
            if call and total + size > limit:
                calls.append(call)
                call, total = [], 0
            call.append((sequence, start, start + size))
            total += size
        calls.append(call)
    return calls


def _passes(examples: Sequence[ChoiceExample]) -> list[list[int]]:
    """Neighbouring examples whose prompts have PASS_TOKENS together; at least one."""
    passes: list[list[int]] = []
    total = PASS_TOKENS
    for row, example in enumerate(examples):
        size = max(len(choice.prefix) for choice in example.choices)
        if total + size > PASS_TOKENS:
            passes.append([])
            total = 0
        passes[-1].append(row)
        total += size
    return passes


def _packed(call: list[Piece], sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [1,T] of a call and its borders."""
    pieces = [sequences[sequence][start:stop] for sequence, start, stop in call]
    ids = torch.tensor([[token for piece in pieces for token in piece]], device=device)
    borders = torch.tensor([0, *(len(piece) for piece in pieces)]).cumsum(0)
    return ids, borders


def _join(call: list[Piece], states: Sequence[RWKV7State | None]) -> RWKV7State | None:
    rows = [state for sequence, _, _ in call if (state := states[sequence]) is not None]
    assert len(rows) in (0, len(call))
    return RWKV7State.cat(rows) if rows else None


def _log_likelihood(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    wide_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    chosen_T = wide_TV.gather(1, targets_T.unsqueeze(1)).squeeze(1)
    return (chosen_T - wide_TV.logsumexp(1)).double()


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
