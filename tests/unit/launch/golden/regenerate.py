"""Write the golden files anew: python tests/unit/launch/golden/regenerate.py. Read the diff before committing it."""

import importlib.util
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("job_scripts", HERE.parent / "test_job_scripts.py")
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)

for script in tests.SBATCH_ARGUMENTS:
    for nodes in tests.NODES:
        (HERE / f"{script}_{nodes}.txt").write_text(tests.planned(script, nodes))
with tempfile.NamedTemporaryFile("w", suffix="hosts") as hosts:
    hosts.write("node1 slots=8\nnode2 slots=8\n")
    hosts.flush()
    text = tests.plan("launch/multi_node.sh", *tests.RECIPE, HOSTFILE=hosts.name, MIN_NODES="1")
    (HERE / "multi_node_ssh.txt").write_text(text)
