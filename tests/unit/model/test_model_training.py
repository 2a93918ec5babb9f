"""What training relies on: the loss, gradient checkpointing, frozen parts, adapter heads, precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rwkv_accel.model import head, time_mix
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.layers import LayerNorm
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.ops.wkv7 import BACKENDS
from rwkv_accel.ops.wkv7.decay import reading_w_log
from rwkv_accel.ops.wkv7.reference import wkv7_reference


def batch(seed=0, batch_size=2, num_tokens=19, vocab_size=37):
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(vocab_size, (2, batch_size, num_tokens), generator=generator)
    labels[0, :5] = -100
    labels[1, 11] = -100
    return ids, labels


def gradients(model, *args, **kwargs):
    model.zero_grad()
    loss = model(*args, **kwargs)
    loss.backward()
    return loss.detach(), {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same_gradients(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert (actual[name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(actual[name], grad, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("chunk_rows", [1, 7, 512])
def test_loss_is_the_cross_entropy_sum_of_the_logits(model_of, chunk_rows):
    model = model_of()
    model.l2wrap, model.loss_chunk_rows = 0.0, chunk_rows
    ids, labels = batch()
    loss, ours = gradients(model, ids, labels)
    assert loss.dim() == 0
    model.zero_grad()
    logits = model(ids)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    assert_same_gradients(ours, {n: p.grad for n, p in model.named_parameters()}, rtol=1e-9, atol=1e-11)


def test_loss_settings_reach_the_loss(model_of, monkeypatch):
    """L2Wrap changes gradients only, so that the loss alone would not show a lost setting."""
    seen = []

    def spy(hidden, weight, labels, **settings):
        seen.append(settings)
        return original(hidden, weight, labels, **settings)

    original = head.linear_cross_entropy_sum
    monkeypatch.setattr(head, "linear_cross_entropy_sum", spy)
    model = model_of()
    assert model.l2wrap == 1e-4
    model.l2wrap, model.loss_chunk_rows = 0.0, 5
    loss, plain = gradients(model, *batch())
    model.l2wrap = 0.5
    wrapped_loss, wrapped = gradients(model, *batch())
    common = {"chunk_rows": 5, "target_rows": None}
    assert seen == [{"l2wrap": 0.0, **common}, {"l2wrap": 0.5, **common}]
    assert wrapped_loss == loss
    assert (wrapped["head.weight"] - plain["head.weight"]).abs().max() > 0.1


class AdapterHead(nn.Linear):
    """Stands for any adapter layer in the head's place; counts the logit rows it makes at a time."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False, dtype=base.weight.dtype)
        self.weight = base.weight
        self.delta = nn.Parameter(torch.full_like(base.weight, 0.01))
        self.rows = []

    def forward(self, x):
        self.rows.append(x.numel() // x.shape[-1])
        return F.linear(x, self.weight + self.delta)


def test_adapter_in_the_heads_place_is_fed_in_chunks_of_target_rows(model_of):
    model = model_of()
    model.loss_chunk_rows, model.l2wrap = 8, 1e-2
    ids, labels = batch()
    plain = copy.deepcopy(model)
    with torch.no_grad():
        plain.head.weight += 0.01
    expected_loss, expected = gradients(plain, ids, labels)
    model.head = AdapterHead(model.head)
    loss, ours = gradients(model, ids, labels)
    num_targets = int((labels != -100).sum())
    assert max(model.head.rows) == 8
    # Each row's logits are made once, and in the head's own call.
    assert sum(model.head.rows) == num_targets
    assert isinstance(model.head, AdapterHead)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.pop("head.delta"), expected["head.weight"], rtol=1e-9, atol=1e-11)
    assert_same_gradients(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("adapter_head", [False, True])
def test_batch_without_targets_gives_a_zero_gradient_to_every_parameter(model_of, adapter_head):
    """A process whose micro-batch is a dummy takes part in the gradient exchange like the others."""
    model = model_of()
    if adapter_head:
        model.head = AdapterHead(model.head)
    ids, _ = batch()
    loss, grads = gradients(model, ids, torch.full_like(ids, -100))
    assert loss.item() == 0.0
    for name, grad in grads.items():
        assert grad is not None, name
        assert not grad.any(), name


def test_each_gradient_is_accumulated_once_per_backward(model_of):
    """Engines that shard or average gradients count on one accumulation per parameter and backward pass."""
    model = model_of()
    model.head = AdapterHead(model.head)
    model.gradient_checkpointing, model.loss_chunk_rows = "block", 4
    fired = dict.fromkeys(dict(model.named_parameters()), 0)

    def count(name):
        fired[name] += 1

    for name, param in model.named_parameters():
        param.register_post_accumulate_grad_hook(lambda _, name=name: count(name))
    model(*batch()).backward()
    assert set(fired.values()) == {1}


def test_checkpointing_carries_the_gradient_of_a_state(model_of):
    model = model_of()
    ids, labels = batch()
    grads = []
    for mode in ("none", "block", "selective"):
        model.gradient_checkpointing = mode
        state = model(ids[:, :4], return_state=True)[1].detach()
        leaves = [t.requires_grad_(True) for layer in range(3) for t in state.layer(layer)]
        model(ids, labels, state=state).backward()
        grads.append([leaf.grad for leaf in leaves])
    for other in grads[1:]:
        assert all(
            torch.allclose(a, b, rtol=1e-12, atol=1e-12) and a.any() for a, b in zip(grads[0], other, strict=True)
        )


class DropoutLinear(nn.Linear):
    """A trained layer whose forward is random."""

    def forward(self, x):
        return F.linear(F.dropout(x, 0.3), self.weight)


def with_dropout(model):
    for block in model.blocks:
        for part, name in ((block.att, "key"), (block.ffn, "value")):
            base = getattr(part, name)
            layer = DropoutLinear(base.in_features, base.out_features, bias=False, dtype=base.weight.dtype)
            layer.weight = base.weight
            setattr(part, name, layer)


@pytest.mark.parametrize(("trained", "recomputed"), [("all", 3), ("one vector", 2), ("dropout layers", 3)])
@pytest.mark.parametrize("mode", ["block", "selective"])
def test_gradient_checkpointing_changes_nothing(model_of, monkeypatch, mode, trained, recomputed):
    model = model_of()
    ids, labels = batch()
    if trained == "one vector":
        # The inputs of all blocks but the last need no gradient.
        model.requires_grad_(False)
        model.blocks[1].att.a0.requires_grad_(True)
    if trained == "dropout layers":
        model.requires_grad_(False)
        with_dropout(model)
        for block in model.blocks:
            block.att.key.weight.requires_grad_(True)
    torch.manual_seed(0)
    loss, expected = gradients(model, ids, labels)
    calls, original = [], time_mix.wkv7
    monkeypatch.setattr(time_mix, "wkv7", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    model.gradient_checkpointing = mode
    torch.manual_seed(0)
    checkpointed_loss, ours = gradients(model, ids, labels)
    # Blocks in front of all that trains are not differentiated, and run once.
    assert len(calls) == 3 + recomputed
    assert torch.equal(checkpointed_loss, loss)
    assert any(grad is not None for grad in expected.values())
    # Selective checkpointing adds up the gradients of a value in another order.
    rounding = 0 if mode == "block" else 1e-12
    assert_same_gradients(ours, expected, rtol=rounding, atol=rounding)
    with torch.no_grad():
        assert torch.isfinite(model(ids, labels))
    assert len(calls) == 6 + recomputed


def test_checkpointing_keeps_only_block_inputs(model_of):
    """Bytes that autograd holds between forward and backward, counted by storage."""

    def saved_bytes(model):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*batch(num_tokens=64))
        owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
        del loss
        return sum(size for pointer, size in storages.items() if pointer not in owned)

    model = model_of()
    row_bytes = 2 * 64 * 64 * 8
    kept = {}
    for model.gradient_checkpointing in ("none", "selective", "block"):
        kept[model.gradient_checkpointing] = saved_bytes(model) / row_bytes
    assert kept["block"] < 12
    # The reference recurrence keeps its states of every token: the part that selective checkpointing is for.
    assert kept["block"] < kept["selective"] < 0.75 * kept["none"]
    model.wkv_backend = "chunked"
    for model.gradient_checkpointing in ("none", "selective"):
        kept[model.gradient_checkpointing] = saved_bytes(model) / row_bytes
    assert kept["block"] < kept["selective"] < 0.85 * kept["none"]


def test_frozen_base_costs_no_gradient_work(model_of):
    model = model_of()
    model.requires_grad_(False)
    model.blocks[1].ffn.value.weight.requires_grad_(True)
    needs_grad = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: needs_grad.append(out[0].requires_grad))
    ids, labels = batch()
    _, grads = gradients(model, ids, labels)
    # The graph begins at the trained weight: nothing in front of it is differentiated.
    assert needs_grad == [False, True, True]
    assert {name for name, grad in grads.items() if grad is not None} == {"blocks.1.ffn.value.weight"}
    assert grads["blocks.1.ffn.value.weight"].abs().max() > 0


