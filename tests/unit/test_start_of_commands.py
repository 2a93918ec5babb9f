"""A mistake on the command line is told before torch is loaded, which takes seconds."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment, write_recipe

COMMANDS = {
    "train": ["recipe"],
    "train --dry-run": ["recipe"],
    "launch --num_processes 2 -m rwkv_accel.train": ["recipe"],
    "data lint": ["recipe"],
    "doctor": ["recipe"],
    "plan": ["recipe", "--gpus", "2"],
    "report": ["nowhere"],
    "generate": ["nowhere", "a prompt"],
    "evaluate": ["nowhere"],
    "export": ["nowhere", "--to", "pth"],
    "inspect": ["nowhere"],
}
MODULES = {"train", "generate", "launch"}
RUN = """
import sys
from rwkv_accel.{module} import main
code = main(sys.argv[1:])
sys.exit("torch was loaded" if "torch" in sys.modules else code)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_mistake_is_told_without_torch(command, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", {"out_dir": "out", "trainer": {"max_step": 3}})
    name, *options = command.split()
    place = {"recipe": str(recipe), "nowhere": str(tmp_path / "nowhere")}
    arguments = [*options, *(place.get(argument, argument) for argument in COMMANDS[command])]
    code = RUN.format(module=name if name in MODULES else f"{name}.__main__")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    wanted = "did you mean trainer.max_steps?" if "recipe" in COMMANDS[command] else "nowhere"
    assert wanted in done.stderr
    assert "error: " in done.stderr.splitlines()[0]
