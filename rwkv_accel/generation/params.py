"""What one generation request asks for. Checked before any weight is read; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rwkv_accel.errors import UserError

EOT_ID = 0
"""End of document in the World and in the byte vocabulary."""

STOP_SETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "chat": ("\n\nUser:", "\n\nSystem:"),
    "paragraph": ("\n\n",),
    "line": ("\n",),
}
"""Stop strings by name. End of document always stops. `chat` leaves blank lines inside a reply alone, which a
model that thinks aloud needs; `paragraph` ends at the first blank line."""

ORDERS = ("rwkv", "hf")


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request. Raises UserError for a value outside its bounds."""

    max_new_tokens: int = 256
    """Most tokens that are generated."""
    temperature: float | None = 1.0
    """Below 1 sharpens, above 1 flattens the distribution. None is greedy: always the likeliest token."""
    top_p: float = 1.0
    """Nucleus: smallest set of likeliest tokens with at least this mass, in (0, 1]. 1 keeps all."""
    top_k: int = 0
    """Keep the k likeliest tokens. 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the likeliest token's probability, in [0, 1]."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that was generated before."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per (decayed) occurrence."""
    penalty_decay: float = 0.996
    """Factor on all counts per generated token, in (0, 1]. 1 never forgets."""
    order: str = "rwkv"
    """rwkv: softmax, top_p, top_k, min_p, then temperature on what is left (pip package `rwkv`).
    hf: temperature, top_k, top_p, min_p, then softmax (transformers)."""
    stop: tuple[str, ...] = ()
    """Texts that end the reply; they are cut off."""
    stop_ids: tuple[int, ...] = (EOT_ID,)
    """Tokens that end the reply; they are cut off."""
    ban_ids: tuple[int, ...] = ()
    """Tokens that are never generated, beside those that the tokenizer does not have."""
    seed: int = 0
    """Seed of this request's random numbers; the result does not depend on what else is in the batch."""

    def __post_init__(self) -> None:
        self._require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        warm = self.temperature is None or 0 < self.temperature < math.inf
        self._require(warm, "temperature", "above 0 (for the likeliest token: --greedy, or temperature null)")
        self._require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        self._require(self.top_k >= 0, "top_k", "0 (off) or above")
        self._require(0 <= self.min_p <= 1, "min_p", "between 0 (off) and 1")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(math.isfinite(getattr(self, name)), name, "a finite number")
        self._require(0 < self.penalty_decay <= 1, "penalty_decay", "above 0 and at most 1")
        self._require(self.order in ORDERS, "order", " or ".join(ORDERS))
        self._require(self.seed >= 0, "seed", "0 or above")
        self._require(all(self.stop), "stop", "texts of at least one character")

    def _require(self, holds: bool, name: str, bounds: str) -> None:
        if not holds:
            raise UserError(f"{name} {getattr(self, name)!r} is out of range; it must be {bounds}")

    @property
    def has_penalty(self) -> bool:
        """Whether past tokens change the distribution."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def distribution(self) -> tuple[float | None, float, int, float, str]:
        """What two requests must share to be sampled in one call."""
        return self.temperature, self.top_p, self.top_k, self.min_p, self.order


def default_stop(prompt: str) -> tuple[str, ...]:
    """Stop strings for a prompt: the chat set if it is written in the chat template, else none."""
    is_chat = prompt.startswith("Assistant:") or "\n\nAssistant:" in prompt
    return STOP_SETS["chat"] if is_chat else ()


def stop_texts(names: tuple[str, ...]) -> tuple[str, ...]:
    """Stop strings of the given sets. Raises UserError for an unknown name."""
    texts: list[str] = []
    for name in names:
        if name not in STOP_SETS:
            raise UserError(f"unknown stop {name!r}; use one of {', '.join(STOP_SETS)}, or --stop-text for a text")
        texts += STOP_SETS[name]
    return tuple(dict.fromkeys(texts))
