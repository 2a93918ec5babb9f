"""Every key of a recipe is documented, read, and named in a test of what it does."""

import ast
import re
from pathlib import Path

import pytest

from rwkv_accel.config.base import section_of
from rwkv_accel.config.load import leaf_keys
from rwkv_accel.config.reference import reference, type_text
from rwkv_accel.config.schema import CheckpointConfig, RunConfig, TrainerConfig

ROOT = Path(__file__).parents[2]
PACKAGE, CONFIG = ROOT / "rwkv_accel", ROOT / "rwkv_accel" / "config"
KEYS = leaf_keys()
# These say what a recipe may hold, not what a key does.
TESTS_OF_RECIPES = {"test_config.py", Path(__file__).name}
# Read through names that data give: the parameter groups of the optimizer.
READ_BY_GROUP = {"optim.lr_scale": PACKAGE / "optim.py"}

# Tests that change what happens with a switch of the trainer section, as a reader would look for them.
SWITCHES = {
    "accelerator": "integration/test_switches.py::test_gpu_that_is_not_there_is_refused",
    "strategy": "integration/test_switches.py::test_other_strategy_than_the_launchers_is_one_line",
    "devices": "integration/test_switches.py::test_what_the_launcher_gave_is_accepted",
    "num_nodes": "integration/test_switches.py::test_what_the_launcher_gave_is_accepted",
    "min_steps": "integration/test_switches.py::test_min_steps_holds_off_early_stopping",
    "max_tokens": "integration/test_switches.py::test_max_tokens_ends_the_run_and_the_schedule",
    "max_time": "integration/test_switches.py::test_max_time_ends_in_order_and_the_same_command_continues",
    "limit_train_batches": "integration/test_switches.py::test_limit_train_batches",
    "overfit_batches": "integration/test_switches.py::test_overfit_batches_repeats_its_rows",
    "fast_dev_run": "integration/test_switches.py::test_fast_dev_run_does_everything_and_leaves_nothing",
    "compile": "integration/test_switches.py::test_compile_reaches_the_blocks",
    "deterministic": "integration/test_switches.py::test_deterministic_reaches_torch",
    "benchmark": "integration/test_switches.py::test_benchmark_reaches_cudnn",
    "detect_anomaly": "integration/test_switches.py::test_detect_anomaly_stops_at_the_operation",
    "profiler": "integration/test_switches.py::test_profiler_leaves_a_trace_of_three_updates",
    "gradient_checkpointing": "unit/model/test_model_training.py::test_gradient_checkpointing_changes_nothing",
}


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


@pytest.fixture(scope="module")
def tests_text():
    return {p: t for p, t in trees(ROOT / "tests").items() if p.name not in TESTS_OF_RECIPES}


def names(key, tree):
    """Whether a test sets a key: as section.key in a string, as a key of a dict, or as an argument."""
    last = key.rpartition(".")[2]
    dotted = re.compile(rf"(?<![\w.]){re.escape(key)}(?![\w.])")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and dotted.search(node.value):
            return True
        if isinstance(node, ast.keyword) and node.arg == last:
            return True
        if isinstance(node, ast.Dict) and any(isinstance(k, ast.Constant) and k.value == last for k in node.keys):
            return True
    return False


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_set_by_a_test_of_what_it_does(key, tests_text):
    assert any(names(key, tree) for tree in tests_text.values()), f"no test sets {key}"


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_has_its_test(switch, tests_text):
    file, _, function = SWITCHES[switch].partition("::")
    tree = tests_text[ROOT / "tests" / file]
    (test,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
    assert switch in ast.unparse(test)


def test_sections_are_found_behind_none():
    assert section_of(RunConfig.model_fields["trainer"].annotation) is TrainerConfig
    assert section_of(int | None) is None
