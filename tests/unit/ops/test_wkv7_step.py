"""The decode step against the recurrence over one token, and its refusals."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_accel.ops.wkv7 import wkv7
from rwkv_accel.ops.wkv7.step import StepInputs, StepWeights, wkv7_step
from tests.unit.ops.wkv7_cases import step_case

EPS = 64e-5


def by_the_recurrence(x, weights, state):
    """Output [R,C] and new state from the reference backend and torch's own group norm."""
    rows, heads, size, _ = state.shape
    per_head = (rows, 1, heads, size)
    kappa = F.normalize((x.k * weights.k_k).view(per_head), dim=-1, eps=1e-12)
    k = (x.k * (1 + (x.rate - 1) * weights.k_a)).view(per_head)
    r, w_low, v, rate = (t.view(per_head) for t in (x.r, x.w_logit, x.v, x.rate))
    w0 = torch.zeros(heads, size)
    y, final = wkv7(r, w_low, k, v, -kappa, kappa * rate, w0, state=state, backend="reference")
    normed = F.group_norm(y.view(rows, -1), heads, weights.norm_weight, weights.norm_bias, EPS)
    bonus = (r * k * weights.r_k.view(heads, size)).sum(-1, keepdim=True) * v
    return (normed + bonus.view(rows, -1)) * x.gate, final


def test_is_the_recurrence_of_one_token():
    x, weights, state = step_case(3, 2, 16, torch.float64)
    x.k[0, :16] = 0  # a key of zeros has no direction
    want, want_state = by_the_recurrence(x, weights, state)
    out = wkv7_step(x, weights, state, EPS)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, want_state, rtol=1e-12, atol=1e-12)


def test_inputs_stay_as_they_are():
    x, weights, state = step_case(2, 2, 16, torch.float32)
    before = [t.clone() for t in (*x, *weights)]
    wkv7_step(x, weights, state, EPS)
    assert all(torch.equal(one, two) for one, two in zip((*x, *weights), before))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, w, s: (x, w, s[0]),
            r"^the state must be a non-empty .* tensor, got \[2, 16, 16\]$",
        ),
        (lambda x, w, s: (x, w, s[:0]), "^the state must be a non-empty"),
        (lambda x, w, s: (x, w, s.double()), "^the state must be a contiguous torch.float32 tensor, got torch.float64"),
        (lambda x, w, s: (x, w, s.mT), "^the state must be a contiguous"),
        (lambda x, w, s: (x._replace(k=x.k[:1]), w, s), r"^k must be \[2, 32\] for a state of .*, got \[1, 32\]$"),
        (lambda x, w, s: (x._replace(v=x.v.bfloat16()), w, s), "^v must be torch.float32, got torch.bfloat16$"),
        (lambda x, w, s: (x._replace(v=x.v.to("meta")), w, s), "^v must be on the state's device cpu, got meta$"),
        (lambda x, w, s: (x, w._replace(r_k=w.r_k.view(2, 16)), s), r"^r_k must be \[32\] for a state of"),
        (lambda x, w, s: (x, w._replace(k_k=w.k_k.double()), s), "^k_k must be torch.float32, got torch.float64$"),
        (lambda x, w, s: (x, w, s[:1].expand(2, -1, -1, -1)), "^the state must be a contiguous"),
        (lambda x, w, s: (x._replace(r=x.r.long()), w, s), "^r must be a floating point tensor, got torch.int64$"),
        (lambda x, w, s: (x, w._replace(k_a=w.k_a.requires_grad_()), s), "^the decode step has no gradient"),
        (lambda x, w, s: (x, w, s.requires_grad_()), "^the decode step has no gradient"),
    ],
)
def test_refusals(change, message):
    x, weights, state = change(*step_case(2, 2, 16, torch.float32))
    with pytest.raises(ValueError, match=message):
        wkv7_step(StepInputs(*x), StepWeights(*weights), state, EPS)
