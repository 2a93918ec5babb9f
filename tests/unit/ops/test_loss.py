"""Cross-entropy sums against torch's own and against L2Wrap written out. R rows, C channels, V vocab."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_accel.ops.loss import IGNORE_INDEX, cross_entropy_sum, linear_cross_entropy_sum

R, C, V = 37, 12, 53


def make_case(dtype=torch.float64, masked=True, seed=0):
    gen = torch.Generator().manual_seed(seed)
    hidden_RC = torch.randn(R, C, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VC = torch.randn(V, C, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()
    labels_R = torch.randint(0, V, (R,), generator=gen)
    if masked:
        labels_R[::3] = IGNORE_INDEX
        labels_R[20:30] = IGNORE_INDEX
    return hidden_RC, weight_VC, labels_R


def expected_loss(logits_RV, labels_R, l2wrap):
    """torch's cross-entropy plus a term of value 0 whose gradient is l2wrap * max_logit at the largest logit."""
    loss = F.cross_entropy(logits_RV, labels_R, ignore_index=IGNORE_INDEX, reduction="sum")
    largest_R = logits_RV.max(dim=1).values[labels_R != IGNORE_INDEX]
    pull = 0.5 * l2wrap * largest_R.square().sum()
    return loss + pull - pull.detach()


def linear(hidden_RC, weight_VC, labels_R, **kwargs):
    return linear_cross_entropy_sum(hidden_RC, weight_VC, labels_R, **kwargs)


def dense(hidden_RC, weight_VC, labels_R, *, l2wrap, chunk_rows=None):
    return cross_entropy_sum(hidden_RC @ weight_VC.t(), labels_R, l2wrap=l2wrap)


@pytest.fixture(params=[linear, dense])
def op(request):
    return request.param


@pytest.mark.parametrize("chunk_rows", [1, 7, 19, 512])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("l2wrap", [0.0, 1e-4, 0.5])
def test_value_and_gradients(op, l2wrap, masked, chunk_rows):
    hidden_RC, weight_VC, labels_R = make_case(masked=masked)
    expected = expected_loss(hidden_RC @ weight_VC.t(), labels_R, l2wrap)
    loss = op(hidden_RC, weight_VC, labels_R, l2wrap=l2wrap, chunk_rows=chunk_rows)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    for scale in (1.0, -2.5):
        loss = op(hidden_RC, weight_VC, labels_R, l2wrap=l2wrap, chunk_rows=chunk_rows)
        found = torch.autograd.grad(loss * scale, (hidden_RC, weight_VC))
        wanted = torch.autograd.grad(expected * scale, (hidden_RC, weight_VC), retain_graph=True)
        for x, y in zip(found, wanted):
            assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


def test_sums_of_accumulated_micro_batches_equal_the_whole(op):
    # The gradient of each part is scaled as accumulation does it; L2Wrap must come out with the same weight.
    hidden_RC, weight_VC, labels_R = make_case()
    whole = op(hidden_RC, weight_VC, labels_R, l2wrap=0.1) / 20
    wanted = torch.autograd.grad(whole, (hidden_RC, weight_VC))
    for part in (slice(0, 11), slice(11, 37)):
        (op(hidden_RC[part], weight_VC, labels_R[part], l2wrap=0.1) / 20).backward()
    assert torch.allclose(hidden_RC.grad, wanted[0], rtol=1e-12)
    assert torch.allclose(weight_VC.grad, wanted[1], rtol=1e-12)


def test_masked_rows_get_no_gradient_and_may_hold_anything(op):
    hidden_RC, weight_VC, labels_R = make_case(masked=True)
    dirty_RC = hidden_RC.detach().clone()
    dirty_RC[labels_R == IGNORE_INDEX] = 1e30
    dirty_RC.requires_grad_()
    clean = op(hidden_RC, weight_VC, labels_R, l2wrap=0.1)
    loss = op(dirty_RC, weight_VC, labels_R, l2wrap=0.1)
    assert loss.item() == clean.item()
    (grad,) = torch.autograd.grad(loss, dirty_RC)
    assert not grad[labels_R == IGNORE_INDEX].any()
    assert grad[labels_R != IGNORE_INDEX].abs().sum(1).gt(0).all()


