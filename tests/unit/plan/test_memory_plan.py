"""The planner's memory against what a training step really allocates, counted by torch's profiler."""

import gc

import pytest
import torch

from rwkv_accel.bench.harness import peak_tensor_mib
from rwkv_accel.config.schema import ModelConfig, OptimConfig, PeftConfig
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.init import generate_init_weight
from rwkv_accel.model.precision import Precision
from rwkv_accel.optim import build_optimizer
from rwkv_accel.peft.apply import load_model_and_apply_peft
from rwkv_accel.plan.memory import Job, checkpoint_bytes, estimate, training_of
from rwkv_accel.plan.trace import Work, activations_of, weights_of

WIDE, LONG, DEEP = (3, 256, 1024, 64), (2, 128, 8192, 32), (6, 128, 512, 64)
ONE_ROW, BLOCKWISE = {"rows": 1, "tokens": 256}, {"rows": 2, "tokens": 128, "checkpointing": "block"}
CASES = {
    "lora": (WIDE, {"rank": 16}, "32-true", {"rows": 2, "tokens": 192}, 1),
    "lora, bf16": (WIDE, {}, "bf16-mixed", {"rows": 2, "tokens": 192, "packed": False}, 1),
    "lora, recomputed blocks": (DEEP, {}, "32-true", {"rows": 2, "tokens": 256, "checkpointing": "block"}, 1),
    "lora, selective": (DEEP, {}, "32-true", {"rows": 2, "tokens": 256, "checkpointing": "selective"}, 1),
    "nf4": (WIDE, {"base_quant": "nf4"}, "bf16-mixed", {"rows": 1, "tokens": 256}, 1),
    "dora on int8": (WIDE, {"method": "dora", "base_quant": "int8"}, "32-true", {"rows": 1, "tokens": 256}, 1),
    "full": (WIDE, {"method": "full"}, "32-true", {"rows": 1, "tokens": 128}, 1),
    "full, accumulated": (WIDE, {"method": "full"}, "32-true", {"rows": 1, "tokens": 128}, 2),
    "full, bf16 weights": (DEEP, {"method": "full"}, "bf16-true", {"rows": 2, "tokens": 128}, 1),
    "state": (WIDE, {"method": "state"}, "32-true", {"rows": 2, "tokens": 128}, 1),
    "miss on int8": (WIDE, {"method": "miss", "base_quant": "int8"}, "32-true", {"rows": 2, "tokens": 128}, 1),
    "state, recomputed blocks": (DEEP, {"method": "state"}, "32-true", BLOCKWISE, 1),
    "upper blocks and norms": (DEEP, {"layer_range": [3, 5], "train_parts": ["ln"]}, "32-true", ONE_ROW, 1),
    "upper blocks, embedding": (DEEP, {"method": "full", "layer_range": [3, 5]}, "32-true", ONE_ROW, 1),
    "lower blocks": (DEEP, {"layer_range": [0, 2]}, "32-true", ONE_ROW, 2),
    "one layer of one block": (DEEP, {"targets": ["blocks.4.att.key"]}, "32-true", ONE_ROW, 1),
    "one block": ((1, 128, 512, 64), {}, "32-true", ONE_ROW, 1),
    "large head": (LONG, {"train_parts": ["head"]}, "32-true", {"rows": 1, "tokens": 512, "loss_chunk_rows": 128}, 1),
}  # fmt: skip


def predicted(case, device_type):
    shape, peft, precision, work, accumulation = case
    config, peft, precision = RWKV7Config.for_new_model(*shape), PeftConfig(**peft), Precision.from_name(precision)
    work = Work(**work, device_type=device_type)
    weights = weights_of(config, peft, precision)
    job = Job(1, "adamw", accumulation, fused=device_type == "cuda")
    return weights, estimate(
        "single", weights, activations_of(config, peft, precision, work), job,
        micro_batch_size=work.rows, tokens=work.tokens, checkpointing=work.checkpointing,
    )  # fmt: skip


def measured(case, device, folder):
    """(bytes of the parameters, peak of the second update with all that was there before)."""
    shape, peft, precision, work, accumulation = case
    work = Work(**work)
    config = RWKV7Config.for_new_model(*shape)
    generate_init_weight(config, folder / "base.pth", seed=0)
    model = load_model_and_apply_peft(
        ModelConfig(path=str(folder / "base.pth")), PeftConfig(**peft), precision=Precision.from_name(precision)
    ).to(device)
    model.gradient_checkpointing, model.loss_chunk_rows = work.checkpointing, work.loss_chunk_rows
    optimizer = build_optimizer(model, OptimConfig())
    num_tokens = work.rows * work.tokens
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config.vocab_size, (1, num_tokens), generator=generator).to(device)
    ids = ids if work.packed else ids.view(work.rows, work.tokens)
    rows = torch.arange(num_tokens, device=device)
    borders = list(range(0, num_tokens + 1, work.tokens)) if work.packed else None

    def update():
        for _ in range(accumulation):
            model(ids, ids, target_rows=rows, cu_seqlens=borders).backward()
        optimizer.step()
        optimizer.zero_grad()

    update()
    gc.collect()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = sum(
        t.numel() * t.element_size()
        for s in optimizer.state.values()
        for t in s.values()
        if isinstance(t, torch.Tensor)
    )
    return weights, weights + moments + peak_tensor_mib(update, device) * 2**20


