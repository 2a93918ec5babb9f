"""What must be equal on every node of a run: code, versions, recipe, GPUs, and the files that the recipe names."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rwkv_accel.config.load import dump_config, load_config
from rwkv_accel.config.schema import RunConfig

# Other versions of these change numbers, file formats or the wire; the rest may differ.
PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "datasets", "triton", "safetensors")
PACKAGE_ROOT = Path(__file__).parents[1]
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class NodeFacts:
    """One node as the others see it."""

    node: int
    hostname: str
    versions: dict[str, str]
    code: str
    recipe: str | None
    num_gpus: int
    missing: tuple[str, ...]
    """Paths of the recipe that this node cannot see."""

    @property
    def name(self) -> str:
        return f"node {self.node} ({self.hostname})"

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str | bytes) -> NodeFacts:
        tree = json.loads(text)
        return cls(**{**tree, "missing": tuple(tree["missing"])})


def gather_facts(node: int, config: RunConfig | None) -> NodeFacts:
    """The facts of this machine; a second or less."""
    import torch

    return NodeFacts(
        node=node,
        hostname=socket.gethostname(),
        versions=versions(),
        code=code_digest(),
        recipe=hashlib.sha256(dump_config(config).encode()).hexdigest() if config else None,
        num_gpus=torch.cuda.device_count(),
        missing=tuple(missing_paths(config)) if config else (),
    )


def versions() -> dict[str, str]:
    """Versions of python and of the packages that must agree."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def code_digest(root: Path = PACKAGE_ROOT) -> str:
    """sha256 over the names and bytes of every python file of the package."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def read_recipe(arguments: Sequence[str]) -> RunConfig | None:
    """The recipe in the arguments of an entry point (`recipe.yaml key.sub=value ...`), or None without one.

    Raises:
        UserError: the recipe is wrong.
    """
    positional = [a for a in arguments if not a.startswith("-")]
    if not positional or "=" in positional[0]:
        return None
    return load_config(positional[0], positional[1:])


def missing_paths(config: RunConfig) -> list[str]:
    """Local files that the recipe reads and this machine does not have."""
    from rwkv_accel.data.sources import missing_files

    data, evaluation = config.data, config.eval
    sets = (data.path, evaluation.path, evaluation.choices_path, evaluation.answers_path)
    missing = [file for paths in sets if paths for path in _listed(paths) for file in missing_files(path)]
    single = [config.model.path, config.peft.load_path]
    single += [data.tokenizer] if data.tokenizer not in ("world", "byte") else []
    single += [data.template] if data.template not in ("rwkv", "raw") else []
    return missing + [path for path in single if path and "://" not in path and not Path(path).exists()]


def _listed(paths: str | tuple[str, ...]) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else paths


def compare(nodes: Sequence[NodeFacts]) -> list[str]:
    """One line per missing file and per difference to what most nodes have, each naming the node."""
    problems = [
        f"{facts.name} does not have {path}, which the recipe names; mount or copy it there"
        for facts in nodes
        for path in facts.missing
    ]
    for name in nodes[0].versions:
        found = [facts.versions.get(name, NOT_INSTALLED) for facts in nodes]
        problems += [
            f"{nodes[odd].name} has {name} {found[odd]}, {nodes[usual].name} has {found[usual]}; use one environment"
            for odd, usual in _odd_ones(found)
        ]
    problems += [
        f"{nodes[odd].name} runs other rwkv_accel code than {nodes[usual].name}; update it there"
        for odd, usual in _odd_ones([facts.code for facts in nodes])
    ]
    problems += [
        f"{nodes[odd].name} runs another recipe than {nodes[usual].name}; give all nodes the same command"
        for odd, usual in _odd_ones([facts.recipe for facts in nodes])
    ]
    problems += [
        f"{nodes[odd].name} has {nodes[odd].num_gpus} GPUs, {nodes[usual].name} has {nodes[usual].num_gpus}; "
        "check the driver there, or leave the node out"
        for odd, usual in _odd_ones([facts.num_gpus for facts in nodes])
    ]
    return problems


def _odd_ones(values: Sequence[object]) -> list[tuple[int, int]]:
    """(index, index of one of the majority) for each value outside it. Of equally many, the first one's are right."""
    ((most, _),) = Counter(values).most_common(1)
    return [(index, values.index(most)) for index, value in enumerate(values) if value != most]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED
