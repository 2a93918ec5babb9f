"""Write the golden files anew: python tests/unit/launch/golden/regenerate.py. Read the diff before committing it."""

import importlib.util
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("job_scripts", HERE.parent / "test_job_scripts.py")
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)

for script in ("multi_node", "multi_node_ft"):
    for nodes in (1, 2, 4):
        text = tests.plan("-N", nodes, "--gpus-per-node", 8, f"launch/slurm/{script}.sbatch", *tests.RECIPE)
        (HERE / f"{script}_{nodes}.txt").write_text(text)
many = tests.plan("-N", 64, "--gpus-per-node", 8, "launch/slurm/multi_node_ft.sbatch", *tests.RECIPE)
(HERE / "multi_node_ft_64_last.txt").write_text(tests.blocks(many)["node63"])
single = tests.plan("--gpus-per-node", 8, "launch/slurm/single_node.sbatch", *tests.RECIPE)
(HERE / "single_node.txt").write_text(single)
sweep = tests.plan("--array-task", 1, "launch/slurm/array_sweep.sbatch", "a.yaml", "b.yaml", "--", *tests.RECIPE[1:])
(HERE / "array_sweep.txt").write_text(sweep)
with tempfile.NamedTemporaryFile("w", suffix="hosts") as hosts:
    hosts.write("node1 slots=8\nnode2 slots=8\n")
    hosts.flush()
    text = tests.plan("launch/multi_node.sh", *tests.RECIPE, HOSTFILE=hosts.name, MIN_NODES="1")
    (HERE / "multi_node_ssh.txt").write_text(text)
