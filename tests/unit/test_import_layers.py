"""Lower layers never import higher ones, and heavy packages stay out of module level where they cost start-up."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "rwkv_accel"

LAYERS = [
    {"errors", "config", "runtime", "heartbeat", "progress", "__init__"},
    {"ops"},
    {"model"},
    {"peft", "data"},
    {
        "schedules",
        "optim",
        "host_adamw",
        "state",
        "checkpoint",
        "tracking",
        "evaluation",
        "generation",
        "interrupt",
        "limits",
        "profiling",
        "metric_control",
        "guard",
        "disk",
        "out_of_memory",
        "watchdog",
        "skipped",
        "tasks",
        "cluster",
        "report",
    },
    {"run", "records", "saving", "hooks", "run_facts", "run_setup", "loop", "rehearsal", "dry_run", "plan"},
    {
        "train",
        "generate",
        "evaluate",
        "export",
        "inspect",
        "doctor",
        "bench",
        "launch",
        "launch_plan",
    },
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# accelerate and deepspeed appear only here (design: the substrate stays at the edge).
SUBSTRATE = {"runtime", "checkpoint", "evaluation", "run", "hooks", "run_setup", "loop", "train", "doctor"}
# `python -m rwkv_accel.data` and `.report` are entry points that live in lower folders.
ENTRY_FILES = {"data/__main__.py", "report/__main__.py"}

FILES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py"))


def part_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def imports(file: str) -> list[tuple[str, bool]]:
    """(module, at module level) of every import in the file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    top = set()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            top.add(node)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            found.append((node.module, node in top))
    return found


def test_every_part_has_a_layer():
    assert {part_of(f) for f in FILES} <= set(LEVEL)


@pytest.mark.parametrize("file", FILES)
def test_imports_point_downwards(file):
    part = part_of(file)
    for module, _ in imports(file):
        if not module.startswith("rwkv_accel."):
            continue
        target = module.split(".")[1]
        assert target in LEVEL, f"{file} imports unknown {module}"
        same = target == part
        down = LEVEL[target] < LEVEL[part] or (LEVEL[target] == LEVEL[part] and LEVEL[part] in (0, 4, 5))
        assert same or down or file in ENTRY_FILES, f"{file} (layer {LEVEL[part]}) imports {module}"


@pytest.mark.parametrize("file", FILES)
def test_data_never_imports_model(file):
    if part_of(file) == "data":
        assert not [m for m, _ in imports(file) if m.startswith("rwkv_accel.model")]


@pytest.mark.parametrize("file", FILES)
def test_substrate_stays_at_the_edge(file):
    if part_of(file) not in SUBSTRATE:
        assert not [m for m, top in imports(file) if top and m.split(".")[0] in ("accelerate", "deepspeed")]


@pytest.mark.parametrize("file", FILES)
def test_optional_packages_are_imported_where_needed(file):
    heavy = {
        "deepspeed",
        "triton",
        "bitsandbytes",
        "wandb",
        "datasets",
        "fsspec",
        "transformers",
        "tensorboard",
    }
    if "triton_" in file:
        heavy = heavy - {"triton"}
    assert not [m for m, top in imports(file) if top and m.split(".")[0] in heavy]


def test_entry_points_load_no_torch_at_module_level():
    for name in LAYERS[-1]:
        file = f"{name}.py"
        if file in FILES:
            top = {m.split(".")[0] for m, is_top in imports(file) if is_top}
            assert not top & {"torch", "numpy", "accelerate"}, file
