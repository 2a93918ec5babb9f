"""RWKV-7 "Goose" (x070) language model with the official parameter names, in parallel and in recurrent mode.

Shapes: B batch, T tokens, C channels, V vocab, H heads, N head size, S sequences of a packed batch, R rows
(tokens). Sources: arXiv 2503.14456; RWKV-LM train_temp/src/model.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rwkv_accel.model.channel_mix import ChannelMix
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.head import LMHead, as_head
from rwkv_accel.model.layers import Documents, LayerNorm, Linear, last_tokens
from rwkv_accel.model.offload import Offload
from rwkv_accel.model.recompute import LayerState, run_block
from rwkv_accel.model.state import RWKV7State
from rwkv_accel.model.time_mix import TimeMix

__all__ = ["RWKV7", "Block", "LMHead", "Linear"]


class Block(nn.Module):
    """x += TimeMix(ln1(x)); x += ChannelMix(ln2(x)). Block 0 first norms the embedding with ln0."""

    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = LayerNorm(config.n_embd)
        self.ln1 = LayerNorm(config.n_embd)
        self.ln2 = LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)
        self.layer = layer

    def forward(
        self,
        x_BTC: Tensor,
        v_first_BTC: Tensor | None,
        state: LayerState | None,
        documents: Documents | None,
        backend: str,
        selective: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x and v_first [B,T,C], then att_shift [B,C], wkv [B,H,N,N], ffn_shift [B,C] (packed: S for B)."""
        att_shift, wkv, ffn_shift = state or (None, None, None)
        if self.layer == 0:
            x_BTC = self.ln0(x_BTC)
        h_BTC = self.ln1(x_BTC)
        mixed_BTC, v_first_BTC, wkv = self.att(h_BTC, v_first_BTC, att_shift, wkv, documents, backend, selective)
        x_BTC = x_BTC + mixed_BTC
        z_BTC = self.ln2(x_BTC)
        x_BTC = x_BTC + self.ffn(z_BTC, ffn_shift, documents)
        return x_BTC, v_first_BTC, last_tokens(h_BTC, documents), wkv, last_tokens(z_BTC, documents)


