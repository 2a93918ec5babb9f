"""Bytes that one optimizer update moves between processes, and the time and efficiency that follow from it.

The single source of the table in launch/README.md: `python -m rwkv_accel.plan.communication` prints it.

Volumes, of data parallelism over n processes (a ring moves (n-1)/n of a tensor through each link per gather or
reduce-scatter, and twice that per all-reduce; arXiv 1910.02054 section 7):

    ddp      all-reduce of the gradient of what is trained, once per update
    zero1    reduce-scatter of that gradient and gather of the updated weights, once per update
    zero2    the same, with the gradient reduced after every micro-batch
    zero3    every weight, frozen or not, gathered for the forward and again for the backward of every micro-batch, and
             the gradient reduce-scattered after every micro-batch (FSDP2 is the same)

Within a node the links of the GPUs carry it; between nodes each tensor crosses a node's network cards once per gather
or reduce-scatter, shared by the GPUs of the node (the hierarchical algorithm, and what rings through all cards reach).
Nothing is taken to be hidden behind computation: the efficiencies are lower bounds under the assumptions.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rwkv_accel.config.schema import PeftConfig
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.peft.plan import linear_shapes, make_plan, trainable_shapes

Strategy = Literal["ddp", "zero1", "zero2", "zero3"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Training:
    """What is trained, in parameters and bytes."""

    all_params: int
    trained_params: int
    frozen_bytes: float = 2
    """Bytes per frozen weight (bf16-mixed keeps them in bf16)."""
    trained_bytes: float = 4
    """Bytes per trained weight and per value of its gradient (bf16-mixed keeps both in fp32)."""
    micro_batches: int = 1
    """Per process and update."""

    @classmethod
    def of(cls, config: RWKV7Config, peft: PeftConfig, micro_batches: int = 1) -> Training:
        """Raises ValueError for methods whose adapters are not two low-rank factors."""
        if peft.method not in ("lora", "pissa", "full"):
            raise ValueError(f"sizes are known for peft.method lora, pissa and full, not {peft.method}")
        shapes = trainable_shapes(config)
        modules = linear_shapes(shapes)
        plan = make_plan(config, peft)
        base = sum(math.prod(shape) for shape in shapes.values())
        adapters = sum(spec.rank * sum(modules[name]) for name, spec in plan.adapters.items())
        trained = adapters + sum(math.prod(shapes[name]) for name in plan.trained)
        return cls(base + adapters, trained, micro_batches=micro_batches)


@dataclass(frozen=True)
class Cluster:
    """Bandwidths in bytes per second and direction, as applications reach them."""

    gpus_per_node: int = 8
    gpu_link: float = 350e9
    """Per GPU, within a node (NVLink 4: 450 GB/s on paper)."""
    node_link: float = 40e9
    """Per node, all its network cards together (one 400 Gb/s card: 50 GB/s on paper)."""
    host_link: float = 25e9
    """Per GPU, to the host's memory and back (16 lanes of PCIe 4: 32 GB/s on paper)."""
    latency_seconds: float = 20e-6
    """Per collective and doubling of the number of processes."""
    gpu_flops: float = 400e12
    """Per GPU, reached in training (40 % of an H100's bf16 peak)."""


@dataclass(frozen=True)
class Update:
    """One optimizer update of every process."""

    gathered_bytes: float
    """Sizes of all tensors that are gathered, each counted as often as it is."""
    reduced_bytes: float
    """The same for reduce-scatters."""
    collectives: int

    def bytes_per_process(self, processes: int) -> float:
        """Bytes that each process sends in a ring over all processes."""
        return (self.gathered_bytes + self.reduced_bytes) * (processes - 1) / processes

    def seconds(self, processes: int, cluster: Cluster) -> float:
        """Time of the communication alone."""
        if processes == 1:
            return 0.0
        inside = min(processes, cluster.gpus_per_node)
        nodes = math.ceil(processes / cluster.gpus_per_node)
        size = self.gathered_bytes + self.reduced_bytes
        within = size * (inside - 1) / inside / cluster.gpu_link
        between = size * (nodes - 1) / nodes / cluster.node_link
        return within + between + self.collectives * math.log2(processes) * cluster.latency_seconds


def update_of(strategy: Strategy, training: Training, bucket_bytes: int = 25 * 2**20) -> Update:
    """What one update communicates; buckets of DDP's default size bound the number of collectives."""
    trained = training.trained_params * training.trained_bytes
    frozen = (training.all_params - training.trained_params) * training.frozen_bytes
    every = training.micro_batches
    gathered, reduced = {
        "ddp": (trained, trained),
        "zero1": (trained, trained),
        "zero2": (trained, trained * every),
        "zero3": (2 * every * (frozen + trained), trained * every),
    }[strategy]
    return Update(gathered, reduced, math.ceil((gathered + reduced) / bucket_bytes))


def compute_seconds(training: Training, tokens_per_process: int, cluster: Cluster, *, recompute: bool = True) -> float:
    """Time of the matrix products of one update: 2 FLOPs per weight and token in the forward pass, 2 for the gradient
    of the activations, 2 for that of the trained weights, and the forward once more where it is recomputed."""
    per_token = (4 + 2 * recompute) * training.all_params + 2 * training.trained_params
    return per_token * tokens_per_process / cluster.gpu_flops


def efficiency(
    strategy: Strategy, training: Training, processes: int, tokens_per_process: int, cluster: Cluster
) -> float:
    """Share of the time in which the GPUs compute, if no communication is hidden."""
    compute = compute_seconds(training, tokens_per_process, cluster)
    return compute / (compute + update_of(strategy, training).seconds(processes, cluster))


RELEASED = {"1.5B": (24, 2048), "7.2B": (32, 4096), "13.3B": (61, 4096)}
METHODS = {"LoRA, rank 64": PeftConfig(rank=64), "full": PeftConfig(method="full")}
TABLE_GPUS = (1, 8, 16, 64, 256, 1024)
TABLE_TOKENS = 16384
TABLE_MICRO_BATCHES = 4
ONE_CARD, EIGHT_CARDS = Cluster(), Cluster(node_link=8 * Cluster.node_link)


def readme_table() -> Iterator[str]:
    """Lines of the table in launch/README.md."""
    heads = [f"{n} GPU{'s' * (n > 1)}" for n in TABLE_GPUS] + [f"{TABLE_GPUS[-1]}, 8 cards"]
    yield "| model | trained | strategy | sent | " + " | ".join(heads) + " |"
    yield "|---|---|---|---|" + "---|" * len(heads)
    for model, (n_layer, n_embd) in RELEASED.items():
        config = RWKV7Config.for_new_model(n_layer, n_embd, 65536)
        for method, peft in METHODS.items():
            training = Training.of(config, peft, TABLE_MICRO_BATCHES)
            for strategy in STRATEGIES:
                sent = update_of(strategy, training).bytes_per_process(TABLE_GPUS[-1])
                places = [(n, ONE_CARD) for n in TABLE_GPUS] + [(TABLE_GPUS[-1], EIGHT_CARDS)]
                shares = [efficiency(strategy, training, n, TABLE_TOKENS, cluster) for n, cluster in places]
                cells = " | ".join(f"{share:.0%}" for share in shares)
                yield f"| {model} | {method} | {strategy} | {sent / 1e9:.1f} GB | {cells} |"


if __name__ == "__main__":
    sys.stdout.write("\n".join(readme_table()) + "\n")
