"""Beam search: the likeliest whole replies, by sum of log-probabilities and a length penalty.

Shapes: K beams (rows of the state), V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_accel.errors import UserError
from rwkv_accel.generation.decode import RecurrentStep
from rwkv_accel.generation.engine import TextGenerator
from rwkv_accel.generation.params import EOT_ID
from rwkv_accel.generation.prefill import prefill
from rwkv_accel.generation.text import TextStream


@dataclass(frozen=True)
class BeamParams:
    """Settings of a search. Raises UserError for a value outside its bounds."""

    num_beams: int = 4
    """Unfinished replies kept after every token. 1 is greedy decoding."""
    num_best: int = 1
    """Replies returned, best first; at most num_beams."""
    max_new_tokens: int = 256
    """Most tokens of a reply."""
    length_penalty: float = 1.0
    """A reply's score is its log-probability / length^length_penalty: 0 favours short replies, 1 is the mean."""
    early_stop: bool = True
    """Stop when num_beams replies are finished. False goes on until no unfinished one can become better."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply; they are cut off, their tokens count for the score."""
    stop_ids: tuple[int, ...] = (EOT_ID,)
    """Tokens that end a reply; they count for the score."""

    def __post_init__(self) -> None:
        for name, holds, bounds in (
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("num_best", 1 <= self.num_best <= self.num_beams, f"between 1 and num_beams ({self.num_beams})"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("length_penalty", abs(self.length_penalty) < float("inf"), "a finite number"),
            ("stop", all(self.stop), "texts of at least one character"),
        ):
            if not holds:
                raise UserError(f"{name} {getattr(self, name)!r} is out of range; it must be {bounds}")


@dataclass(frozen=True)
class Hypothesis:
    """A reply found by the search."""

    text: str
    ids: tuple[int, ...]
    """Tokens without the stop token; those of a stop string are included."""
    log_prob: float
    """Sum of the log-probabilities of all tokens, stop token included."""
    score: float
    """log_prob / (number of those tokens)^length_penalty."""
    stop_reason: str
    """eot, stop or length, as in Completion."""


@dataclass(frozen=True)
class _Beam:
    ids: tuple[int, ...]
    log_prob: float


def beam_search(generator: TextGenerator, prompt: str, params: BeamParams) -> list[Hypothesis]:
    """The num_best replies to a prompt, best score first. Deterministic.

    A reply is finished when its stop token ranks among the num_beams best continuations of a step, or at
    max_new_tokens. Ends with what is finished once `generator.interrupted` is set. Raises UserError for an empty
    prompt.
    """
    finished: list[Hypothesis] = []
    generator.foresee([prompt], params.num_beams)
    with generator.inference():
        recurrent = RecurrentStep(generator.model)
        logits_KV, state = prefill(generator.model, [generator.encode(prompt)], generator.model.fresh_state(1))
        beams = [_Beam((), 0.0)]
        for length in range(1, params.max_new_tokens + 1):
            parents: list[int] = []
            tokens: list[int] = []
            next_beams: list[_Beam] = []
            for rank, (log_prob, parent, token) in enumerate(_best(generator, logits_KV, beams, params)):
                ids = (*beams[parent].ids, token)
                reason = _stop_reason(generator, ids, params)
                if reason is not None:
                    # Only a stop among the best counts: behind them it would end the search with poor replies.
                    if rank < params.num_beams:
                        finished.append(_finish(generator, ids, log_prob, reason, params))
                elif len(next_beams) < params.num_beams:
                    next_beams.append(_Beam(ids, log_prob))
                    parents.append(parent)
                    tokens.append(token)
            if generator.interrupted or not next_beams or _is_done(finished, next_beams, length, params):
                break
            beams = next_beams
            logits_KV, state = recurrent.step(torch.tensor(tokens, device=generator.device), state.select(parents))
    return sorted(finished, key=lambda h: -h.score)[: params.num_best]


def _best(
    generator: TextGenerator, logits_KV: Tensor, beams: Sequence[_Beam], params: BeamParams
) -> list[tuple[float, int, int]]:
    """(log-probability, parent, token) of the best continuations of all beams, best first."""
    log_probs_KV = generator.allowed(logits_KV).double().log_softmax(-1)
    sums_KV = log_probs_KV + torch.tensor([b.log_prob for b in beams], dtype=torch.float64).to(log_probs_KV).unsqueeze(
        1
    )
    # With every beam's stop tokens among them, num_beams others are still left.
    count = min(params.num_beams * (1 + max(1, len(params.stop_ids))), sums_KV.numel())
    best = sums_KV.flatten().topk(count)
    vocab_size = sums_KV.shape[1]
    return [
        (value, index // vocab_size, index % vocab_size)
        for value, index in zip(best.values.tolist(), best.indices.tolist())
        if value > -torch.inf
    ]


def _stop_reason(generator: TextGenerator, ids: tuple[int, ...], params: BeamParams) -> str | None:
    if ids[-1] in params.stop_ids:
        return "eot"
    if params.stop and _text(generator, ids, params)[1]:
        return "stop"
    return "length" if len(ids) == params.max_new_tokens else None


def _text(generator: TextGenerator, ids: tuple[int, ...], params: BeamParams) -> tuple[str, bool]:
    """Text of a reply up to its stop string, and whether it has one."""
    stream = TextStream(generator.tokenizer, params.stop)
    text = stream.push(ids)
    return text + stream.finish(), stream.stopped_at is not None


def _finish(
    generator: TextGenerator, ids: tuple[int, ...], log_prob: float, reason: str, params: BeamParams
) -> Hypothesis:
    kept = ids[:-1] if reason == "eot" else ids
    text, _ = _text(generator, kept, params)
    return Hypothesis(text, kept, log_prob, _score(log_prob, len(ids), params), reason)


def _score(log_prob: float, length: int, params: BeamParams) -> float:
    return log_prob / length**params.length_penalty


def _is_done(finished: list[Hypothesis], beams: list[_Beam], length: int, params: BeamParams) -> bool:
    if params.early_stop:
        return len(finished) >= params.num_beams
    if len(finished) < params.num_best:
        return False
    # More tokens only lower the sum; the best that can come of it divides today's sum by the friendliest length.
    bound = max(_score(beams[0].log_prob, at, params) for at in (length + 1, params.max_new_tokens))
    return sorted((h.score for h in finished), reverse=True)[params.num_best - 1] >= bound