@pytest.mark.parametrize("case", CASES)
def test_peak_of_a_step_is_within_a_tenth_of_the_measured_one(case, tmp_path):
    weights, found = predicted(CASES[case], "cpu")
    real_weights, peak = measured(CASES[case], "cpu", tmp_path)
    assert weights.all == real_weights
    assert found.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_peak_on_a_gpu_is_within_a_tenth_of_max_memory_allocated(case, tmp_path):
    _, found = predicted(CASES[case], "cuda")
    _, peak = measured(CASES[case], "cuda", tmp_path)
    assert found.peak == pytest.approx(peak, rel=0.1)


@pytest.fixture(scope="module")
def lora():
    config, peft, precision = RWKV7Config.for_new_model(*WIDE), PeftConfig(), Precision.from_name("bf16-mixed")
    return weights_of(config, peft, precision), activations_of(config, peft, precision, Work(1, 128))


def of(lora, strategy, gpus=4, **job):
    options = {"micro_batch_size": 1, "tokens": 128, "checkpointing": "none"}
    return estimate(strategy, *lora, Job(gpus, "adamw", 1, **job), **options)


def test_what_each_strategy_splits(lora):
    weights, _ = lora
    trained = weights.trained
    ddp, zero1, zero2, zero3, fsdp2 = (of(lora, s) for s in ("ddp", "zero1", "zero2", "zero3", "fsdp2"))
    assert (ddp.weights, ddp.gradients, ddp.moments, ddp.buffers) == (weights.all, trained, 2 * trained, trained)
    # bf16-mixed trains fp32 values: DeepSpeed's master copy is as large as they are.
    assert (zero1.weights, zero1.gradients, zero1.moments) == (weights.all, trained, 3 * trained // 4)
    assert (zero2.gradients, zero2.moments) == (trained / 4, 3 * trained // 4)
    assert zero3.weights == fsdp2.weights == -(-weights.all // 4)
    assert of(lora, "zero3", gpus=1).weights == weights.all


def test_offload_moves_moments_and_gradients_to_the_host(lora):
    plain, offloaded = of(lora, "zero2"), of(lora, "zero2_offload")
    assert (offloaded.moments, offloaded.gradients) == (0, 0)
    assert offloaded.host == plain.moments + plain.gradients
    assert plain.host == 0
    assert offloaded.peak < plain.peak


def test_offload_moves_the_inputs_of_blocks_to_the_host():
    num_blocks, channels, tokens, rows = 6, 128, 64, 2
    config = RWKV7Config.for_new_model(num_blocks, channels, 512, 64)
    precision = Precision.from_name("bf16-mixed")
    work = {mode: Work(rows, tokens, checkpointing=mode) for mode in ("block", "offload")}
    block, offload = (activations_of(config, PeftConfig(), precision, work[mode]) for mode in work)
    one_input = rows * tokens * channels * 2
    assert (block.on_host, offload.on_host) == (0, num_blocks * one_input)
    assert block.kept - offload.kept == num_blocks * one_input
    assert offload.backward_peak < block.backward_peak
    weights = weights_of(config, PeftConfig(), precision)
    options = {"micro_batch_size": rows, "tokens": tokens}
    with_block, with_offload = (
        estimate("single", weights, a, Job(1, "adamw", 2), **options, checkpointing=mode)
        for mode, a in (("block", block), ("offload", offload))
    )
    assert with_offload.host - with_block.host == offload.on_host
    # Two micro-batches, there and back.
    moved_seconds = 2 * 2 * offload.on_host / Job(1, "adamw", 2).cluster.host_link
    assert with_offload.seconds - with_block.seconds == pytest.approx(moved_seconds)


def test_numbers_for_the_traffic_are_those_of_the_model(lora):
    weights, _ = lora
    training = training_of(weights, 3)
    assert training.all_params == weights.num_params
    assert training.trained_params * training.trained_bytes == weights.trained
    frozen = training.all_params - training.trained_params
    assert frozen * training.frozen_bytes == pytest.approx(weights.frozen)
    assert training.micro_batches == 3
    assert checkpoint_bytes(weights, "adamw") == 3 * weights.trained
    assert checkpoint_bytes(weights, "sgd") == weights.trained


def test_blocks_in_front_of_all_that_trains_keep_nothing():
    config, precision = RWKV7Config.for_new_model(8, 128, 512, 64), Precision.from_name("32-true")
    kept = [
        activations_of(config, PeftConfig(layer_range=(first, 7)), precision, Work(1, 128)).kept for first in (0, 4)
    ]
    assert kept[1] < 0.6 * kept[0]
