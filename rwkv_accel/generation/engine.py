"""Batched generation: one recurrent state per row, rows enter as others leave.

Shapes: R rows (sequences being generated), V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rwkv_accel.errors import UserError
from rwkv_accel.generation.decode import RecurrentStep
from rwkv_accel.generation.footprint import check_memory
from rwkv_accel.generation.params import EOT_ID, SamplingParams, default_stop
from rwkv_accel.generation.penalty import PenaltyCounter
from rwkv_accel.generation.prefill import prefill
from rwkv_accel.generation.sampling import draw, probabilities
from rwkv_accel.generation.text import TextStream, Tokenizer
from rwkv_accel.heartbeat import beat
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.model.state import RWKV7State

DEFAULT_PARAMS = SamplingParams()
ESTIMATE_CHARACTERS = 4096
"""Beginning of a prompt from which its number of tokens is estimated."""
StopReason = Literal["eot", "stop", "length", "interrupted"]


@dataclass(frozen=True)
class Memory:
    """Where a conversation stands: a state (one row), and tokens that belong to it but were not fed yet."""

    state: RWKV7State
    pending_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """One text to continue. `memory` carries what came before `prompt` (None: a fresh sequence)."""

    prompt: str
    params: SamplingParams = DEFAULT_PARAMS
    memory: Memory | None = None
    keep_memory: bool = False
    """Return the memory after the reply, without its stop string, to continue from."""


@dataclass(frozen=True)
class Completion:
    """One reply."""

    text: str
    """The reply without its stop string."""
    ids: tuple[int, ...]
    """Generated tokens, without a stop token; those of a stop string are included."""
    stop_reason: StopReason
    """eot: a stop token. stop: a stop string. length: max_new_tokens. interrupted: generation was stopped."""
    num_prompt_tokens: int = 0
    memory: Memory | None = None

    @property
    def stopped_by_itself(self) -> bool:
        """Whether the model ended its reply."""
        return self.stop_reason in ("eot", "stop")


@dataclass(frozen=True)
class Piece:
    """Text that became certain for one request; the last piece of a request carries its completion."""

    index: int
    text: str
    completion: Completion | None = None


@dataclass
class _Row:
    """A request that is being generated."""

    index: int
    request: Request
    stream: TextStream
    generator: torch.Generator
    penalty: PenaltyCounter | None
    num_prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    clean: tuple[RWKV7State, int] | None = None
    """State before the first token whose text is held back, and the length of the text until there."""


class TextGenerator:
    """Generates from a model and its tokenizer. The model is not copied and stays as it is."""

    def __init__(
        self,
        model: RWKV7,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 64,
        should_stop: Callable[[], bool] | None = None,
    ):
        """
        Args:
            batch_size: most rows decoded at once; further requests wait for a free row.
            should_stop: asked before every token; True has the effect of setting `interrupted`.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is out of range; it must be at least 1")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.device = model.ln_out.weight.device
        self._should_stop = should_stop
        self.interrupted = False
        """Set it (from a signal handler) to end all running requests after the current token."""
        self._missing_ids = torch.tensor(missing_ids(tokenizer, model.config.vocab_size), device=self.device)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 256,
        temperature: float | None = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        penalty_decay: float = 0.996,
        order: str = "rwkv",
        stop: Sequence[str] | None = None,
        stop_ids: Sequence[int] = (0,),
        ban_ids: Sequence[int] = (),
        seed: int = 0,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in order. Settings as in SamplingParams; prompt i gets seed + i.

        With `stop` None a prompt in the chat template (it has an `Assistant:`) stops at the next turn.
        `on_text(i, text)` receives text as it becomes certain. Not collective. Raises UserError for an empty
        prompt or a setting out of bounds.
        """
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            penalty_decay=penalty_decay,
            order=order,
            stop=tuple(stop or ()),
            stop_ids=tuple(stop_ids),
            ban_ids=tuple(ban_ids),
            seed=seed,
        )
        requests = [
            Request(
                prompt,
                replace(params, seed=seed + i, stop=default_stop(prompt) if stop is None else params.stop),
            )
            for i, prompt in enumerate(prompts)
        ]
        done: dict[int, Completion] = {}
        for piece in self.run(requests):
            if on_text is not None and piece.text:
                on_text(piece.index, piece.text)
            if piece.completion is not None:
                done[piece.index] = piece.completion
        never_begun = Completion("", (), "interrupted")
        return [done.get(index, never_begun) for index in range(len(requests))]

    def run(self, requests: Iterable[Request]) -> Iterator[Piece]:
        """Text of all requests as it becomes certain; requests are read only when a row is free for them.

        Once `interrupted` is set, running requests complete with what they have and no other one is begun.
        """
        waiting = enumerate(requests)
        with self.inference():
            recurrent = RecurrentStep(self.model)
        rows: list[_Row] = []
        state: RWKV7State | None = None
        logits_RV: Tensor | None = None
        while True:
            beat("generation")
            self.interrupted = self.interrupted or (self._should_stop is not None and self._should_stop())
            entering = [] if self.interrupted else self._take(waiting, self.batch_size - len(rows))
            if entering:
                self.foresee([request.prompt for _, request in entering], len(rows) + len(entering))
                new_rows, new_logits, new_state = self._enter(entering)
                rows += new_rows
                state = new_state if state is None else RWKV7State.cat([state, new_state])
                logits_RV = new_logits if logits_RV is None else torch.cat([logits_RV, new_logits])
            if not rows:
                return
            assert state is not None
            assert logits_RV is not None
            staying, fed = [], []
            for at, (row, token) in enumerate(zip(rows, self._sample(rows, logits_RV))):
                piece = self._advance(row, token, state, at)
                if piece.text or piece.completion:
                    yield piece
                if piece.completion is None:
                    staying.append(at)
                    fed.append(token)
            rows = [rows[at] for at in staying]
            if not rows:
                state = logits_RV = None
                continue
            with self.inference():
                if len(staying) < state.batch_size:
                    state = state.select(staying)
                logits_RV, state = recurrent.step(torch.tensor(fed, device=self.device), state)

    def read(self, text: str, memory: Memory | None = None) -> Memory:
        """Memory after `text`, without generating: a shared beginning to start many requests from."""
        self.foresee([text], 1)
        with self.inference():
            ids = self.encode(text, memory)
            start = self.model.fresh_state(1) if memory is None else memory.state
            return Memory(prefill(self.model, [ids], start)[1])

    def _take(self, waiting: Iterator[tuple[int, Request]], count: int) -> list[tuple[int, Request]]:
        return [item for _, item in zip(range(count), waiting)]

    def _enter(self, entering: list[tuple[int, Request]]) -> tuple[list[_Row], Tensor, RWKV7State]:
        """Read the prompts of new requests."""
        for _, request in entering:
            self.check_ids("stop_ids", request.params.stop_ids)
            self.check_ids("ban_ids", request.params.ban_ids)
        prompts = [self.encode(request.prompt, request.memory) for _, request in entering]
        with self.inference():
            fresh = self.model.fresh_state(1)
            starts = [fresh if r.memory is None else r.memory.state.to(self.device) for _, r in entering]
            logits_RV, state = prefill(self.model, prompts, RWKV7State.cat(starts))
        rows = [
            _Row(
                index,
                request,
                TextStream(self.tokenizer, request.params.stop),
                torch.Generator().manual_seed(request.params.seed),
                PenaltyCounter(self.tokenizer, request.params, logits_RV.shape[-1], self.device)
                if request.params.has_penalty
                else None,
                len(ids),
            )
            for (index, request), ids in zip(entering, prompts)
        ]
        return rows, logits_RV, state

    def foresee(self, prompts: Sequence[str], num_rows: int) -> None:
        """Raises UserError, before any work, if these prompts beside num_rows rows do not fit into free memory."""
        num_tokens = 0
        for prompt in prompts:
            sample = prompt[:ESTIMATE_CHARACTERS]
            num_tokens += len(self.tokenizer.encode(sample)) * len(prompt) // max(len(sample), 1)
        check_memory(self.model, num_rows=num_rows, num_tokens=num_tokens)

    def encode(self, prompt: str, memory: Memory | None = None) -> list[int]:
        """Tokens to read: those pending in the memory and the prompt's. Raises UserError if there is none."""
        ids = ([] if memory is None else list(memory.pending_ids)) + self.tokenizer.encode(prompt)
        if not ids:
            raise UserError("the prompt is empty; give at least one character to continue from")
        self.check_ids("the prompt", ids)
        return ids

    def check_ids(self, what: str, ids: Sequence[int]) -> None:
        """Raises UserError for ids that the model does not have."""
        vocab_size = self.model.config.vocab_size
        unknown = [token for token in ids if not 0 <= token < vocab_size]
        if unknown:
            raise UserError(
                f"{what} holds token id {unknown[0]}, the model has 0 to {vocab_size - 1}; is it another tokenizer's?"
            )

    def allowed(self, logits_RV: Tensor) -> Tensor:
        """Logits, in place and at least fp32, without the ids that the tokenizer does not have."""
        if logits_RV.dtype not in (torch.float32, torch.float64):
            logits_RV = logits_RV.float()
        return logits_RV.index_fill_(-1, self._missing_ids, -torch.inf) if len(self._missing_ids) else logits_RV

    def _sample(self, rows: list[_Row], logits_RV: Tensor) -> list[int]:
        """One token per row."""
        with self.inference():
            logits_RV = self.allowed(logits_RV)
            groups: dict[tuple, list[int]] = {}
            for at, row in enumerate(rows):
                params = row.request.params
                if row.penalty is not None:
                    logits_RV[at] = row.penalty.apply(logits_RV[at])
                if params.ban_ids:
                    logits_RV[at, list(params.ban_ids)] = -torch.inf
                groups.setdefault(params.distribution, []).append(at)
            tokens = [0] * len(rows)
            for members in groups.values():
                part_RV = logits_RV if len(members) == len(rows) else logits_RV[members]
                params = rows[members[0]].request.params
                if params.temperature is None:
                    drawn = part_RV.argmax(-1)
                else:
                    # On the host and one per row: the same numbers on every device and in every batch.
                    uniform = torch.cat(
                        [torch.rand(1, generator=rows[at].generator, dtype=torch.float64) for at in members]
                    )
                    drawn = draw(probabilities(part_RV, params), uniform.to(self.device))
                for at, token in zip(members, drawn.tolist()):
                    tokens[at] = token
        return tokens

    def _advance(self, row: _Row, token: int, state: RWKV7State, at: int) -> Piece:
        """Take a sampled token: its text, and the completion if it was the last one."""
        params = row.request.params
        if token in params.stop_ids:
            return self._complete(row, "eot", state, at)
        was_clean, length = row.stream.is_clean, len(row.text)
        row.ids.append(token)
        text = row.stream.push([token])
        row.text += text
        if row.request.keep_memory and was_clean and not (row.stream.is_clean and row.stream.stopped_at is None):
            row.clean = (state.select([at]), length)
        if row.penalty is not None:
            row.penalty.count(token)
        if row.stream.stopped_at is not None:
            return self._complete(row, "stop", state, at, text)
        if len(row.ids) == params.max_new_tokens:
            return self._complete(row, "length", state, at, text)
        if self.interrupted:
            return self._complete(row, "interrupted", state, at, text)
        return Piece(row.index, text)

    def _complete(self, row: _Row, reason: StopReason, state: RWKV7State, at: int, text: str = "") -> Piece:
        rest = row.stream.finish()
        row.text += rest
        memory = self._memory(row, reason, state, at) if row.request.keep_memory else None
        completion = Completion(row.text, tuple(row.ids), reason, row.num_prompt_tokens, memory)
        return Piece(row.index, text + rest, completion)

    def _memory(self, row: _Row, reason: StopReason, state: RWKV7State, at: int) -> Memory:
        """What the next turn continues from: everything up to the end of `row.text`."""
        if reason == "stop":
            # Tokens of the stop string were fed; go back to where the text was last certain.
            assert row.clean is not None
            before, length = row.clean
            return Memory(before, tuple(self.tokenizer.encode(row.text[length:])))
        with self.inference():
            return Memory(state.select([at]), () if reason == "eot" else (row.ids[-1],))

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode without gradients; the model's own mode comes back afterwards."""
        # Entered for each piece of work: a generator must not leave the mode switched on between its items.
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.model.train(training)


def missing_ids(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Rows of the model that stand for no text: World's ids from 65530 on, padding of the vocabulary."""
    return [token for token in range(vocab_size) if token != EOT_ID and not tokenizer.decode_bytes([token])]
