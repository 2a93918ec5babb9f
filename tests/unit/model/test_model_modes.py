"""One function in three modes: whole rows, pieces with carried state, token by token; and packed documents."""

import dataclasses

import pytest
import torch

from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.model.state import RWKV7State

EXACT = {"rtol": 0, "atol": 1e-10}
BACKENDS = ("reference", "chunked")


def random_ids(batch, num_tokens, vocab_size, seed=0):
    return torch.randint(vocab_size, (batch, num_tokens), generator=torch.Generator().manual_seed(seed))


def assert_states_close(actual: RWKV7State, expected: RWKV7State, **tolerance):
    for field in dataclasses.fields(RWKV7State):
        ours, theirs = getattr(actual, field.name), getattr(expected, field.name)
        assert len(ours) == len(theirs)
        for left, right in zip(ours, theirs):
            torch.testing.assert_close(left, right, **(tolerance or EXACT))


@pytest.fixture(params=BACKENDS)
def model(request, model_of):
    return model_of(backend=request.param)


def test_recurrent_mode_equals_parallel_mode(model):
    ids = random_ids(2, 21, 37)
    with torch.no_grad():
        expected, final = model(ids, return_state=True)
        state = RWKV7State.zeros(model.config, 2, dtype=torch.float64)
        logits = []
        for t in range(ids.shape[1]):
            logits_BV, state = model.forward_one(ids[:, t], state)
            logits.append(logits_BV)
    assert logits[0].shape == (2, 37)
    torch.testing.assert_close(torch.stack(logits, dim=1), expected, **EXACT)
    assert_states_close(state, final)


@pytest.mark.parametrize("cuts", [(1,), (5, 6, 16), (16, 32), (20,)])
def test_pieces_with_carried_state_equal_the_whole(model, cuts):
    ids = random_ids(2, 37, 37, seed=1)
    with torch.no_grad():
        expected, final = model(ids, return_state=True)
        pieces, state = [], None
        for start, stop in zip((0, *cuts), (*cuts, 37)):
            logits, state = model(ids[:, start:stop], state=state, return_state=True)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **EXACT)
    assert_states_close(state, final)


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_gradients_flow_through_a_carried_state(model, checkpointing):
    """Backpropagation through two pieces is that of the whole row."""
    ids, labels = random_ids(2, 20, 37), random_ids(2, 20, 37, seed=2)
    model(ids, labels).backward()
    whole = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing = checkpointing
    loss, state = model(ids[:, :7], labels[:, :7], return_state=True)
    (loss + model(ids[:, 7:], labels[:, 7:], state=state)).backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, whole[name], rtol=1e-9, atol=1e-10, msg=name)


LENGTHS = (1, 5, 16, 2, 13)


def packed_case():
    ids, labels = random_ids(1, sum(LENGTHS), 37, seed=3), random_ids(1, sum(LENGTHS), 37, seed=4)
    labels[0, [2, 9, 30]] = -100
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    return ids, labels, cu_seqlens


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_packed_documents_equal_separate_rows(model, checkpointing):
    ids, labels, cu_seqlens = packed_case()
    model.gradient_checkpointing = checkpointing
    documents = list(zip(ids.split(LENGTHS, dim=1), labels.split(LENGTHS, dim=1)))

    logits, final = model(ids, cu_seqlens=cu_seqlens, return_state=True)
    separate = [model(document, return_state=True) for document, _ in documents]
    torch.testing.assert_close(logits, torch.cat([piece for piece, _ in separate], dim=1), **EXACT)
    assert_states_close(final, RWKV7State.cat([state for _, state in separate]))

    loss = model(ids, labels, cu_seqlens=cu_seqlens)
    loss.backward()
    packed = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad()
    expected = sum(model(document, targets) for document, targets in documents)
    expected.backward()
    torch.testing.assert_close(loss, expected, **EXACT)
    for name, param in model.named_parameters():
        torch.testing.assert_close(packed[name], param.grad, rtol=1e-9, atol=1e-10, msg=name)


