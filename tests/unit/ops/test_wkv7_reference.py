"""The token-by-token reference against formulas written out per head in numpy, and by hand."""

import numpy as np
import pytest
import torch

from rwkv_accel.ops.wkv7 import wkv7
from tests.unit.ops.wkv7_cases import assert_close, logit, make_inputs, results


def numpy_forward(r, w_log, k, v, a, b, start):
    """One head: [T,N] inputs and [N(value),N(key)] start -> (out [T,N], states before each token and at the end)."""
    states, outs = [start], []
    for t in range(len(r)):
        S = states[-1]
        new = np.empty_like(S)
        removed = [sum(S[i, j] * a[t, j] for j in range(len(a[t]))) for i in range(len(S))]
        for i in range(len(S)):
            for j in range(len(S)):
                new[i, j] = S[i, j] * np.exp(w_log[t, j]) + removed[i] * b[t, j] + v[t, i] * k[t, j]
        states.append(new)
        outs.append(new @ r[t])
    return np.stack(outs), states


def numpy_backward(r, w_log, k, v, a, b, states, d_out, d_final):
    """Gradients of one head by the recurrence run backwards (matrix calculus by hand, no autograd)."""
    D = d_final.copy()
    grads = [np.zeros_like(r) for _ in range(6)]
    dr, dw_log, dk, dv, da, db = grads
    for t in reversed(range(len(r))):
        before, after = states[t], states[t + 1]
        u = before @ a[t]
        D = D + np.outer(d_out[t], r[t])
        dr[t], dk[t], dv[t] = after.T @ d_out[t], D.T @ v[t], D @ k[t]
        dw_log[t] = np.exp(w_log[t]) * (D * before).sum(0)
        du = D @ b[t]
        db[t], da[t] = D.T @ u, before.T @ du
        D = D * np.exp(w_log[t]) + np.outer(du, a[t])
    return (*grads, D)


def test_matches_numpy_per_head():
    inputs = make_inputs(2, 7, 2, 5)
    actual = results(wkv7, inputs, backend="reference")
    gen = torch.Generator().manual_seed(1)
    d_out = torch.randn(2, 7, 2, 5, generator=gen, dtype=torch.float64).numpy()
    d_final = torch.randn(2, 2, 5, 5, generator=gen, dtype=torch.float64).numpy()
    expected = {name: torch.zeros_like(x) for name, x in actual.items()}
    arrays = [x.numpy() for x in inputs]
    for i in range(2):
        for h in range(2):
            head = [x[i, :, h] for x in arrays[:6]]
            share = 1 / (1 + np.exp(-(arrays[6][h] + head[1])))
            head[1] = -np.exp(-0.5) * share
            out, states = numpy_forward(*head, arrays[7][i, h])
            grads = numpy_backward(*head, states, d_out[i, :, h], d_final[i, h])
            expected["out"][i, :, h] = torch.from_numpy(out)
            expected["final"][i, h] = torch.from_numpy(states[-1])
            expected["state"][i, h] = torch.from_numpy(grads[6])
            grads[1][:] *= head[1] * (1 - share)
            expected["w0"][h] += torch.from_numpy(grads[1].sum(0))
            for name, grad in zip(("r", "w_low", "k", "v", "a", "b"), grads):
                expected[name][i, :, h] = torch.from_numpy(grad)
    assert_close(actual, expected, 1e-13)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_two_tokens_by_hand(backend):
    # N = 2, values index rows and keys index columns of the state.
    def row(*tokens):
        return torch.tensor(tokens, dtype=torch.float64).view(1, 2, 1, 2)

    half = float(logit(np.log(0.6)))
    out, final = wkv7(
        row([1, 0], [1, 1]),  # r
        row([half, half], [half, -np.inf]),  # w_low
        row([1, 2], [0, 1]),  # k
        row([3, 5], [1, 0]),  # v
        row([0, 0], [-1, 0]),  # a
        row([0, 0], [0.5, 0.5]),  # b
        torch.zeros(1, 2),  # w0
        state=torch.tensor([[[[10.0, 0.0], [0.0, 10.0]]]], dtype=torch.float64),
        backend=backend,
    )
    # S1 = [[6,0],[0,6]] + [3,5]^T [1,2] = [[9,6],[5,16]];  u = S1 [-1,0] = [-9,-5]
    # S2 = [[5.4,6],[3,16]] + u [.5,.5] + [1,0]^T [0,1] = [[.9,2.5],[.5,13.5]]
    assert torch.allclose(final, torch.tensor([[[[0.9, 2.5], [0.5, 13.5]]]], dtype=torch.float64))
    assert torch.allclose(out, row([9, 5], [3.4, 14.0]))


def test_packed_documents_match_separate_runs():
    inputs = make_inputs(1, 9, 2, 4, S=3)
    packed = wkv7(*inputs[:7], state=inputs[7], cu_seqlens=torch.tensor([0, 2, 3, 9]), backend="reference")
    for i, (low, high) in enumerate([(0, 2), (2, 3), (3, 9)]):
        part = [x[:, low:high] for x in inputs[:6]]
        out, final = wkv7(*part, inputs[6], state=inputs[7][i : i + 1], backend="reference")
        assert torch.equal(packed[0][:, low:high], out)
        assert torch.equal(packed[1][i : i + 1], final)


def test_no_state_is_a_state_of_zeros():
    inputs = make_inputs(2, 5, 2, 4)
    for backend in ("reference", "chunked"):
        without = wkv7(*inputs[:7], backend=backend)
        zeros = wkv7(*inputs[:7], state=torch.zeros_like(inputs[7]), backend=backend)
        assert torch.equal(without[0], zeros[0])
        assert torch.equal(without[1], zeros[1])
