"""Print the commands that a job script would run on each node, without running them.

    python -m rwkv_accel.launch_plan -N 4 --gpus-per-node 8 launch/slurm/multi_node.sbatch recipe.yaml peft.rank=64
    HOSTFILE=hosts python -m rwkv_accel.launch_plan launch/multi_node.sh recipe.yaml

The script itself runs, with stand-ins for srun, scontrol, ssh, ip, getent and python in front of the PATH: what is
printed cannot differ from what the script does.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rwkv_accel.errors import UserError
from rwkv_accel.runtime import fail

JOB_ID = 12345
SHOWN_VARIABLES = "GLOO_|NCCL_|TORCH_|OMP_|RWKV_ACCEL_|PYTHONUNBUFFERED"

# Each runs in place of the program of that name.
STAND_INS = {
    "srun": """
options=()
while [[ $1 == -* ]]; do options+=("$1"); shift; done
echo "srun ${options[*]} $*"
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node SLURM_PROCID=$node SLURM_NNODES=$SLURM_JOB_NUM_NODES PLANNED_HOST=node$node "$@" || exit
done
""",
    "scontrol": """
[ "$1 $2" = "show hostnames" ] || { echo "scontrol $*"; exit; }
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do echo "node$node"; done
""",
    "ssh": """
while [[ $1 == -* ]]; do if [ "$1" = -o ]; then shift; fi; shift; done
host=$1
shift
echo "ssh $host"
settings=${*#*&& }
PLANNED_HOST=$host PLANNED_PATH=$PATH bash -c "${settings/ PATH=/ IGNORED_PATH=}"
""",
    "ip": 'case "$*" in *" addr "*) ;; *) echo "route dev eth0 src" ;; esac',
    "getent": 'echo "10.0.0.1 STREAM"',
    "nproc": "echo 8",
    "date": "echo 00:00:00",
    "python": f"""
echo "on ${{PLANNED_HOST:-this machine}}:"
env | grep -E '^({SHOWN_VARIABLES})' | LC_ALL=C sort | sed "s|$PWD/||; s/^/  /"
printf '  python'
printf ' %q' "$@"
echo
""",
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_accel.launch_plan",
        description="Print the commands that a job script would run on each node. Nothing is started.",
        epilog="Example: python -m rwkv_accel.launch_plan -N 4 --gpus-per-node 8 launch/slurm/multi_node.sbatch "
        "launch/recipes/lora_7b.yaml",
        allow_abbrev=False,
    )
    parser.add_argument("-N", "--nodes", type=int, help="number of nodes (default: the script's)")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="granted GPUs (default: none)")
    parser.add_argument("-c", "--cpus-per-task", type=int, help="granted CPUs (default: the script's)")
    parser.add_argument("--array-task", type=int, default=0, help="index of an array task (default: 0)")
    parser.add_argument("script", type=Path, help="a job script of launch/slurm, or launch/multi_node.sh")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")
    return parser.parse_args(argv)


def plan(
    script: Path,
    arguments: Sequence[str],
    *,
    nodes: int | None = None,
    gpus_per_node: int = 0,
    cpus_per_task: int | None = None,
    array_task: int = 0,
) -> str:
    """What the script would run, as text: sbatch's options, then environment and command of each node.

    Raises:
        UserError: the script does not exist, or it refuses its arguments.
    """
    if not script.is_file():
        raise UserError(f"script {script} does not exist; the job scripts are in launch/slurm")
    directives = re.findall(r"^#SBATCH (\S+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    asked = dict(d.lstrip("-").split("=", 1) for d in directives if "=" in d)
    settings = {}
    if directives:
        nodes = nodes or int(asked.get("nodes", 1))
        settings = {
            "SLURM_JOB_ID": JOB_ID,
            "SLURM_JOB_NUM_NODES": nodes,
            "SLURM_JOB_NODELIST": f"node[0-{nodes - 1}]" if nodes > 1 else "node0",
            "SLURM_CPUS_PER_TASK": cpus_per_task or int(asked.get("cpus-per-task", 1)),
            "SLURM_ARRAY_TASK_ID": array_task,
            **({"SLURM_GPUS_ON_NODE": gpus_per_node} if gpus_per_node else {}),
        }
        asked |= {"nodes": str(nodes), "cpus-per-task": str(settings["SLURM_CPUS_PER_TASK"])}
        asked |= {"gpus-per-node": str(gpus_per_node)} if gpus_per_node else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, body in STAND_INS.items():
            stand_in = Path(folder) / name
            stand_in.write_text(f"#!/bin/bash\n{body.strip()}\n", encoding="utf-8")
            stand_in.chmod(0o755)
        assignments = [f"{name}={value}" for name, value in settings.items()]
        assignments.append(f"JOB_FILES={folder}/files" if directives else "PLANNED=1")
        # The PATH is put together by a shell: this process does not read its environment.
        command = ["env", *assignments, "bash", "-c", 'PATH=$0:$PATH exec bash "$@"', folder, str(script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        output = done.stdout.replace(f"{folder}/files", f"slurm-files/{JOB_ID}").replace(f"{folder}:", "")
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).replace("error: ", "")
        raise UserError(f"{script} ends with code {done.returncode}: {reason}")
    lines = output.splitlines()
    if any(re.match(r"\S+: ssh ", line) for line in lines):
        # The stand-ins for ssh run at the same time: put each host's lines together.
        hosts = list(dict.fromkeys(line.split(": ")[0] for line in sorted(lines)))
        lines = sorted(lines, key=lambda line: hosts.index(line.split(": ")[0]))
    flags = [d for d in directives if "=" not in d]
    options = [*(f"--{name}={value}" for name, value in asked.items()), *flags] if directives else []
    return "\n".join([*(f"sbatch {option}" for option in options), *lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        text = plan(
            args.script,
            args.arguments,
            nodes=args.nodes,
            gpus_per_node=args.gpus_per_node,
            cpus_per_task=args.cpus_per_task,
            array_task=args.array_task,
        )
    except UserError as error:
        return fail(error)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
