"""The Triton backend as a node of a compiled graph: what it keeps has the shapes that the compiler was told."""

import pytest
import torch

from rwkv_accel.ops.wkv7 import wkv7
from tests.unit.ops.wkv7_cases import make_inputs, results


@pytest.mark.parametrize(("dtype", "cut"), [(torch.bfloat16, False), (torch.float32, True)], ids=str)
def test_compiled_is_eager(dtype, cut, device, programs):
    if cut:
        programs(8)
    torch._dynamo.reset()
    *inputs, state = make_inputs(1, 70, 1, 16, dtype=torch.float32)
    borders = torch.tensor([0, 5, 70])
    given = [x.to(device, torch.float32 if i == 6 else dtype) for i, x in enumerate(inputs)]
    given.append(state.repeat(2, 1, 1, 1).to(device))
    compiled = torch.compile(wkv7, backend="aot_eager", fullgraph=True)
    found, expected = (results(op, given, cu_seqlens=borders, backend="triton") for op in (compiled, wkv7))
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        assert torch.equal(found[name], x), name
    torch._dynamo.reset()
