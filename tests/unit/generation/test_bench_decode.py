"""The decode benchmark compares like with like, or not at all."""

import os
import subprocess
import sys

import torch

from rwkv_accel.model.io import save_checkpoint

CODE = """
import sys
from rwkv_accel.bench import decode
from rwkv_accel.errors import UserError
rows = decode.decode_rows(sys.argv[1], batches=(1, 2), prompt_tokens=20, rounds=1)
print([row["name"] for row in rows])
print([row["ratio"] for row in rows if "package" in row["name"]], all(row["tokens_per_second"] > 0 for row in rows))
rows = decode.decode_rows(sys.argv[1], batches=(1,), prompt_tokens=20, rounds=1, precision="bf16-true")
print("both in bf16:", [row["name"] for row in rows])
decode.PARITY = 0.0
try:
    decode.decode_rows(sys.argv[1], batches=(1,), prompt_tokens=20, rounds=1)
except UserError as error:
    print("refused:", error)
"""


def test_rows_after_parity_and_refusal_without_it(make_model, tmp_path):
    model = make_model(257, n_embd=128, head_size=64, dtype=torch.float32)
    save_checkpoint(model.state_dict(), tmp_path / "m.pth")
    env = {**os.environ, "RWKV_V7_ON": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "m.pth")], env=env, capture_output=True, text=True, check=True
    )
    lines = done.stdout.strip().splitlines()
    prefills = "'prefill, rwkv package', 'prefill', 'prefill, its projections alone', 'prefill, bf16-true'"
    assert f"['decode, rwkv package', {prefills}, 'decode, batch 1', 'decode, batch 2']" in lines
    assert "[1.0, 1.0] True" in lines
    half = "'prefill, rwkv package', 'prefill', 'prefill, its projections alone'"
    assert f"both in bf16: ['decode, rwkv package', {half}, 'decode, batch 1']" in lines
    assert lines[-1].startswith("refused: logits differ from the package's by")
