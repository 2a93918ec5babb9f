"""What a recipe's peft section selects, and every mistake in it: one line with the value and the remedy."""

import pytest
import torch
from pydantic import ValidationError

from rwkv_accel.config.schema import ModelConfig, PeftConfig
from rwkv_accel.errors import UserError
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.peft.apply import (
    adapter_parameters,
    describe_parameters,
    load_model_and_apply_peft,
    mark_only_lora_as_trainable,
    print_model_param,
)
from rwkv_accel.peft.groups import DECAYED, group_of
from rwkv_accel.peft.plan import make_plan, trainable_shapes
from rwkv_accel.peft.targets import matches, part_of

TINY = RWKV7Config.for_new_model(2, 64, 97, 32)
DEEP = RWKV7Config.for_new_model(4, 64, 97, 32)


def plan(config=DEEP, **section):
    return make_plan(config, PeftConfig.model_validate(section))


def test_default_targets_are_all_block_matrices():
    assert len(plan().adapters) == 6 * 4


def test_targets_match_exact_suffixes_not_substrings():
    assert sorted(plan(targets=["att.key"]).adapters) == [f"blocks.{i}.att.key" for i in range(4)]
    assert sorted(plan(targets=["key"]).adapters) == sorted(
        f"blocks.{i}.{p}.key" for i in range(4) for p in ("att", "ffn")
    )
    assert list(plan(targets=["blocks.3.ffn.value", "head"]).adapters) == ["blocks.3.ffn.value", "head"]
    assert sorted(plan(targets=["blocks.[02].att.*"]).adapters) == sorted(
        f"blocks.{i}.att.{p}" for i in (0, 2) for p in ("receptance", "key", "value", "output")
    )
    assert not matches("ey", "blocks.0.att.key")
    assert not matches("att.key", "blocks.0.xatt.key")


def test_rank_pattern_takes_the_first_match():
    adapters = plan(rank=4, rank_pattern={"blocks.0.*": 2, "ffn.key": 8}).adapters
    assert {name: spec.rank for name, spec in adapters.items() if name.endswith("ffn.key")} == {
        "blocks.0.ffn.key": 2, "blocks.1.ffn.key": 8, "blocks.2.ffn.key": 8, "blocks.3.ffn.key": 8,
    }  # fmt: skip
    assert adapters["blocks.1.att.key"].rank == 4


@pytest.mark.parametrize(
    ("alpha", "rslora", "rank", "scale"),
    [(None, False, 8, 1), (16, False, 8, 2), (16, True, 16, 4), (4, False, 8, 0.5)],
)
def test_scale(alpha, rslora, rank, scale):
    spec = plan(alpha=alpha, rslora=rslora, rank=rank, targets=["head"]).adapters["head"]
    assert spec.scale == scale


def test_layer_range_bounds_adapters_parts_and_states():
    chosen = plan(layer_range=[1, 2], train_parts=["ln", "vectors"], train_state=True, targets=["att.key", "head"])
    assert sorted(chosen.adapters) == ["blocks.1.att.key", "blocks.2.att.key", "head"]
    assert chosen.state_blocks == (1, 2)
    assert {name.split(".")[1] for name in chosen.trained if name.startswith("blocks")} == {"1", "2"}
    assert "ln_out.weight" in chosen.trained


def test_parts_cover_the_base_without_overlap():
    shapes = trainable_shapes(DEEP)
    counts = {
        part: sum(part_of(name) == part for name in shapes) for part in ("emb", "head", "ln", "vectors", "lowrank")
    }
    # Per block: ln1, ln2, ln_x (weight, bias); 12 or 11 vectors and ffn.x_k; 8 or 6 matrices. Outside: ln0, ln_out.
    assert counts == {"emb": 1, "head": 1, "ln": 4 * 6 + 4, "vectors": 4 * 13 - 1, "lowrank": 4 * 8 - 2}
    matrices = [name for name in shapes if part_of(name) is None]
    assert len(matrices) == 4 * 6
    assert all(name.endswith(".weight") for name in matrices)


def test_full_trains_all_but_what_is_frozen():
    assert plan(method="full").trained == set(trainable_shapes(DEEP))
    frozen = plan(
        method="full", freeze_parts=["emb", "ln"], freeze_patterns=["att.w0", "blocks.0.ffn.*"], layer_range=[0, 1]
    )
    assert frozen.trained == {
        name
        for name in trainable_shapes(DEEP)
        if part_of(name) not in ("emb", "ln")
        and not name.endswith("att.w0")
        and not name.startswith(("blocks.0.ffn", "blocks.2", "blocks.3"))
    }


