"""The elementwise ops of a block give the values and gradients of the plain formulas, and keep only their inputs."""

import pytest
import torch

from rwkv_accel.ops.elementwise import (
    head_gate,
    relu_squared,
    select_backend,
    shift_lerp,
    start_table,
    wkv_inputs,
)
from tests.unit.ops.elementwise_cases import CASES, results, tensors


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_formula(name):
    op, plain, inputs = CASES[name]()
    for got, want in zip(results(op("torch"), inputs), results(plain, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def pick(function, outputs):
    return lambda *args: [function(*args)[index] for index in outputs]


@pytest.mark.parametrize("name", CASES)
def test_each_input_alone_gets_the_same_gradient(name):
    op, plain, inputs = CASES[name]()
    for alone in range(len(inputs)):
        chosen = [x.detach().requires_grad_(index == alone) for index, x in enumerate(inputs)]
        if not any(o.requires_grad for o in plain(*chosen)):
            continue
        used = [index for index, o in enumerate(plain(*chosen)) if o.requires_grad]
        got, want = (results(pick(f, used), chosen) for f in (op("torch"), plain))
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_bf16_results_are_rounded_not_computed_in_bf16(name):
    op, _, inputs = CASES[name](dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for got, want in zip(results(op("torch"), inputs), results(op("torch"), exact), strict=True):
        # Half a unit in the last place is 2^-9; shift_lerp works in bf16 and rounds a few times.
        assert (got - want).norm() <= (2**-7 if "shift" in name else 2**-8) * want.norm()


@pytest.mark.parametrize("name", CASES)
def test_only_inputs_are_kept(name):
    op, _, inputs = CASES[name]()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.untyped_storage().data_ptr()) or x, lambda x: x
    ):
        outputs = op("torch")(*inputs)
    allowed = {x.untyped_storage().data_ptr() for x in inputs}
    tables = 0 if "packed" not in name else 2
    assert len(set(kept) - allowed) <= tables
    assert outputs[0].requires_grad


def test_a_frozen_interpolation_does_not_keep_the_activations():
    h, x = tensors((1, 5, 8), (6, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        shift_lerp(h, x.detach())
    assert kept == [(6, 8)]


def test_start_table():
    assert start_table(torch.tensor([0, 1, 4, 6]), "cpu").tolist() == [0, 1, -1, -1, 2, -1]


ROWS = torch.zeros(1, 3, 4)


def packed_shift(rows=1, **change):
    borders = torch.tensor([0, 2, 3])
    packed = {"first_S": borders[:-1], "starts_T": start_table(borders, "cpu")} | change
    return shift_lerp(ROWS.expand(rows, -1, -1), torch.zeros(6, 4), **packed)


def gate(**change):
    given = dict.fromkeys(("y", "r", "k", "v", "gate"), ROWS) | dict.fromkeys(("weight", "bias", "r_k"), torch.ones(4))
    return head_gate(**(given | change), head_size=2, eps=1e-5)


def first_inputs(**change):
    given = dict.fromkeys(("v", "a_low"), ROWS) | dict.fromkeys(("a0", "k_k", "k_a"), torch.ones(4)) | change
    vectors = (given["a0"], None, given["k_k"], given["k_a"])
    return wkv_inputs(ROWS, given["v"], None, (given["a_low"], None), vectors, head_size=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shift_lerp(torch.zeros(2, 3, 4), torch.zeros(6, 5)), r"\[2, 3, 4\].*\[6, 5\]"),
        (lambda: shift_lerp(torch.zeros(2, 3, 4), torch.zeros(6, 4).double()), "one dtype"),
        (
            lambda: shift_lerp(torch.zeros(2, 3, 4), torch.zeros(6, 4), shift=torch.zeros(3, 4)),
            r"shift must be \[2, 4\]",
        ),
        (lambda: shift_lerp(torch.zeros(1, 3, 4), torch.zeros(6, 4), first_S=torch.tensor([0])), "both or none"),
        (
            lambda: head_gate(*[torch.zeros(1, 1, 6)] * 5, *[torch.ones(6)] * 3, head_size=4, eps=1e-5),
            "multiple of head",
        ),
        (
            lambda: head_gate(*[torch.zeros(1, 1, 6)] * 5, *[torch.ones(4)] * 3, head_size=3, eps=1e-5),
            "weight must have 6",
        ),
        (
            lambda: wkv_inputs(
                *[torch.zeros(1, 2, 4)] * 3, (torch.zeros(1, 2, 4), None), (torch.zeros(4),) * 4, head_size=2
            ),
            "all or none",
        ),
        (lambda: relu_squared(torch.zeros(2), backend="cuda"), "auto, torch, triton"),
        (lambda: relu_squared(torch.zeros(2).long()), "^x must be a floating point tensor, got torch.int64$"),
        (lambda: shift_lerp(ROWS.long(), torch.zeros(6, 4).long()), "^h must be a floating point tensor"),
        (lambda: shift_lerp(ROWS, torch.zeros(6, 4, device="meta")), "^x must be on h's device cpu, got meta$"),
        (lambda: packed_shift(first_S=torch.tensor([0, 2], dtype=torch.int32)), "got torch.int32"),
        (lambda: packed_shift(starts_T=start_table(torch.tensor([0, 2, 3]), "cpu").long()), "and torch.int64"),
        (lambda: packed_shift(starts_T=start_table(torch.tensor([0, 2, 4]), "cpu")), r"\[4\] for \[1, 3, 4\]"),
        (lambda: packed_shift(rows=2), r"for a batch of one row, got .* for \[2, 3, 4\]"),
        (lambda: packed_shift(first_S=torch.tensor([0, 2], device="meta")), "^first_S and .* got meta and cpu$"),
        (lambda: gate(r=ROWS[:, :2]), r"^r must have y's shape \[1, 3, 4\], got \[1, 2, 4\]$"),
        (lambda: gate(gate=ROWS.long()), "^gate must be a floating point tensor, got torch.int64$"),
        (lambda: gate(v=ROWS.to("meta")), "^v must be on y's device cpu, got meta$"),
        (lambda: gate(bias=torch.zeros(4, device="meta")), "^bias must be on y's device cpu, got meta$"),
        (lambda: gate(r_k=torch.zeros(4).bool()), "^r_k must be a floating point tensor, got torch.bool$"),
        (lambda: first_inputs(v=ROWS[0]), r"^v must have k's shape \[1, 3, 4\], got \[3, 4\]$"),
        (lambda: first_inputs(a_low=ROWS.int()), "^a_low must be a floating point tensor, got torch.int32$"),
        (lambda: first_inputs(k_a=torch.zeros(5)), "^k_a must have 4 values, got 5$"),
        (lambda: first_inputs(a0=torch.zeros(4, device="meta")), "^a0 must be on k's device cpu, got meta$"),
    ],
)
def test_misfits_are_named_before_any_work(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_auto_takes_triton_on_a_gpu_alone():
    assert select_backend("auto", "cpu")[0] == "torch"
    assert select_backend("auto", "cuda")[0] == "triton"
    assert select_backend("torch", "cuda")[0] == "torch"
