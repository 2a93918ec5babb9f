"""One token per row with as few operations as possible: at small sizes a step costs its calls, not its numbers.

Shapes: R rows (sequences), C channels, H heads, N head size, V vocab. "Wide" is fp32, or fp64 for an fp64 model.
The formulas are those of model/time_mix.py and model/channel_mix.py for T = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_accel.model.precision import wide_dtype
from rwkv_accel.model.rwkv7 import RWKV7, Block
from rwkv_accel.model.state import RWKV7State
from rwkv_accel.ops.wkv7.step import StepInputs, StepWeights, wkv7_step


@dataclass(slots=True)
class _LayerWeights:
    """Small tensors of one block, squeezed and cast once; projections stay modules (they may be adapted)."""

    att: Any
    ffn: Any
    ln1: tuple[Tensor, Tensor]
    ln2: tuple[Tensor, Tensor]
    lerp_61C: Tensor
    ffn_lerp_C: Tensor
    decay: tuple[Tensor, Tensor, Tensor]
    iclr: tuple[Tensor, Tensor, Tensor]
    value: tuple[Tensor, Tensor, Tensor] | None
    gate: tuple[Tensor, Tensor]
    step: StepWeights


class RecurrentStep:
    """Recurrent mode of a model, for inference. Holds casts of small tensors: build it anew after a change."""

    def __init__(self, model: RWKV7):
        self.model, self.dtype = model, model.compute_dtype
        self.wide = wide_dtype(self.dtype)
        self.eps = model.blocks[0].att.ln_x.eps
        self.layers = [self._layer(block) for block in model.blocks]
        self.ln0 = self._norm(model.blocks[0].ln0)
        self.ln_out = self._norm(model.ln_out)

    def step(self, ids_R: Tensor, state: RWKV7State) -> tuple[Tensor, RWKV7State]:
        """ids [R] and a state of R rows -> (logits [R,V], the same state, advanced in place)."""
        x_RC = self._normed(self.model.emb(ids_R), self.ln0)
        v_first: Tensor | None = None
        for index, layer in enumerate(self.layers):
            h_RC = self._normed(x_RC, layer.ln1)
            mixed_RC, v_first = self._time_mix(layer, h_RC, state.att_shift[index], state.wkv[index], v_first)
            state.att_shift[index] = h_RC
            x_RC = x_RC + mixed_RC
            z_RC = self._normed(x_RC, layer.ln2)
            lerped_RC = torch.addcmul(z_RC, state.ffn_shift[index] - z_RC, layer.ffn_lerp_C)
            state.ffn_shift[index] = z_RC
            x_RC = x_RC + layer.ffn.value(torch.relu_(layer.ffn.key(lerped_RC)).square_())
        return self.model.head(self._normed(x_RC, self.ln_out)), state

    def _normed(self, x_RC: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(x_RC.to(self.wide), x_RC.shape[-1:], *norm).to(self.dtype)

    def _time_mix(
        self, layer: _LayerWeights, h_RC: Tensor, shift_RC: Tensor, state_RHNN: Tensor, v_first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h_r, h_w, h_k, h_v, h_a, h_g = torch.addcmul(h_RC, shift_RC - h_RC, layer.lerp_61C).unbind(0)
        r_RC, k_RC, v_RC = layer.att.receptance(h_r), layer.att.key(h_k), layer.att.value(h_v)
        w0, w1, w2 = layer.decay
        w_logit = torch.addmm(w0, torch.tanh_(h_w @ w1), w2)
        a0, a1, a2 = layer.iclr
        iclr_RC = torch.addmm(a0, h_a @ a1, a2).sigmoid_()
        gate_RC = torch.sigmoid_(h_g @ layer.gate[0]) @ layer.gate[1]
        if layer.value is None:
            v_first = v_RC
        else:
            assert v_first is not None
            v0, v1, v2 = layer.value
            v_RC = torch.lerp(v_RC, v_first, torch.addmm(v0, h_v @ v1, v2).sigmoid_())

        x = StepInputs(r_RC, w_logit, k_RC, v_RC, iclr_RC, gate_RC)
        return layer.att.output(wkv7_step(x, layer.step, state_RHNN, self.eps)), v_first

    def _layer(self, block: Block) -> _LayerWeights:
        att, dtype, wide = block.att, self.dtype, self.wide

        def vector(tensor: Tensor, to: torch.dtype = dtype) -> Tensor:
            return tensor.detach().flatten().to(to)

        def low_rank(name: str) -> tuple[Tensor, Tensor, Tensor]:
            zero, one, two = (getattr(att, name + digit) for digit in "012")
            return vector(zero), one.detach().to(dtype), two.detach().to(dtype)

        lerp = torch.stack([vector(getattr(att, f"x_{name}")) for name in "rwkvag"]).unsqueeze(1)
        return _LayerWeights(
            att=att,
            ffn=block.ffn,
            ln1=self._norm(block.ln1),
            ln2=self._norm(block.ln2),
            lerp_61C=lerp,
            ffn_lerp_C=vector(block.ffn.x_k),
            decay=low_rank("w"),
            iclr=low_rank("a"),
            value=low_rank("v") if att.layer > 0 else None,
            gate=(att.g1.detach().to(dtype), att.g2.detach().to(dtype)),
            step=StepWeights(
                k_k=vector(att.k_k, wide),
                k_a=vector(att.k_a, wide),
                r_k=vector(att.r_k, wide),
                norm_weight=vector(att.ln_x.weight, wide),
                norm_bias=vector(att.ln_x.bias, wide),
            ),
        )

    def _norm(self, norm: Any) -> tuple[Tensor, Tensor]:
        return norm.weight.detach().to(self.wide), norm.bias.detach().to(self.wide)
