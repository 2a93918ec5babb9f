"""Inputs and plain formulas of the elementwise ops: what each must compute, written with autograd alone.

Shapes: B batch, T tokens, C channels, H heads, N head size, n interpolations.
"""

import torch
import torch.nn.functional as F

from rwkv_accel.ops.elementwise import head_gate, relu_squared, shift_lerp, start_table, wkv_inputs


def tensors(*shapes, seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for shape in shapes
    ]


def plain_shift_lerp(h, x, shift=None, borders=None):
    prev = torch.zeros_like(h)
    prev[:, 1:] = h[:, :-1]
    if borders is None:
        borders = torch.arange(2) * h.shape[1]
        starts = [(row, 0, row) for row in range(len(h))]
    else:
        starts = [(0, int(first), number) for number, first in enumerate(borders[:-1])]
    for row, first, number in starts:
        prev[row, first] = 0 if shift is None else shift[number]
    return torch.stack([h + (prev - h) * x_i for x_i in x])


def plain_wkv_inputs(head_size, k, v, v_first, a_low, v_low, a0, v0, k_k, k_a):
    heads = (*k.shape[:-1], -1, head_size)
    iclr = torch.sigmoid(a0 + a_low)
    kappa = F.normalize((k * k_k).view(heads), dim=-1, eps=1e-12).view(k.shape)
    value = v if v_first is None else v + (v_first - v) * torch.sigmoid(v0 + v_low)
    return (
        k * (1 + (iclr - 1) * k_a),
        value,
        -kappa,
        kappa * iclr,
    )


def plain_head_gate(head_size, eps, y, r, k, v, gate, weight, bias, r_k):
    normed = F.group_norm(y.flatten(0, 1), y.shape[-1] // head_size, weight, bias, eps).view(y.shape)
    bonus = (r * k * r_k).unflatten(-1, (-1, head_size)).sum(-1, keepdim=True)
    return (normed + (bonus * v.unflatten(-1, (-1, head_size))).flatten(-2)) * gate


def shift_case(kind, B=2, T=7, C=12, n=3, **options):
    """(op, plain, inputs) for a kind of row: rows, carried (a shift before each row), packed, packed carried."""
    borders = torch.tensor([0, 1, 4, T]) if "packed" in kind else None
    B = 1 if borders is not None else B
    sequences = B if borders is None else len(borders) - 1
    inputs = tensors((B, T, C), (n, C), (sequences, C), **options)
    if "carried" not in kind:
        inputs = inputs[:2]
    packed = {}
    if borders is not None:
        device = inputs[0].device
        packed = {"first_S": borders[:-1].to(device), "starts_T": start_table(borders, device)}

    def op(backend):
        return lambda h, x, shift=None: (shift_lerp(h, x, shift=shift, **packed, backend=backend),)

    return op, lambda h, x, shift=None: (plain_shift_lerp(h, x, shift, borders),), inputs


def inputs_case(first_layer, B=2, T=3, H=2, N=4, **options):
    C = H * N
    inputs = tensors(*[(B, T, C)] * 5, *[(C,)] * 4, **options)
    if first_layer:
        inputs = [inputs[i] for i in (0, 1, 3, 5, 7, 8)]  # without v_first, v_low, v0

    def spread(args):
        if not first_layer:
            return args
        k, v, a_low, a0, k_k, k_a = args
        return k, v, None, a_low, None, a0, None, k_k, k_a

    def op(backend):
        def run(*args):
            k, v, v_first, a_low, v_low, *vectors = spread(args)
            return wkv_inputs(k, v, v_first, (a_low, v_low), tuple(vectors), head_size=N, backend=backend)

        return run

    return op, lambda *args: plain_wkv_inputs(N, *spread(args)), inputs


def gate_case(B=2, T=3, H=2, N=4, **options):
    inputs = tensors(*[(B, T, H * N)] * 5, *[(H * N,)] * 3, **options)

    def op(backend):
        return lambda *args: (head_gate(*args, head_size=N, eps=1e-5 * N, backend=backend),)

    return op, lambda *args: (plain_head_gate(N, 1e-5 * N, *args),), inputs


def relu_case(shape=(3, 5, 7), **options):
    return (
        lambda backend: lambda x: (relu_squared(x, backend=backend),),
        lambda x: (torch.relu(x) ** 2,),
        tensors(shape, **options),
    )


CASES = {
    "shift_lerp rows": lambda **options: shift_case("rows", **options),
    "shift_lerp carried": lambda **options: shift_case("carried", **options),
    "shift_lerp packed": lambda **options: shift_case("packed", **options),
    "shift_lerp packed carried": lambda **options: shift_case("packed carried", **options),
    "wkv_inputs": lambda **options: inputs_case(False, **options),
    "wkv_inputs first layer": lambda **options: inputs_case(True, **options),
    "head_gate": gate_case,
    "relu_squared": relu_case,
}


def results(function, inputs, seed=9):
    """Outputs and the gradients of all inputs under random outer gradients (exact in bf16), as float64 on the host."""
    outputs = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    outer = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
    wanted = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, outer) if wanted else ()
    return [x.detach().double().cpu() for x in (*outputs, *grads)]