def test_value_matrices_of_layer_0_are_kept_but_never_trained(tiny_config, tensors_of):
    config = RWKV7Config(**{**tiny_config.__dict__, "has_layer0_value": True})
    model = RWKV7(config, compute_dtype=torch.float64, wkv_backend="reference").double()
    tensors = tensors_of(config)
    model.load_state_dict(tensors)
    model.requires_grad_(True)
    ids, labels = batch()
    _, grads = gradients(model, ids, labels)
    assert all(grad is not None and grad.any() for grad in grads.values())
    assert set(tensors) - set(grads) == {f"blocks.0.att.v{i}" for i in range(3)}
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        before = model(ids)
        model.blocks[0].att.v1.add_(1.0)
        assert torch.equal(model(ids), before)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_arithmetic_stays_close_to_fp32(model_of, weights):
    """bf16 activations, on fp32 weights (mixed) and on bf16 weights (true)."""
    ids, labels = batch(num_tokens=40)
    exact = model_of(dtype=torch.float32)
    with torch.no_grad():
        # The same numbers on both sides, so that only the arithmetic differs.
        for param in exact.parameters():
            param.copy_(param.bfloat16())
    expected_loss, expected = gradients(exact, ids, labels)
    model = RWKV7(exact.config, compute_dtype=torch.bfloat16, wkv_backend="reference").to(weights)
    model.load_state_dict(exact.state_dict())
    loss, grads = gradients(model, ids, labels)
    logits, state = model(ids, return_state=True)
    assert (loss.dtype, logits.dtype, state.wkv[0].dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert {grad.dtype for grad in grads.values()} == {weights}
    assert loss.item() == pytest.approx(expected_loss.item(), rel=5e-3)
    for name, grad in expected.items():
        similarity = F.cosine_similarity(grads[name].flatten().float(), grad.flatten(), dim=0).item()
        assert similarity > 0.99, name


def test_decay_keeps_the_precision_of_its_bias_in_bf16(model_of, monkeypatch):
    """w0 near -8 has steps of 1/32 in bf16; the decay must see the fp32 value."""
    seen = []

    def spy(r, w_log, *others):
        seen.append((w_log, r.dtype, *(x.dtype for x in others[:4])))
        return wkv7_reference(r, w_log, *others)

    monkeypatch.setitem(BACKENDS, "reference", reading_w_log(spy))
    model = RWKV7(model_of().config, compute_dtype=torch.bfloat16, wkv_backend="reference")
    model.load_state_dict(model_of().state_dict())
    with torch.no_grad():
        for block in model.blocks:
            block.att.w2.zero_()
            block.att.w0.fill_(-8.01)
    with torch.no_grad():
        model(batch()[0])
    expected = -torch.exp(torch.tensor(-0.5)) * torch.sigmoid(torch.tensor(-8.01))
    assert len(seen) == model.config.n_layer
    for w_log, *others in seen:
        assert set(others) == {torch.bfloat16}
        torch.testing.assert_close(w_log, expected.expand_as(w_log), rtol=1e-6, atol=0)


def test_norm_gradients_are_summed_wide_over_many_bf16_rows():
    generator = torch.Generator().manual_seed(0)
    norm = LayerNorm(64, dtype=torch.bfloat16)
    x, grad = torch.randn(2, 4096, 64, generator=generator, dtype=torch.bfloat16)
    norm(x).backward(grad)
    exact = LayerNorm(64, dtype=torch.float64)
    exact(x.double()).backward(grad.double())
    for ours, theirs in ((norm.weight, exact.weight), (norm.bias, exact.bias)):
        # One rounding to bf16 at the end is all that is lost.
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2**-8, atol=1e-4)
