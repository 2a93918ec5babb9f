"""Sizes of an RWKV-7 model, read from tensor shapes and never typed by a user.

Shapes: V vocab, C channels, L layers, H heads, N head size, F ffn width, R inner rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rwkv_accel.errors import UserError

Shape = tuple[int, ...]

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_LERPS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")


@dataclass(frozen=True)
class RWKV7Config:
    """Every size of an x070 model. `has_layer0_value`: layer 0 carries the v0, v1, v2 that it never uses."""

    vocab_size: int
    n_embd: int
    n_layer: int
    head_size: int
    dim_ffn: int
    decay_rank: int
    iclr_rank: int
    value_rank: int
    gate_rank: int
    has_layer0_value: bool = False

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if name != "has_layer0_value" and getattr(self, name) < 1:
                raise UserError(f"RWKV-7 config: {name} is {getattr(self, name)}, it must be at least 1")
        if self.n_embd % self.head_size:
            raise UserError(
                f"RWKV-7 config: n_embd {self.n_embd} is not a multiple of head_size {self.head_size}; "
                f"use {max(1, self.n_embd // self.head_size) * self.head_size}"
            )

    @property
    def n_head(self) -> int:
        """Heads H = C / N."""
        return self.n_embd // self.head_size

    @classmethod
    def for_new_model(cls, n_layer: int, n_embd: int, vocab_size: int, head_size: int = 64) -> RWKV7Config:
        """Config with the inner ranks of the current official trainer (RWKV-LM train_temp/src/model.py)."""

        def rank(factor: float) -> int:
            return max(32, round(factor * n_embd**0.5 / 32) * 32)

        return cls(
            vocab_size=vocab_size,
            n_embd=n_embd,
            n_layer=n_layer,
            head_size=head_size,
            dim_ffn=4 * n_embd,
            decay_rank=rank(2.5),
            iclr_rank=rank(2.5),
            value_rank=rank(1.7),
            gate_rank=rank(5),
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> RWKV7Config:
        """Config of a checkpoint, from its parameter shapes alone (ranks are read, never derived from C).

        Raises UserError for a missing key that sizes are read from, and for sizes that contradict each other.
        """

        def dims(name: str, num_dims: int = 2) -> Shape:
            if name not in shapes:
                raise UserError(f"no `{name}` among the tensors: not a complete RWKV-7 (x070) checkpoint")
            if len(shapes[name]) != num_dims:
                raise UserError(f"`{name}` has shape {list(shapes[name])}, expected {num_dims} dimensions")
            return shapes[name]

        vocab_size, n_embd = dims("emb.weight")
        n_head, head_size = dims("blocks.0.att.r_k")
        if n_head * head_size != n_embd:
            raise UserError(
                f"`blocks.0.att.r_k` {[n_head, head_size]} does not fit the {n_embd} channels of `emb.weight`"
            )
        layers = {int(match[1]) for name in shapes if (match := _BLOCK.match(name))}
        if missing := sorted(set(range(max(layers))) - layers):
            raise UserError(f"blocks {missing[:5]} of {max(layers) + 1} are missing: the checkpoint is incomplete")
        has_layer0_value = "blocks.0.att.v1" in shapes
        # Layer 0 never uses its value matrices; a one-layer model without them has no rank, any will do.
        if len(layers) > 1:
            value_rank = dims("blocks.1.att.v1")[1]
        else:
            value_rank = dims("blocks.0.att.v1")[1] if has_layer0_value else 32
        return cls(
            vocab_size=vocab_size,
            n_embd=n_embd,
            n_layer=len(layers),
            head_size=head_size,
            dim_ffn=dims("blocks.0.ffn.key.weight")[0],
            decay_rank=dims("blocks.0.att.w1")[1],
            iclr_rank=dims("blocks.0.att.a1")[1],
            value_rank=value_rank,
            gate_rank=dims("blocks.0.att.g1")[1],
            has_layer0_value=has_layer0_value,
        )


def parameter_shapes(config: RWKV7Config) -> dict[str, Shape]:
    """Official name -> shape of every tensor in a checkpoint of this config (RWKV-LM train_temp README)."""
    c = config
    vector, square = (1, 1, c.n_embd), (c.n_embd, c.n_embd)
    shapes: dict[str, Shape] = {"emb.weight": (c.vocab_size, c.n_embd)}

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (c.n_embd,)

    for layer in range(c.n_layer):
        block = f"blocks.{layer}"
        for name in (("ln0",) if layer == 0 else ()) + ("ln1", "ln2"):
            norm(f"{block}.{name}")
        att = f"{block}.att"
        for name in _LERPS:
            shapes[f"{att}.{name}"] = vector
        ranks = {"w": c.decay_rank, "a": c.iclr_rank, "v": c.value_rank, "g": c.gate_rank}
        for name, rank in ranks.items():
            if name == "v" and layer == 0 and not c.has_layer0_value:
                continue
            if name != "g":
                shapes[f"{att}.{name}0"] = vector
            shapes[f"{att}.{name}1"] = (c.n_embd, rank)
            shapes[f"{att}.{name}2"] = (rank, c.n_embd)
        shapes[f"{att}.k_k"] = shapes[f"{att}.k_a"] = vector
        shapes[f"{att}.r_k"] = (c.n_head, c.head_size)
        for name in ("receptance", "key", "value", "output"):
            shapes[f"{att}.{name}.weight"] = square
        norm(f"{att}.ln_x")
        shapes[f"{block}.ffn.x_k"] = vector
        shapes[f"{block}.ffn.key.weight"] = (c.dim_ffn, c.n_embd)
        shapes[f"{block}.ffn.value.weight"] = (c.n_embd, c.dim_ffn)
    norm("ln_out")
    shapes["head.weight"] = (c.vocab_size, c.n_embd)
    return shapes
