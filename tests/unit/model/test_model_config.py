"""Sizes: inner ranks of new models, sizes read from shapes, refusals."""

import pytest

from rwkv_accel.errors import UserError
from rwkv_accel.model.config import RWKV7Config, parameter_shapes

RELEASED = {
    # name: (config, number of parameters without layer-0 value matrices)
    "0.1B": (RWKV7Config(65536, 768, 12, 64, 3072, 64, 64, 32, 128), 191_034_624),
    "0.4B": (RWKV7Config(65536, 1024, 24, 64, 4096, 64, 64, 32, 128), 450_767_872),
    "1.5B": (RWKV7Config(65536, 2048, 24, 64, 8192, 96, 96, 64, 256), 1_527_404_544),
    "2.9B": (RWKV7Config(65536, 2560, 32, 64, 10240, 96, 96, 64, 320), 2_947_735_040),
    "7.2B": (RWKV7Config(65536, 4096, 32, 64, 16384, 128, 128, 96, 480), 7_199_141_888),
    "13.3B": (RWKV7Config(65536, 4096, 61, 64, 16384, 192, 192, 128, 384), 13_269_245_952),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name):
    config, num_parameters = RELEASED[name]
    shapes = parameter_shapes(config)
    total = 0
    for shape in shapes.values():
        count = 1
        for dim in shape:
            count *= dim
        total += count
    assert total == num_parameters
    assert RWKV7Config.from_shapes(shapes) == config
    assert (config.n_head, config.n_head * config.head_size) == (config.n_embd // 64, config.n_embd)


@pytest.mark.parametrize(
    ("n_embd", "ranks"),
    [
        (768, (64, 64, 32, 128)),
        (1024, (64, 64, 64, 160)),
        (2048, (128, 128, 64, 224)),
        (2560, (128, 128, 96, 256)),
        (4096, (160, 160, 96, 320)),
        (64, (32, 32, 32, 32)),
    ],
)
def test_inner_ranks_of_a_new_model(n_embd, ranks):
    config = RWKV7Config.for_new_model(12, n_embd, 65536)
    assert (config.decay_rank, config.iclr_rank, config.value_rank, config.gate_rank) == ranks
    assert (config.dim_ffn, config.head_size, config.has_layer0_value) == (4 * n_embd, 64, False)


def test_layer0_value_matrices_are_seen(tiny_config):
    config = RWKV7Config(**{**tiny_config.__dict__, "has_layer0_value": True})
    shapes = parameter_shapes(config)
    extra = set(shapes) - set(parameter_shapes(tiny_config))
    assert extra == {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}
    assert RWKV7Config.from_shapes(shapes) == config
    # Layer 0 says nothing about the rank that later layers use.
    assert RWKV7Config.from_shapes({**shapes, "blocks.0.att.v1": (64, 99)}) == config


def test_one_layer(tiny_config):
    config = RWKV7Config(**{**tiny_config.__dict__, "n_layer": 1, "has_layer0_value": True})
    assert RWKV7Config.from_shapes(parameter_shapes(config)) == config
    bare = RWKV7Config(**{**config.__dict__, "has_layer0_value": False})
    assert parameter_shapes(RWKV7Config.from_shapes(parameter_shapes(bare))) == parameter_shapes(bare)


def _without(shapes, name):
    return {key: shape for key, shape in shapes.items() if key != name}


def test_refusals(tiny_config):
    shapes = parameter_shapes(tiny_config)
    with pytest.raises(UserError, match=r"no `blocks\.0\.att\.r_k` among the tensors"):
        RWKV7Config.from_shapes(_without(shapes, "blocks.0.att.r_k"))
    with pytest.raises(UserError, match=r"r_k` \[2, 16\] does not fit the 64 channels"):
        RWKV7Config.from_shapes({**shapes, "blocks.0.att.r_k": (2, 16)})
    with pytest.raises(UserError, match=r"`emb.weight` has shape \[64\], expected 2 dimensions"):
        RWKV7Config.from_shapes({**shapes, "emb.weight": (64,)})
    gap = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.1.")}
    with pytest.raises(UserError, match=r"blocks \[1\] of 3 are missing"):
        RWKV7Config.from_shapes(gap)
    with pytest.raises(UserError, match="n_embd 65 is not a multiple of head_size 32; use 64"):
        RWKV7Config.for_new_model(2, 65, 10, 32)
    with pytest.raises(UserError, match="vocab_size is 0"):
        RWKV7Config.for_new_model(2, 64, 0, 32)
