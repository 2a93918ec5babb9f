"""Every key of a recipe is documented, read, and has a test that fails when it is ignored."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from rwkv_accel.config.__main__ import main
from rwkv_accel.config.base import section_of
from rwkv_accel.config.load import leaf_keys
from rwkv_accel.config.reference import reference, type_text
from rwkv_accel.config.schema import CheckpointConfig, RunConfig, TrainerConfig

ROOT = Path(__file__).parents[2]
PACKAGE, CONFIG = ROOT / "rwkv_accel", ROOT / "rwkv_accel" / "config"
KEYS = leaf_keys()
KEY_TESTS = yaml.safe_load(Path(__file__).with_name("config_key_tests.yaml").read_text(encoding="utf-8"))
# Read through names that data give: the parameter groups of the optimizer.
READ_BY_GROUP = {"optim.lr_scale": PACKAGE / "optim.py"}


def trees(folder):
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")}


def reads(tree):
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


@pytest.fixture(scope="module")
def names_read():
    """Attributes read outside of config/, and those that methods of the schema read for a caller outside."""
    parsed = trees(PACKAGE)
    outside = set().union(*(reads(tree) for path, tree in parsed.items() if CONFIG not in path.parents))
    for path, tree in parsed.items():
        if CONFIG in path.parents:
            methods = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in outside]
            outside |= set().union(set(), *map(reads, methods))
    return outside


def test_documented_keys_are_those_of_the_schema():
    """Remedy: python -m rwkv_accel.config > docs/config.md"""
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == reference()


def test_the_command_prints_it_and_refuses_arguments(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == reference()
    with pytest.raises(SystemExit) as ended:
        main(["trainer"])
    assert ended.value.code == 2


def test_the_reference_has_every_key_with_its_meaning():
    sections = {}
    for part in reference().split("\n## ")[1:]:
        title, _, table = part.partition("\n")
        sections["" if title == "Top level" else title] = table
    for key in KEYS:
        section, _, name = key.rpartition(".")
        (row,) = [line for line in sections[section].splitlines() if line.startswith(f"| `{name}` |")]
        assert re.search(r"\| [^|]{8,} \|$", row.replace("\\|", "")), f"{key} has no docstring"


@pytest.mark.parametrize(
    ("model", "key", "text"),
    [
        (TrainerConfig, "max_steps", "int >= 1 or `null`"),
        (TrainerConfig, "limit_train_batches", "number, or share up to 1.0 or `null`"),
        (TrainerConfig, "deterministic", "`false`, `true`, `warn`"),
        (CheckpointConfig, "background", "`true`, `false`"),
    ],
)
def test_types_are_written_as_yaml_people_write_them(model, key, text):
    field = model.model_fields[key]
    assert type_text(field.annotation, field.metadata) == text


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_read(key, names_read):
    section, _, name = key.rpartition(".")
    if section in READ_BY_GROUP:
        assert "lr_scale.model_dump()" in READ_BY_GROUP[section].read_text(encoding="utf-8")
        return
    assert name in names_read, f"nothing reads {key}"


def test_every_key_has_its_test():
    assert list(KEY_TESTS) == KEYS


@cache
def definitions(file):
    """Functions and variables at the top level of a test file, and of the conftest.py beside it, by name."""
    found = {}
    for path in (file.parent / "conftest.py", file):
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else ():
            if isinstance(node, ast.FunctionDef):
                found[node.name] = node
            elif isinstance(node, ast.Assign):
                found |= {
                    name.id: node for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)
                }
    return found


def with_what_it_uses(file, name):
    """Source of a test, of the fixtures that it asks for, and of the functions and tables that it reads."""
    known, found, todo = definitions(file), {}, [name]
    while todo:
        name = todo.pop()
        if name in known and name not in found:
            found[name] = ast.unparse(known[name])
            nodes = list(ast.walk(known[name]))
            todo += [node.id for node in nodes if isinstance(node, ast.Name)]
            todo += [node.arg for node in nodes if isinstance(node, ast.arg)]
    return "\n".join(found.values())


@pytest.mark.parametrize("key", KEY_TESTS)
def test_the_test_of_a_key_exists_and_names_it(key):
    file, _, test = KEY_TESTS[key].partition("::")
    assert test in definitions(ROOT / "tests" / file), f"{file} has no {test}"
    source = with_what_it_uses(ROOT / "tests" / file, test)
    assert re.search(rf"(?<!\w){key.rpartition('.')[2]}(?!\w)", source), f"{KEY_TESTS[key]} does not name {key}"


def test_sections_are_found_behind_none():
    assert section_of(RunConfig.model_fields["trainer"].annotation) is TrainerConfig
    assert section_of(int | None) is None
