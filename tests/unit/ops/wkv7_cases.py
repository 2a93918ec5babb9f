"""Inputs and comparisons for the WKV-7 tests. B batch, T tokens, H heads, N head size, S sequences."""

import math

import torch


def make_inputs(B, T, H, N, *, dtype=torch.float64, S=None, hard=False, seed=0):
    """[r, w_low, k, v, a, b, w0, state] as a model makes them: a = -kappa, b = kappa * rate, |kappa| = 1.

    `hard`: near-identical keys, rate near 1 and hardly any decay, the worst conditioned inverse.
    """
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    r, k, v, kappa, rate, w_low = (normal(B, T, H, N) for _ in range(6))
    rate = torch.sigmoid(2 * rate)
    if hard:
        kappa = kappa[:, :1] + 0.01 * kappa
        rate = 0.98 + 0.02 * rate
    kappa = torch.nn.functional.normalize(kappa, dim=-1)
    state = 0.3 * normal(S or B, H, N, N)
    w0 = 0.5 * normal(H, N) - (17 if hard else 1)
    return [x.to(dtype) for x in (r / 2, 2 * w_low, k / 2, v / 2, -kappa, kappa * rate, w0, state)]


def logit(w_log):
    """Of a log decay: what makes it of w0 + w_low."""
    share = torch.as_tensor(w_log, dtype=torch.float64) / -math.exp(-0.5)
    return torch.log(share / (1 - share))


NAMES = ("out", "final", "r", "w_low", "k", "v", "a", "b", "w0", "state")


def results(op, inputs, *, seed=1, **kwargs):
    """{name: tensor}: output, final state and the gradients of a random projection of both."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, final = op(*leaves[:7], state=leaves[7], **kwargs)
    gen = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x.dtype) for x in (out, final)]
    grads = torch.autograd.grad((out * weights[0]).sum() + (final * weights[1]).sum(), leaves)
    return dict(zip(NAMES, (out, final, *grads)))


def assert_close(actual, expected, tolerance, *, flat=()):
    """Relative error in the Euclidean norm, tensor by tensor. NaN fails.

    `flat`: gradients that are next to nothing, because sigmoid is flat there; their error counts by the keys' gradient.
    """
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        y = expected[name].double()
        size = (expected["k"] if name in flat else y).double().norm()
        error = ((x.double() - y).norm() / size).item()
        assert error <= tolerance, f"{name}: {error:.1e} > {tolerance:.0e}"


def step_case(rows, heads, size, dtype, *, device="cpu", seed=0):
    """(StepInputs, StepWeights, state) of one token."""
    from rwkv_accel.ops.wkv7.step import StepInputs, StepWeights

    gen = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    channels = heads * size
    r, w_logit, k, v, rate, gate = (normal(rows, channels) for _ in range(6))
    x = StepInputs(*(t.to(device, dtype) for t in (r, w_logit, k, v, torch.sigmoid(rate), torch.sigmoid(gate))))
    weights = StepWeights(*((1 + 0.3 * normal(channels)).to(device, wide) for _ in range(5)))
    return x, weights, (0.3 * normal(rows, heads, size, size)).to(device, wide)
