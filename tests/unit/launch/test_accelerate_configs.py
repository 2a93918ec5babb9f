"""Every shipped Accelerate file loads in the installed Accelerate and says what its name says."""

import re

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.helpers import ROOT, launch

FOLDER = ROOT / "accelerate_configs"
FILES = sorted(FOLDER.glob("*.yaml"))


def resolved(path, *options):
    """The launcher's arguments after the file was read."""
    args = launch_command_parser().parse_args(["--config_file", str(path), *options, "train.py"])
    return _validate_launch_command(args)[0]


def test_the_set_is_complete():
    names = {path.stem for path in FILES}
    single = {"cpu", "single_gpu", "ddp", "fsdp2", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"}
    assert names == single | {
        f"multinode_{name}" for name in ("ddp", "fsdp2", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_file_loads_and_means_its_name(path):
    config, args = load_config_from_file(str(path)), resolved(path)
    name = path.stem.removeprefix("multinode_")
    assert args.num_machines == (2 if path.stem.startswith("multinode_") else 1)
    assert config.main_training_function == "main"
    assert args.use_deepspeed == name.startswith("zero")
    assert args.use_fsdp == (name == "fsdp2")
    assert args.multi_gpu == (name == "ddp")
    assert args.use_cpu == (name == "cpu")
    if name.startswith("zero"):
        assert args.zero_stage == int(name[4])
        assert args.deepspeed_multinode_launcher == "standard"  # the default, pdsh, needs ssh between the nodes
        offload = "cpu" if name.endswith("offload") else "none"
        assert (args.offload_optimizer_device or "none") == offload
        assert (args.offload_param_device or "none") == ("cpu" if name == "zero3_offload" else "none")
    if name == "fsdp2":
        assert args.fsdp_version == "2" or int(args.fsdp_version) == 2
        assert args.fsdp_transformer_layer_cls_to_wrap == "Block"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_numbers_of_the_recipe_are_not_set_here(path):
    tree = yaml.safe_load(path.read_text())
    engine = tree.get("deepspeed_config", {})
    assert not {"gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"} & set(engine)
    assert tree["mixed_precision"] == "no"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_processes_on_the_command_line_win(path):
    if path.stem in ("cpu", "single_gpu"):
        pytest.skip("one process")
    assert resolved(path, "--num_processes", "6").num_processes == 6


def test_single_gpu_file_launches_and_takes_the_cpu_without_one():
    """The one file that no strategy test launches."""
    train = ("-m", "rwkv_accel.train", "launch/recipes/demo.yaml", "--dry-run")
    done = launch("single_gpu", 1, *train, CUDA_VISIBLE_DEVICES="")
    assert "plan: " in done.stdout


def test_readme_has_a_row_for_every_file():
    text = (FOLDER / "README.md").read_text()
    rows = set(re.findall(r"^\| `([a-z0-9_]+)\.yaml`", text, re.MULTILINE))
    assert rows == {path.stem for path in FILES}
