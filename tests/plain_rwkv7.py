"""RWKV-7 in float64, token by token, from the paper's formulas (arXiv 2503.14456): shares no code with the package."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def document_loss(weights: dict[str, Tensor], ids: list[int], is_target: list[bool]) -> Tensor:
    """Sum of -log p over the target tokens of one document that starts from a zero state."""
    log_p_TV = torch.log_softmax(logits(weights, ids[:-1]), -1)
    return -sum(log_p_TV[t, ids[t + 1]] for t in range(len(ids) - 1) if is_target[t + 1])


def logits(weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """[T, V] after each of the tokens."""
    w = {name: tensor.reshape(-1) if tensor.dim() == 3 else tensor for name, tensor in weights.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    x_TC = _norm(w["emb.weight"][ids], w, "blocks.0.ln0")
    v_first = None
    for layer in range(layers):
        block = f"blocks.{layer}"
        mixed, v_first = _time_mix(w, f"{block}.att", _norm(x_TC, w, f"{block}.ln1"), v_first)
        x_TC = x_TC + mixed
        h_TC = _norm(x_TC, w, f"{block}.ln2")
        shifted = h_TC + (_previous(h_TC) - h_TC) * w[f"{block}.ffn.x_k"]
        x_TC = x_TC + (shifted @ w[f"{block}.ffn.key.weight"].T).relu() ** 2 @ w[f"{block}.ffn.value.weight"].T
    return _norm(x_TC, w, "ln_out") @ w["head.weight"].T


def _time_mix(w: dict[str, Tensor], att: str, h_TC: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
    p = {name.removeprefix(f"{att}."): tensor for name, tensor in w.items() if name.startswith(f"{att}.")}
    heads, size = p["r_k"].shape
    delta = _previous(h_TC) - h_TC
    h = {name: h_TC + delta * p[f"x_{name}"] for name in "rwkvag"}
    r, k, v = (h[n] @ p[f"{full}.weight"].T for n, full in (("r", "receptance"), ("k", "key"), ("v", "value")))
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(p["w0"] + torch.tanh(h["w"] @ p["w1"]) @ p["w2"]))
    rate = torch.sigmoid(p["a0"] + h["a"] @ p["a1"] @ p["a2"])
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(p["v0"] + h["v"] @ p["v1"] @ p["v2"])
    gate = torch.sigmoid(h["g"] @ p["g1"]) @ p["g2"]
    removal = F.normalize((k * p["k_k"]).view(-1, heads, size), dim=-1, eps=1e-12)
    k = k * (1 + (rate - 1) * p["k_a"])
    r, k, v, decay, rate = (x.view(-1, heads, size) for x in (r, k, v, decay, rate))
    state = torch.zeros(heads, size, size, dtype=h_TC.dtype)  # [head, value, key]
    out = []
    for t in range(len(h_TC)):
        removed = torch.einsum("hvk,hk->hv", state, removal[t])
        state = state * decay[t][:, None, :] - removed[:, :, None] * (removal[t] * rate[t])[:, None, :]
        state = state + v[t][:, :, None] * k[t][:, None, :]
        out.append(torch.einsum("hvk,hk->hv", state, r[t]))
    y = torch.stack(out)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 64e-5).sqrt()
    y = y.flatten(1) * p["ln_x.weight"] + p["ln_x.bias"]
    y = y + ((r * k * p["r_k"]).sum(-1, keepdim=True) * v).flatten(1)
    return (y * gate) @ p["output.weight"].T, v_first


def _norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def _previous(h_TC: Tensor) -> Tensor:
    return F.pad(h_TC, (0, 0, 1, -1))
