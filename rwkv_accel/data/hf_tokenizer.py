"""Any Hugging Face tokenizer, from its tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rwkv_accel.data.tokenizer import Tokenizer
from rwkv_accel.errors import UserError


class HFTokenizer(Tokenizer):
    """A tokenizer.json, with the eos_token of the tokenizer_config.json beside it as end of text."""

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer as Fast

        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            content = file.read_bytes()
            self._fast = Fast.from_str(content.decode("utf-8"))
        except Exception as error:  # noqa: BLE001  the Rust side raises plain Exception
            raise UserError(f"data.tokenizer {file} cannot be read: {' '.join(str(error).split())}") from None
        self.name = str(path)
        self.identity = f"hf:{hashlib.sha256(content).hexdigest()}"
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        self.eot_id = self._find_eot(file.with_name("tokenizer_config.json"))

    def encode(self, text: str | bytes) -> list[int]:
        return self._encode(text).ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        known = [i for i in ids if 0 <= i < self.vocab_size and i != self.eot_id]
        return self._fast.decode(known, skip_special_tokens=False).encode("utf-8")

    def _width(self, text: str) -> int:
        return len(text)

    def _token_ranges(self, text: str, ids: list[int]) -> list[tuple[int, int]]:
        return self._encode(text).offsets

    def _encode(self, text: str | bytes) -> Any:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self._fast.encode(text, add_special_tokens=False)

    def _find_eot(self, config: Path) -> int:
        remedy = f"put a tokenizer_config.json with an eos_token beside the tokenizer ({config})"
        try:
            token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError):
            raise UserError(f"data.tokenizer {self.name} names no end of text; {remedy}") from None
        text = token.get("content") if isinstance(token, dict) else token
        index = self._fast.token_to_id(text) if isinstance(text, str) else None
        if index is None:
            raise UserError(f"data.tokenizer {self.name}: eos_token {token!r} is no token of it; {remedy}")
        return index