def test_no_target_at_all(op):
    hidden_RC, weight_VC, _ = make_case()
    labels_R = torch.full((R,), IGNORE_INDEX)
    loss = op(hidden_RC, weight_VC, labels_R, l2wrap=0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden_RC.grad.shape == (R, C)
    assert not hidden_RC.grad.any()
    assert weight_VC.grad.shape == (V, C)
    assert not weight_VC.grad.any()


def test_tied_largest_logits_pull_the_first(op):
    # Both classes 2 and 4 have logit 3 for the one row; only class 2 is pulled.
    hidden_RC = torch.tensor([[1.0]], dtype=torch.float64)
    weight_VC = torch.tensor([[0.0], [1.0], [3.0], [-1.0], [3.0]], dtype=torch.float64, requires_grad=True)
    labels_R = torch.tensor([1])
    grads = []
    for l2wrap in (0.0, 0.25):
        loss = op(hidden_RC, weight_VC, labels_R, l2wrap=l2wrap)
        grads.append(torch.autograd.grad(loss, weight_VC)[0].squeeze(1))
    assert torch.allclose(grads[1] - grads[0], torch.tensor([0, 0, 0.75, 0, 0], dtype=torch.float64))


def test_large_logits_do_not_overflow(op):
    hidden_RC = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight_VC = torch.tensor([[1.0], [0.5], [-1.0]])
    loss = op(hidden_RC, weight_VC, torch.tensor([0, 1]), l2wrap=0.0)
    loss.backward()
    # Row 1: logits -1000, -500, 1000 with target 1 cost 1500.
    assert loss.item() == pytest.approx(1500.0)
    assert torch.allclose(hidden_RC.grad, torch.tensor([[0.0], [-1.5]]))


def test_bf16_has_an_fp32_softmax(op):
    hidden_RC, weight_VC, labels_R = make_case(torch.bfloat16)
    loss = op(hidden_RC, weight_VC, labels_R, l2wrap=0.1, chunk_rows=8)
    loss.backward()
    assert loss.dtype == torch.float32
    assert (hidden_RC.grad.dtype, weight_VC.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    # Logits are rounded to bf16 by the product; everything after it must be exact to fp32.
    logits_RV = (hidden_RC @ weight_VC.t()).detach().double().requires_grad_()
    expected = expected_loss(logits_RV, labels_R, 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (d_logits,) = torch.autograd.grad(expected, logits_RV)
    for found, exact in [
        (hidden_RC.grad, d_logits @ weight_VC.double()),
        (weight_VC.grad, d_logits.t() @ hidden_RC.double()),
    ]:
        assert (found.double() - exact).norm() <= 5e-3 * exact.norm()


def test_weight_gradient_is_summed_in_fp32():
    # 600 equal rows, one at a time: a bf16 sum would stop growing at 256 times one row's gradient.
    hidden_RC = torch.ones(600, 1, dtype=torch.bfloat16)
    weight_VC = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels_R = torch.zeros(600, dtype=torch.int64)
    linear_cross_entropy_sum(hidden_RC, weight_VC, labels_R, l2wrap=0.0, chunk_rows=1).backward()
    assert weight_VC.grad.flatten().tolist() == [-300.0, 300.0]


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns, and the matrix products made."""

    def __init__(self):
        super().__init__()
        self.numel = 0
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default):
            self.products.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        ("weight", [(5, 500), (5, 3)]),
        ("hidden", [(5, 500), (500, 3)]),
        ("neither", [(5, 500), (5, 3), (500, 3)]),
        ("both", [(5, 500)]),
    ],
)
def test_only_the_needed_products_and_never_all_logits(frozen, expected):
    hidden_RC = torch.randn(60, 3, requires_grad=frozen in ("weight", "neither"))
    weight_VC = torch.randn(500, 3, requires_grad=frozen in ("hidden", "neither"))
    labels_R = torch.randint(0, 500, (60,))
    labels_R[10:50] = IGNORE_INDEX
    with LargestTensor() as seen:
        loss = linear_cross_entropy_sum(hidden_RC, weight_VC, labels_R, chunk_rows=5)
        if frozen != "both":
            loss.backward()
    # 20 target rows in 4 chunks; 40 masked rows are not multiplied at all.
    assert seen.products == expected * 4
    assert seen.numel == 5 * 500
    assert (weight_VC.grad is not None) == (frozen in ("hidden", "neither"))
    assert (hidden_RC.grad is not None) == (frozen in ("weight", "neither"))


def test_without_gradients_only_the_logits_are_made():
    hidden_RC, weight_VC, labels_R = make_case()
    with torch.no_grad(), LargestTensor() as seen:
        linear_cross_entropy_sum(hidden_RC, weight_VC, labels_R, chunk_rows=64)
    assert len(seen.products) == 1


def test_second_derivative_is_refused(op):
    hidden_RC, weight_VC, labels_R = make_case()
    loss = op(hidden_RC, weight_VC, labels_R, l2wrap=0.0)
    with pytest.raises(RuntimeError, match="cross_entropy_sum can be differentiated once"):
        torch.autograd.grad(loss, hidden_RC, create_graph=True)


def test_second_backward_is_refused():
    # The gradients were scaled in place; handing them out again would scale them twice.
    hidden_RC, weight_VC, labels_R = make_case()
    loss = linear_cross_entropy_sum(hidden_RC, weight_VC, labels_R)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_RC": torch.zeros(5, 4)}, r"hidden must be \[rows, channels\] .* got \[5, 4\] and \[7, 3\]"),
        ({"weight_VC": torch.zeros(7, 3).double()}, "weight must have hidden's dtype torch.float32"),
        ({"labels_R": torch.zeros(4, dtype=torch.int64)}, r"labels must be int64 \[5\], got torch.int64 \[4\]"),
        ({"labels_R": torch.zeros(5)}, r"labels must be int64 \[5\], got torch.float32 \[5\]"),
        ({"labels_R": torch.tensor([0, 1, 7, 0, 0])}, "label 7 is neither a token id below 7 nor -100"),
        ({"labels_R": torch.tensor([0, 1, -1, 0, 0])}, "label -1 is neither a token id below 7 nor -100"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1, got 0"),
    ],
)
def test_bad_arguments(change, expected):
    good = {
        "hidden_RC": torch.zeros(5, 3),
        "weight_VC": torch.zeros(7, 3),
        "labels_R": torch.zeros(5, dtype=torch.int64),
        "chunk_rows": 4,
    }
    with pytest.raises(ValueError, match=expected):
        linear_cross_entropy_sum(**{**good, **change})


def test_bad_dense_arguments():
    with pytest.raises(ValueError, match=r"logits must be \[rows, vocab\], got \[2, 5, 3\]"):
        cross_entropy_sum(torch.zeros(2, 5, 3), torch.zeros(10, dtype=torch.int64))
    with pytest.raises(ValueError, match="label 3 is neither a token id below 3 nor -100"):
        cross_entropy_sum(torch.zeros(2, 3), torch.tensor([0, 3]))