def test_packed_documents_continue_their_states(model):
    """Every document of a packed batch picks up its own shift and WKV state."""
    ids, _, cu_seqlens = packed_case()
    with torch.no_grad():
        before = [model(random_ids(1, 4, 37, seed=s), return_state=True)[1] for s in range(len(LENGTHS))]
        logits, final = model(ids, state=RWKV7State.cat(before), cu_seqlens=cu_seqlens.long(), return_state=True)
        separate = [
            model(document, state=state, return_state=True)
            for document, state in zip(ids.split(LENGTHS, dim=1), before)
        ]
    torch.testing.assert_close(logits, torch.cat([piece for piece, _ in separate], dim=1), **EXACT)
    assert_states_close(final, RWKV7State.cat([state for _, state in separate]))


def test_time_state_starts_every_fresh_sequence(model):
    ids, labels, cu_seqlens = packed_case()
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks:
        block.att.time_state = torch.nn.Parameter(torch.randn(2, 32, 32, generator=generator, dtype=torch.float64))
    loss = model(ids, labels, cu_seqlens=cu_seqlens)
    loss.backward()
    packed = [block.att.time_state.grad.clone() for block in model.blocks]
    model.zero_grad()
    expected = 0.0
    for document, targets in zip(ids.split(LENGTHS, dim=1), labels.split(LENGTHS, dim=1)):
        # The same function with the state passed in by hand.
        expected = expected + model(document, targets, state=model.fresh_state(1))
    expected.backward()
    torch.testing.assert_close(loss, expected, **EXACT)
    for block, grad in zip(model.blocks, packed):
        assert grad.abs().max() > 1e-3
        torch.testing.assert_close(grad, block.att.time_state.grad, rtol=1e-9, atol=1e-10)
    zeros = RWKV7State.zeros(model.config, 1, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.allclose(model(ids), model(ids, state=zeros))


def test_hidden_is_what_the_head_gets(model):
    ids, _, cu_seqlens = packed_case()
    with torch.no_grad():
        h_BTC, final = model.hidden(ids, cu_seqlens=cu_seqlens)
        logits, expected = model(ids, cu_seqlens=cu_seqlens, return_state=True)
        torch.testing.assert_close(model.head(h_BTC), logits, rtol=0, atol=0)
        assert_states_close(final, expected, rtol=0, atol=0)
        assert model.hidden(ids, return_state=False)[1].wkv == []


def test_inputs_that_do_not_fit(model_of):
    model = model_of()
    ids = random_ids(1, 6, 37)
    with pytest.raises(ValueError, match="token id 37 is outside the model's vocabulary of 37"):
        model(torch.tensor([[0, 37, 1]]))
    with pytest.raises(ValueError, match="token id -1 is outside"):
        model.forward_one(torch.tensor([-1]), model.fresh_state(1))
    with pytest.raises(ValueError, match="label 40 is neither a token id below 37 nor -100"):
        model(ids, torch.full_like(ids, 40))
    with pytest.raises(ValueError, match=r"non-empty \[batch, tokens\] tensor, got \[1, 0\]"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="differ in shape"):
        model(ids, ids[:, 1:])
    with pytest.raises(ValueError, match="state has 2 rows, the batch has 1 sequences"):
        model(ids, state=model.fresh_state(2))
    for borders in ([0, 3, 3, 6], [0, 5], [1, 6], [0, 4, 2, 6]):
        with pytest.raises(ValueError, match="must rise strictly from 0 to 6"):
            model(ids, cu_seqlens=torch.tensor(borders))
    with pytest.raises(ValueError, match="got 2 rows"):
        model(ids.expand(2, -1), cu_seqlens=torch.tensor([0, 6]))


def test_unfilled_model_cannot_pass_for_a_real_one(tiny_config):
    assert RWKV7(tiny_config)(random_ids(1, 4, 37)).isnan().all()
