"""What a process of a strategy holds in memory, and what that means for a run.

Weights and activations are read off the model's code (trace.py); what a strategy adds are the formulas below, with
the sizes that its library takes by default. Terms, in bytes of one process:

    ddp     the gradients twice: DistributedDataParallel copies them into its buckets
    zero1   gradients whole, moments and an fp32 master copy of what trains split, one bucket of DeepSpeed
    zero2   the same with split gradients
    zero3   everything split; at most MAX_LIVE_PARAMETERS gathered at a time, and one bucket
    fsdp2   everything split; two blocks and what lies outside the blocks gathered
    offload moments, master copy and gradients lie in the host's memory

With optim.offload moments and master copy lie there too, on one process and under ddp.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from rwkv_accel.host_adamw import device_bytes
from rwkv_accel.plan.communication import Cluster, Strategy, Training, compute_seconds, update_of
from rwkv_accel.plan.trace import Activations, Weights
from rwkv_accel.runtime import DEEPSPEED_BUCKET_VALUES

STRATEGIES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters."""
USABLE = 0.94
"""Share of a GPU's memory that tensors may fill: the rest is the driver's, the communication library's, and holes."""


@dataclass(frozen=True)
class Job:
    """What does not depend on the strategy."""

    gpus: int
    optimizer: str
    accumulation: int
    """Micro-batches per process and update."""
    fused: bool = True
    """The optimizer needs no memory of its own in a step, as on GPUs."""
    host_moments: bool = False
    """optim.offload"""
    cluster: Cluster = field(default_factory=Cluster)


@dataclass(frozen=True)
class Estimate:
    """One strategy with one micro-batch, in bytes of one process."""

    strategy: str
    micro_batch_size: int
    accumulation: int
    """Micro-batches per process and update."""
    checkpointing: str
    weights: int
    quantised: int
    gradients: int
    moments: int
    """With the master copy of the trained weights, where there is one."""
    activations: int
    """Kept between forward and backward."""
    workspace: int
    """Beside them at the worst moment of forward and backward: a recomputed block, the recurrence, logits and loss."""
    buffers: int
    """Buckets and gathered weights of the strategy."""
    peak: int
    """Most at any moment of an update."""
    host: int
    sent: float
    """Bytes that one process sends per update."""
    seconds: float
    """Of one update, computing and communicating, under the assumptions of plan.communication."""

    def parts(self) -> dict[str, int]:
        names = ("weights", "quantised", "gradients", "moments", "activations", "workspace", "buffers")
        return {name: getattr(self, name) for name in names}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    strategy: str,
    weights: Weights,
    activations: Activations,
    job: Job,
    *,
    micro_batch_size: int,
    tokens: int,
    checkpointing: str,
) -> Estimate:
    """Memory, traffic and time of one update of a process. tokens: per row."""
    split = 1 if strategy in ("single", "ddp") else job.gpus
    zero = strategy.removesuffix("_offload")
    offload, deepspeed = strategy.endswith("_offload"), strategy.startswith("zero")
    all_split = zero in ("zero3", "fsdp2")
    plain, quantised = weights.frozen + weights.trained, weights.quantised
    if all_split:
        plain, quantised = math.ceil(plain / split), math.ceil(quantised / split)
    moments = _moments(weights, job.optimizer, master=deepspeed) // split
    gradients = weights.trained if zero in ("single", "ddp", "zero1") else math.ceil(weights.trained / split)
    host, host_moments = 0, _on_host(weights) if job.host_moments else 0
    if offload:
        host, moments = moments + gradients, 0
    elif job.host_moments:
        host, moments = host_moments, 0
    host += activations.on_host
    buffers = _buffers(zero, weights)

    kept, peak_of_pass = activations.kept, max(activations.forward_peak, activations.backward_peak)
    # Gradients stay over the micro-batches of an update; otherwise they grow while the activations shrink.
    if job.accumulation > 1 or strategy != "single":
        in_pass = peak_of_pass + (0 if offload else gradients)
    else:
        growing = activations.backward_peak + weights.head_trained, activations.one_block_peak + gradients
        in_pass = max(activations.forward_peak, *growing)
    # What an optimizer that is not fused makes of one tensor at a time.
    working = 0 if job.fused or offload or job.optimizer != "adamw" else math.ceil(weights.largest_trained / split)
    if job.host_moments:
        working = device_bytes(weights.num_trained)
    at_step = gradients + working
    peak = plain + quantised + moments + buffers + max(in_pass, at_step)
    training = training_of(weights, job.accumulation)
    shared: Strategy = {"single": "ddp", "fsdp2": "zero3"}.get(zero, zero)  # type: ignore[assignment]
    update, tokens_per_update = update_of(shared, training), micro_batch_size * tokens * job.accumulation
    compute = compute_seconds(training, tokens_per_update, job.cluster, recompute=checkpointing in ("block", "offload"))
    moving = 2 * (job.accumulation * activations.on_host + host_moments) / job.cluster.host_link
    return Estimate(
        strategy=strategy,
        micro_batch_size=micro_batch_size,
        accumulation=job.accumulation,
        checkpointing=checkpointing,
        weights=plain,
        quantised=quantised,
        gradients=0 if offload else gradients,
        moments=moments,
        activations=kept,
        workspace=peak_of_pass - kept,
        buffers=buffers,
        peak=peak,
        host=host,
        sent=update.bytes_per_process(job.gpus),
        seconds=compute + moving + update.seconds(job.gpus, job.cluster),
    )


def training_of(weights: Weights, accumulation: int) -> Training:
    """The same numbers for plan.communication."""
    num_frozen = max(weights.num_params - weights.num_trained, 1)
    return Training(
        weights.num_params,
        weights.num_trained,
        frozen_bytes=(weights.frozen + weights.quantised) / num_frozen,
        trained_bytes=weights.trained / weights.num_trained,
        micro_batches=accumulation,
    )


def checkpoint_bytes(weights: Weights, optimizer: str, *, host_moments: bool = False) -> int:
    """A resume checkpoint on disk: what trains and its moments."""
    if host_moments:
        return 3 * 4 * weights.num_trained
    return weights.trained + _moments(weights, optimizer, master=False)


def _moments(weights: Weights, optimizer: str, *, master: bool) -> int:
    # DeepSpeed's partitions, and their moments, are fp32 whatever the weights are.
    per_moment = 4 * weights.num_trained if master else weights.trained
    return (2 * per_moment if optimizer == "adamw" else 0) + (4 * weights.num_trained if master else 0)


def _on_host(weights: Weights) -> int:
    """Both moments in fp32, and a copy of weights that are narrower."""
    is_narrow = weights.trained < 4 * weights.num_trained
    return (3 if is_narrow else 2) * 4 * weights.num_trained


def _buffers(zero: str, weights: Weights) -> int:
    bucket = 4 * min(DEEPSPEED_BUCKET_VALUES, weights.num_trained)
    if zero == "ddp":
        return weights.trained
    if zero in ("zero1", "zero2"):
        return bucket
    if zero == "zero3":
        share = min(1.0, MAX_LIVE_PARAMETERS / weights.num_params)
        return math.ceil(share * weights.all) + bucket
    if zero == "fsdp2":
        return 2 * weights.largest_block + weights.outside_blocks
    return 0
