"""Tokenizers: RWKV World and plain bytes, both with byte-level decoding that accepts any ids.

Token 0 is end of text in both. It is not part of any vocabulary: no text encodes to it, the data layer
appends it.
"""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rwkv_accel.errors import UserError

EOT_ID = 0
WORLD_FIRST_ID, WORLD_LAST_ID = 1, 65529


class Tokenizer(ABC):
    """Text <-> token ids. `vocab_size` is the number of embedding rows that a model for it has."""

    name: str
    identity: str
    """What the ids depend on: a cache of tokens is valid for one identity."""
    vocab_size: int
    eot_id: int = EOT_ID

    @abstractmethod
    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of the text, without end of text. Raises UserError for a str that has no UTF-8 form."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind the ids; end of text and ids outside of the vocabulary give nothing."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; what is not valid UTF-8 (a character cut in half) becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def encode_spans(self, spans: Sequence[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
        """Tokenise adjoining spans as one string; a token is a target if it lies wholly in target spans."""
        text = "".join(part for part, _ in spans)
        ids = self.encode(text)
        flags = {is_target for part, is_target in spans if part}
        if len(flags) <= 1:
            return ids, [flags == {True}] * len(ids)
        in_target = b"".join((b"\x01" if is_target else b"\x00") * self._width(part) for part, is_target in spans)
        # A token without a width (a prefix that the tokenizer adds) counts as the character it stands before.
        mask = [all(in_target[start : max(end, start + 1)]) for start, end in self._token_ranges(text, ids)]
        return ids, mask

    def _width(self, text: str) -> int:
        """Length of the text in the unit that _token_ranges counts in."""
        return len(text.encode("utf-8"))

    def _token_ranges(self, text: str, ids: list[int]) -> list[tuple[int, int]]:
        ranges, start = [], 0
        for token in ids:
            end = start + len(self.decode_bytes((token,)))
            ranges.append((start, end))
            start = end
        return ranges


class ByteTokenizer(Tokenizer):
    """One id per byte, id = byte + 1: the same ids that World gives single bytes."""

    name = identity = "byte"
    vocab_size = 257

    def encode(self, text: str | bytes) -> list[int]:
        return [byte + 1 for byte in _to_bytes(text)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(token - 1 for token in ids if 1 <= token <= 256)


class WorldTokenizer(Tokenizer):
    """RWKV World vocabulary: greedy longest match over UTF-8 bytes, by the package pyrwkv-tokenizer.

    Only its encoder is used: its decoder panics on a cut character and on ids that do not exist.
    """

    name = "world"
    identity = "world rwkv_vocab_v20230424"
    vocab_size = 65536

    def encode(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            try:
                return self._rust.encode(text.decode("utf-8"))
            except UnicodeDecodeError:
                return self._encode_invalid(text)
        _to_bytes(text)
        return self._rust.encode(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        table = self._bytes_of
        return b"".join(table[token] for token in ids if WORLD_FIRST_ID <= token <= WORLD_LAST_ID)

    @cached_property
    def _rust(self) -> Any:
        from pyrwkv_tokenizer import RWKVTokenizer

        return RWKVTokenizer()

    @cached_property
    def _bytes_of(self) -> list[bytes]:
        return read_world_vocabulary()

    @cached_property
    def _id_of(self) -> dict[bytes, int]:
        return {token: index for index, token in enumerate(self._bytes_of) if token}

    def _encode_invalid(self, data: bytes) -> list[int]:
        """Greedy longest match for bytes that are no UTF-8, which the package does not take."""
        ids, start, longest = [], 0, max(map(len, self._bytes_of))
        while start < len(data):
            end = min(start + longest, len(data))
            while data[start:end] not in self._id_of:
                end -= 1
            ids.append(self._id_of[data[start:end]])
            start = end
        return ids


def read_world_vocabulary(path: Path | None = None) -> list[bytes]:
    """Bytes of each World id, indexed by id (empty for 0), from a file of lines `id literal length`.

    Without a path: the file that pyrwkv-tokenizer ships.

    Raises:
        UserError: the file is not the complete vocabulary.
    """
    if path is None:
        import pyrwkv_tokenizer

        path = Path(pyrwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
    table = [b""] * (WORLD_LAST_ID + 1)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        for line in filter(None, (line.rstrip("\r") for line in lines)):
            # The literal may hold spaces: split at the first and at the last one.
            index, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            plain = "\\" not in literal and literal[0] in "'\""
            value = literal[1:-1] if plain else ast.literal_eval(literal)
            token = value if isinstance(value, bytes) else value.encode("utf-8")
            if len(token) != int(length):
                raise ValueError(line)
            table[int(index)] = token
    except (OSError, ValueError, SyntaxError, IndexError) as error:
        raise UserError(f"vocabulary {path} cannot be read ({error}); reinstall pyrwkv-tokenizer") from None
    missing = sum(not token for token in table[WORLD_FIRST_ID:])
    if missing:
        raise UserError(f"vocabulary {path} lacks {missing} of {WORLD_LAST_ID} tokens; reinstall pyrwkv-tokenizer")
    return table


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: world, byte, or the path of a Hugging Face tokenizer.

    World and byte are cheap; their tables are read at first use.
    """
    if name == "world":
        return WorldTokenizer()
    if name == "byte":
        return ByteTokenizer()
    if Path(name).exists():
        from rwkv_accel.data.hf_tokenizer import HFTokenizer

        return HFTokenizer(name)
    raise UserError(
        f"tokenizer {name!r} is neither world nor byte nor a file; give the path of a tokenizer.json or its folder"
    )


def _to_bytes(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"text holds half of a surrogate pair (U+{code:04X} at character {error.start}), which has no "
            "UTF-8 form; repair the text"
        ) from None
