"""From token ids to text that can be shown: no half characters, nothing that may become a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What generation needs of a tokenizer (rwkv_accel.data.tokenizer)."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


class TextStream:
    """Text of a growing sequence of tokens, character by character, cut off at the first stop string.

    Tokens are byte strings: a character may span several, and a stop string may begin inside one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped_at: str | None = None
        """The stop string that ended the text."""

    @property
    def is_clean(self) -> bool:
        """Whether all bytes so far were returned: no half character, no possible stop string is held back."""
        return not self._held and not self._decoder.getstate()[0]

    def push(self, ids: Sequence[int]) -> str:
        """Text that became certain with these tokens; empty while it may be half a character or a stop."""
        assert self.stopped_at is None
        return self._release(self._held + self._decoder.decode(self._tokenizer.decode_bytes(ids)))

    def finish(self) -> str:
        """The rest, when no more tokens come; an incomplete character becomes U+FFFD."""
        if self.stopped_at is not None:
            return ""
        released = self._release(self._held + self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return released + rest

    def _release(self, text: str) -> str:
        # The first one complete, as if characters came one by one: independent of how tokens cut the text.
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped_at = min(found)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
