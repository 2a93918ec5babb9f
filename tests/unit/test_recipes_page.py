"""The examples of docs/recipes.md are recipes."""

import re
from pathlib import Path

import pytest
import yaml

from rwkv_accel.config.load import load_config
from rwkv_accel.config.schema import RunConfig

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
AROUND = {"out_dir": "out/x", "model": {"path": "m.pth"}, "data": {"path": "d.jsonl"}}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split(":")[0])
def test_yaml_blocks_load(tmp_path, block):
    tree = yaml.safe_load(block)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**AROUND, **tree}))
    config = load_config(tmp_path / "r.yaml")
    assert set(tree) <= config.model_fields_set


def test_the_shortest_recipe_is_complete():
    shortest = yaml.safe_load(BLOCKS[0])
    assert RunConfig.model_validate(shortest).trainer.max_epochs == 1
    required = [name for name, field in RunConfig.model_fields.items() if field.is_required()]
    assert sorted(required) == sorted(shortest)


def test_every_section_is_named():
    assert [name for name in RunConfig.model_fields if f"`{name}`" not in PAGE] == []


def test_the_override_example_works():
    overrides = re.search(r"lora_1b5.yaml (.*)", PAGE)[1].replace("'", "").split(" ", 2)
    config = load_config("launch/recipes/lora_1b5.yaml", overrides)
    assert (config.optim.lr_init, config.peft.rank, config.data.path) == (1e-5, 64, ("a.jsonl", "b.jsonl"))
