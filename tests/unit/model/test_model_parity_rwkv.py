"""Logits and states against the pip package `rwkv` (another author's inference code), in released shapes."""

import os
import subprocess
import sys

import pytest
import torch

from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.io import load_model, save_checkpoint
from rwkv_accel.model.precision import Precision
from rwkv_accel.model.state import RWKV7State

NUM_TOKENS = 300
CUTS = (0, 1, 18, 82, 210, 300)
SHAPES = {
    # Widths, heads and inner ranks of released models; fewer layers and a small vocabulary.
    "0.1B": RWKV7Config(300, 768, 3, 64, 3072, 64, 64, 32, 128, has_layer0_value=True),
    "0.4B": RWKV7Config(300, 1024, 2, 64, 4096, 64, 64, 32, 128),
}

# The package reads its settings from the environment when it is imported, so it runs in a process of its own.
PACKAGE = """
import sys, torch
from rwkv.model import RWKV
torch.set_num_threads(1)
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
ids, cuts = torch.load(sys.argv[2])
state, logits, states = None, [], []
for start, stop in zip(cuts, cuts[1:]):
    out, state = model.forward(ids[start:stop], state, full_output=True)
    logits.append(out.view(stop - start, -1).clone())
    states.append([t.clone() for t in state])
torch.save((torch.cat(logits), states), sys.argv[3])
"""


@pytest.fixture(scope="module", params=SHAPES)
def case(request, tmp_path_factory, tensors_of):
    """(our model, ids [T], the package's logits [T,V], its flat state after each piece)."""
    folder = tmp_path_factory.mktemp("rwkv")
    config = SHAPES[request.param]
    path = save_checkpoint(tensors_of(config, seed=1, dtype=torch.bfloat16), folder / "model.pth")
    ids = torch.randint(config.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(2))
    torch.save((ids.tolist(), CUTS), folder / "ids.pt")
    command = [sys.executable, "-c", PACKAGE, str(folder / "model"), str(folder / "ids.pt"), str(folder / "out.pt")]
    env = {**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    subprocess.run(command, check=True, env=env, capture_output=True, text=True)
    logits, states = torch.load(folder / "out.pt")
    model = load_model(path, Precision.from_name("32-true"), wkv_backend="auto")
    return model, ids, logits, states


def assert_same_state(state, flat):
    for ours, theirs in zip(state.to_flat(), flat, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_whole_prompt(case):
    model, ids, logits, states = case
    with torch.no_grad():
        ours, state = model(ids.unsqueeze(0), return_state=True)
    assert logits.std() > 0.5
    torch.testing.assert_close(ours[0], logits, rtol=0, atol=1e-4)
    assert_same_state(state, states[-1])


def test_prefill_in_pieces(case):
    model, ids, logits, states = case
    state = None
    with torch.no_grad():
        for start, stop, theirs in zip(CUTS, CUTS[1:], states):
            ours, state = model(ids[None, start:stop], state=state, return_state=True)
            torch.testing.assert_close(ours[0], logits[start:stop], rtol=0, atol=1e-4)
            assert_same_state(state, theirs)


def test_token_by_token_from_their_state(case):
    """Recurrent mode continues from the package's own state, in its flat order and layout."""
    model, ids, logits, states = case
    state = RWKV7State.from_flat(states[2])
    with torch.no_grad():
        for t in range(CUTS[3], NUM_TOKENS):
            ours, state = model.forward_one(ids[t : t + 1], state)
            torch.testing.assert_close(ours[0], logits[t], rtol=0, atol=1e-4)
    assert_same_state(state, states[-1])