def test_patterns_add_to_parts():
    chosen = plan(method="parts", train_patterns=["att.w0", "blocks.3.ffn.key.weight"])
    assert chosen.trained == {f"blocks.{i}.att.w0" for i in range(4)} | {"blocks.3.ffn.key.weight"}


def test_quantised_are_the_block_matrices_only():
    chosen = plan(base_quant="nf4", targets=["att.key"])
    assert len(chosen.quantised) == 24
    assert "head" not in chosen.quantised


def test_double_quant_stores_the_maxima_in_a_byte_each(base):
    sizes = {}
    for double in (False, True):
        peft = PeftConfig(rank=4, targets=("att.key",), base_quant="nf4", double_quant=double)
        layer = load_model_and_apply_peft(ModelConfig(path=str(base)), peft).blocks[0].ffn.key
        sizes[double] = sorted(getattr(layer, name).nbytes for name in layer.stored_names)
    count, maxima = 4 * 64 * 64, 4 * 64
    assert sizes == {False: [4 * maxima, count // 2], True: [4 * 2, maxima, count // 2]}


def test_svd_niter_reaches_the_start_of_pissa(base):
    starts = [
        load_model_and_apply_peft(
            ModelConfig(path=str(base)), PeftConfig(method="pissa", rank=4, targets=("att.key",), svd_niter=niter)
        ).blocks[0].att.key.lora_A
        for niter in (None, 0, 0)
    ]  # fmt: skip
    assert torch.equal(starts[1], starts[2])
    assert not torch.allclose(starts[0], starts[1])


MISTAKES = [
    ({"targets": ["att.keys"]}, r"peft.targets: 'att.keys' matches no linear layer .* nearest is att.key"),
    ({"targets": ["att.ky", "head"]}, r"nearest is att.key"),
    ({"targets": ["blocks.9.att.key"]}, r"'blocks.9.att.key' matches no linear layer .*nearest is blocks"),
    ({"targets": ["blocks.*.attn.*"]}, r"matches no linear layer .*names look like"),
    ({"rank_pattern": {"head": 4}}, r"peft.rank_pattern: 'head' matches no adapter"),
    ({"rank": 65}, r"peft.rank 65 does not fit a matrix of 64 x 64; use 1 to 64"),
    ({"rank": 4, "rank_pattern": {"att.key": 65}}, r"peft.rank 65 does not fit"),
    ({"method": "miss", "miss_variant": "bat", "rank": 48}, r"peft.rank 48 must divide both sides"),
    ({"layer_range": [2, 4]}, r"peft.layer_range \[2, 4\] ends beyond the model's last block 3; use at most \[2, 3\]"),
    ({"train_patterns": ["att.w9"]}, r"peft.train_patterns: 'att.w9' matches no parameter .*nearest is att.w"),
    ({"freeze_patterns": ["att.zz"]}, r"peft.freeze_patterns: 'att.zz' matches no parameter"),
    ({"targets": ["head"], "train_parts": ["head"]}, r"head has an adapter .* and is trained itself; choose one"),
    (
        {"base_quant": "nf4", "targets": ["att.value"], "train_patterns": ["att.key.weight"]},
        r"blocks.0.att.key.weight cannot train: peft.base_quant nf4 stores it quantised",
    ),
    ({"method": "full", "freeze_patterns": ["*"]}, r"nothing is trained"),
]


@pytest.mark.parametrize(("section", "message"), MISTAKES)
def test_mistakes_found_with_the_model(section, message):
    with pytest.raises(UserError, match=message) as caught:
        plan(**section)
    assert "\n" not in str(caught.value)


CONTRADICTIONS = [
    ({"rank": 0}, "greater than or equal to 1"),
    ({"alpha": 0}, "greater than 0"),
    ({"method": "miss", "alpha": 8}, r"peft.alpha applies to peft.method lora, dora, pissa, not miss; remove it"),
    ({"method": "state", "dropout": 0.1}, r"peft.dropout applies to peft.method"),
    ({"method": "full", "rank_pattern": {"head": 2}}, r"peft.rank_pattern applies to"),
    ({"method": "lora", "miss_variant": "bat"}, r"peft.miss_variant applies to peft.method miss, not lora"),
    ({"method": "lora", "svd_niter": 2}, r"peft.svd_niter applies to peft.method pissa, not lora"),
    ({"rslora": True}, r"peft.rslora needs peft.alpha"),
    ({"method": "pissa", "dropout": 0.1}, r"peft.dropout must be 0 with peft.method pissa"),
    ({"method": "full", "base_quant": "nf4"}, r"peft.base_quant nf4 needs a frozen base"),
    ({"method": "full", "train_state": True}, r"method full .*train_state"),
    ({"method": "parts"}, r"peft.method parts trains nothing; set peft.train_parts"),
    ({"double_quant": True}, r"peft.double_quant applies to peft.base_quant nf4, not none"),
    ({"base_quant": "int8", "double_quant": True}, r"applies to peft.base_quant nf4, not int8"),
    ({"state_prompt": "hi"}, r"peft.state_prompt has no effect without a trained state"),
    ({"layer_range": [3, 1]}, r"peft.layer_range \[3, 1\] is empty"),
    ({"targets": []}, r"peft.targets is empty"),
]


@pytest.mark.parametrize(("section", "message"), CONTRADICTIONS)
def test_contradictions_found_in_the_recipe(section, message):
    with pytest.raises(ValidationError, match=message):
        PeftConfig.model_validate(section)


def test_state_from_a_prompt_is_the_models_memory_of_it(base):
    prompt = "a prompt"
    section = PeftConfig(method="state", state_prompt=prompt, layer_range=(1, 1))
    encode = lambda text: [ord(char) % 97 for char in text]  # noqa: E731
    model = load_model_and_apply_peft(ModelConfig(path=str(base)), section, encode=encode)
    plain = load_model_and_apply_peft(ModelConfig(path=str(base)), PeftConfig(method="parts", train_parts=("ln",)))
    with torch.no_grad():
        _, state = plain(torch.tensor([encode(prompt)]), return_state=True)
    assert torch.equal(model.blocks[1].att.time_state, state.wkv[1][0])
    assert model.blocks[0].att.time_state is None
    with pytest.raises(ValueError, match="encode"):
        load_model_and_apply_peft(ModelConfig(path=str(base)), section)


def test_groups_put_decay_on_large_matrices_only():
    shapes = trainable_shapes(TINY)
    decayed = {name for name in shapes if group_of(name) in DECAYED}
    assert decayed == {name for name in shapes if part_of(name) in (None, "emb", "head")}
    assert group_of("blocks.1.att.w0") == "w0"
    assert group_of("blocks.1.att.key.lora_B") == "lora_B"
    assert group_of("blocks.1.att.time_state") == "state"
    assert group_of("blocks.1.ffn.key.miss_D") == group_of("blocks.1.ffn.key.lora_m") == "other"
    assert group_of("blocks.1.att.r_k") == group_of("blocks.1.att.w1") == group_of("ln_out.weight") == "other"


def test_print_model_param_counts_exactly(base, capsys):
    model = load_model_and_apply_peft(
        ModelConfig(path=str(base)),
        PeftConfig(rank=4, targets=("att.key",), train_parts=("head",), train_state=True, base_quant="nf4"),
    )
    print_model_param(model)
    total = sum(torch.Size(shape).numel() for shape in trainable_shapes(TINY).values())
    adapters, states, head = 2 * 2 * 4 * 64, 2 * 2 * 32 * 32, 97 * 64
    printed = capsys.readouterr().out
    trained = adapters + states + head
    whole = total + adapters + states
    assert printed == describe_parameters(model) + "\n"
    assert f"parameters: {whole:,} in all, {trained:,} trained ({100 * trained / whole:.3f}%)" in printed
    assert "group lora_A: 512" in printed
    assert "group state: 4,096" in printed
    assert f"group head: {head:,} (decays)" in printed
    codes = (4 * 64 * 64 + 2 * 4 * 64 * 64) * 2 // 2
    assert f"uint8 {codes:,}" in printed


def test_mark_only_lora_as_trainable(base):
    model = load_model_and_apply_peft(ModelConfig(path=str(base)), PeftConfig(rank=4, targets=("att.key",)))
    model.requires_grad_(True)
    assert mark_only_lora_as_trainable(model) == 2 * 2 * 4 * 64
    assert {name.rsplit(".", 1)[1] for name in adapter_parameters(model)} == {"lora_A", "lora_B"}
    assert mark_only_lora_as_trainable(model, ["emb"]) == 2 * 2 * 4 * 64 + 97 * 64
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="nothing would train"):
        mark_only_lora_as_trainable(plain)