class RWKV7(nn.Module):
    """RWKV-7 language model. Parameters are NaN until filled by `io.load_model` or a state dict of `init`."""

    def __init__(self, config: RWKV7Config, *, compute_dtype: torch.dtype = torch.float32, wkv_backend: str = "auto"):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.wkv_backend = wkv_backend
        self.gradient_checkpointing = "none"
        """none; block: keep only the input of each block and recompute the rest in the backward pass; offload: the
        same, and keep the inputs on the host; selective: recompute only what lies between the matrix products of the
        time mix."""
        self.l2wrap = 1e-4
        self.loss_chunk_rows = 512
        nan_VC = torch.full((config.vocab_size, config.n_embd), float("nan"))
        self.emb = nn.Embedding(config.vocab_size, config.n_embd, _weight=nan_VC)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_out = LayerNorm(config.n_embd)
        self.head = LMHead(config.n_embd, config.vocab_size)

    def forward(
        self,
        ids_BT: Tensor,
        labels_BT: Tensor | None = None,
        *,
        target_rows: Tensor | None = None,
        state: RWKV7State | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, RWKV7State]:
        """Logits [B,T,V] in the compute dtype, or with labels the fp32 loss sum over labels != -100.

        labels_BT are aligned: labels[t] is the target of position t. `target_rows` are the positions of the labels that
        count in the flattened labels; without them they are looked for, which waits for an accelerator. `state` carries
        the past of each row (None: fresh sequences, which start at `time_state` where the model has one). `cu_seqlens`
        [S+1] packs S documents into a batch of one row; token shift and WKV state restart at every border, and states
        have S rows. With `return_state` the result is (logits or loss, state after the last token of every sequence),
        and the graph goes through the state until the caller detaches it. Raises ValueError for ids or labels outside
        the vocabulary (on the host) and for shapes that do not fit.
        """
        if labels_BT is not None and labels_BT.shape != ids_BT.shape:
            raise ValueError(f"labels {list(labels_BT.shape)} and ids {list(ids_BT.shape)} differ in shape")
        h_BTC, final = self.hidden(ids_BT, state=state, cu_seqlens=cu_seqlens, return_state=return_state)
        if labels_BT is None:
            out = self.head(h_BTC)
        else:
            # A layer that was put in the head's place learns to take labels here, where it is first asked to.
            head, settings = as_head(self.head), {"l2wrap": self.l2wrap, "chunk_rows": self.loss_chunk_rows}
            out = head(h_BTC.flatten(0, 1), labels_BT.flatten(), target_rows, **settings)
        return (out, final) if return_state else out

    def forward_one(self, ids_B: Tensor, state: RWKV7State) -> tuple[Tensor, RWKV7State]:
        """Recurrent mode: one token per row, ids [B] and a state of B rows -> (logits [B,V], new state)."""
        h_BTC, final = self._blocks(ids_B.unsqueeze(1), state, None, "reference", return_state=True)
        return self.head(h_BTC.squeeze(1)), final

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        state: RWKV7State | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, RWKV7State]:
        """What `forward` gives to the head: (final norm's output [B,T,C], final state). Arguments as there.

        For callers that need the logits of few positions: `model.head(h_BTC[:, -1])`. Without `return_state`
        the state comes back empty, and the memory of its layers is free while later layers run.
        """
        documents = None if cu_seqlens is None else Documents.from_cu_seqlens(cu_seqlens, ids_BT)
        return self._blocks(ids_BT, state, documents, self.wkv_backend, return_state)

    def fresh_state(self, batch: int) -> RWKV7State:
        """State of `batch` sequences before their first token: zeros, or `time_state` if the model has it."""
        device = self.ln_out.weight.device
        state = RWKV7State.zeros(self.config, batch, dtype=self.compute_dtype, device=device)
        for layer, block in enumerate(self.blocks):
            if block.att.time_state is not None:
                state.wkv[layer] = state.wkv[layer] + block.att.time_state.to(state.wkv[layer].dtype)
        return state

    def _blocks(
        self,
        ids_BT: Tensor,
        state: RWKV7State | None,
        documents: Documents | None,
        backend: str,
        return_state: bool,
    ) -> tuple[Tensor, RWKV7State]:
        self._check_ids(ids_BT)
        rows = ids_BT.shape[0] if documents is None else len(documents.first_S)
        if state is not None and state.batch_size != rows:
            raise ValueError(f"the state has {state.batch_size} rows, the batch has {rows} sequences")
        mode = self.gradient_checkpointing
        recompute, selective = mode in ("block", "offload"), mode == "selective"
        offload = Offload() if mode == "offload" else None
        final = RWKV7State([], [], [])
        x_BTC = self.emb(ids_BT).to(self.compute_dtype)
        v_first_BTC = None
        for layer, block in enumerate(self.blocks):
            args = (x_BTC, v_first_BTC, None if state is None else state.layer(layer), documents, backend, selective)
            out = run_block(block, *args, offload=offload) if recompute else block(*args)
            x_BTC, v_first_BTC = out[:2]
            if return_state:
                for kept, value in zip((final.att_shift, final.wkv, final.ffn_shift), out[2:]):
                    kept.append(value)
            del out
        return self.ln_out(x_BTC), final

    def _check_ids(self, ids_BT: Tensor) -> None:
        if ids_BT.dim() != 2 or ids_BT.numel() == 0:
            raise ValueError(f"token ids must be a non-empty [batch, tokens] tensor, got {list(ids_BT.shape)}")
        # An accelerator checks on its own, asynchronously; looking at the values here would wait for it.
        if ids_BT.device.type != "cpu":
            return
        vocab_size = self.config.vocab_size
        low, high = (int(v) for v in ids_BT.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}: "
                "the data was encoded with another tokenizer than the model's"
            )
