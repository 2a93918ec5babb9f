"""FLOPs per token against torch's own counter of matrix products; peaks by the names that drivers give."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rwkv_accel.config.schema import ModelConfig, PeftConfig
from rwkv_accel.model.precision import Precision
from rwkv_accel.peft.apply import load_model_and_apply_peft
from rwkv_accel.tracking.flops import Compute, compute_of, flops_of, peak_tflops
from tests.helpers import tiny_checkpoint

LAYERS, CHANNELS, HEAD, VOCAB, TOKENS = 3, 64, 32, 97, 40
RECURRENCE = 9 * HEAD * CHANNELS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("flops") / "base.pth"
    return tiny_checkpoint(path, n_layer=LAYERS, n_embd=CHANNELS, head_size=HEAD, vocab_size=VOCAB)


def load(base, **peft):
    config = ModelConfig(path=str(base))
    return load_model_and_apply_peft(config, PeftConfig(**peft), precision=Precision.from_name("32-true"))


def counted(model, monkeypatch, num_targets=TOKENS):
    """Matrix products of one forward and backward pass, with a recurrence that has none."""

    def elementwise(r, w_low, k, v, a, b, w0, *, state=None, **_):
        batch, _, heads, size = r.shape
        state = r.new_zeros(batch, heads, size, size) if state is None else state
        return r + w_low + w0 + k + v + a + b, state

    monkeypatch.setattr("rwkv_accel.model.time_mix.wkv7", elementwise)
    ids = torch.randint(1, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, num_targets:] = -100
    # The counter knows addmm, but not the form that adds in place.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(ids, labels).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "peft",
    [
        {"method": "full"},
        {"method": "lora", "rank": 4, "train_parts": ["emb"]},
        {"method": "lora", "rank": 4, "train_parts": ["emb"], "base_quant": "int8"},
        {"method": "lora", "rank": 4, "train_parts": ["emb", "head"]},
    ],
    ids=["full", "lora", "lora-int8", "lora-head"],
)
@pytest.mark.parametrize("num_targets", [TOKENS, 7])
def test_flops_equal_those_that_torch_counts(base, monkeypatch, peft, num_targets):
    model = load(base, **peft)
    per_token, per_target = flops_of(model)
    products = (per_token - 3 * LAYERS * RECURRENCE) * TOKENS + per_target * num_targets
    assert counted(model, monkeypatch, num_targets) == products


def test_blocks_below_the_first_trained_one_run_forward_only(base, monkeypatch):
    model = load(base, method="lora", rank=4, targets=["blocks.2.ffn.key"])
    per_token, per_target = flops_of(model)
    products = (per_token - (1 + 1 + 3) * RECURRENCE) * TOKENS + per_target * TOKENS
    found = counted(model, monkeypatch)
    assert found <= products <= 1.3 * found, "in the block itself, matrices in front of the target are counted in full"
    whole, _ = flops_of(load(base, method="lora", rank=4, targets=["blocks.0.ffn.key"]))
    assert per_token < 0.7 * whole


def test_full_training_is_about_six_flops_per_weight(base):
    model = load(base, method="full")
    per_token, per_target = flops_of(model)
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith("emb"))
    assert per_token - 3 * LAYERS * RECURRENCE + per_target == pytest.approx(6 * weights, rel=0.01)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("AMD Instinct MI300X", 1307.4),
        ("Tesla T4", None),
    ],
)
def test_peak_by_the_name_of_the_driver(name, peak):
    assert peak_tflops(name) == peak


def test_utilisation(base):
    assert Compute(token_flops=3e9, target_flops=1e9, peak_flops=1e15).utilisation(100.0, 20.0) == pytest.approx(0.32)
    model = load(base, method="full")
    per_token, per_target = flops_of(model)
    assert compute_of(model, "NVIDIA H100 80GB HBM3", 8) == Compute(per_token, per_target, 8 * 989.4e12)
    assert compute_of(model, None, 1) is None
    assert compute_of(model, "Tesla T4", 1) is None
