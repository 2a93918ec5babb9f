"""Layouts of DeepSpeed's ZeRO stages: each rank holds a piece of one flat master copy per group.

DeepSpeed's own accessors (`safe_get_full_optimizer_state` and friends) are avoided. As of 0.19.8 they (1) know
the moments of the first parameter group only, at stages 1 and 2, (2) reach past the end at stage 3 when a
parameter's size is not a multiple of the number of ranks, and (3) run one collective per tensor. Here each rank
says which stretch of a flattened parameter it holds; the pieces are added up, many tensors at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from rwkv_accel.checkpoint.layouts import Entry, Layout
from rwkv_accel.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

BUCKET_BYTES = 64 << 20
ALIGN_BYTES = 16

# What a rank holds of a parameter: (start in the flattened parameter, start in the flat slot, length).
Stretch = tuple[int, int, int]


class _Zero(Layout):
    def __init__(self, accelerator: Accelerator, zero: Any) -> None:
        super().__init__(accelerator, zero.optimizer)
        self.zero = zero
        world = dist.get_world_size(zero.dp_process_group)
        assert world == accelerator.num_processes, f"ZeRO spans {world} of {accelerator.num_processes} processes"

    def stretch(self, param: Tensor) -> Stretch:
        raise NotImplementedError

    def gather(self, entries: list[Entry]) -> Iterator[Tensor | None]:
        for bucket in self._buckets(entries):
            yield from self._sum_to_main(bucket)

    def write(self, param: Tensor, key: str | None, value: Tensor) -> None:
        start, _, length = self.stretch(param)
        self._piece(param, key).copy_(value.flatten()[start : start + length])

    def _flat(self, param: Tensor, key: str | None) -> Tensor:
        slot = self.slot(param)
        return (slot if key is None else self.optimizer.state[slot][key]).detach()

    def _piece(self, param: Tensor, key: str | None) -> Tensor:
        _, start, length = self.stretch(param)
        return self._flat(param, key).narrow(0, start, length)

    def _num_bytes(self, param: Tensor, key: str | None) -> int:
        return self.shape(param).numel() * self._flat(param, key).element_size()

    def _buckets(self, entries: list[Entry]) -> Iterator[list[Entry]]:
        bucket: list[Entry] = []
        size = 0
        for entry in entries:
            num_bytes = self._num_bytes(*entry)
            if bucket and size + num_bytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(entry)
            size += num_bytes
        if bucket:
            yield bucket

    def _sum_to_main(self, bucket: list[Entry]) -> Iterator[Tensor | None]:
        offsets, size = [], 0
        for entry in bucket:
            offsets.append(size)
            size += -(-self._num_bytes(*entry) // ALIGN_BYTES) * ALIGN_BYTES
        # Added up as bytes, each of which at most one rank holds: exact, the sign of -0.0 included.
        buffer = torch.zeros(size, dtype=torch.uint8, device=self.accelerator.device)
        for (param, key), offset in zip(bucket, offsets):
            piece = self._piece(param, key)
            begin = offset + self.stretch(param)[0] * piece.element_size()
            buffer[begin : begin + piece.numel() * piece.element_size()] = piece.view(torch.uint8).to(buffer.device)
        dist.reduce(buffer, dst=0)
        on_cpu = buffer.cpu() if self.accelerator.is_main_process else None
        for (param, key), offset in zip(bucket, offsets):
            if on_cpu is None:
                yield None
                continue
            value = on_cpu[offset : offset + self._num_bytes(param, key)].view(self._flat(param, key).dtype)
            yield value.clone().view(self.shape(param))


class Zero12(_Zero):
    """Stages 1 and 2: every rank has the parameters, and a piece of each group's master copy and moments."""

    def __init__(self, accelerator: Accelerator, zero: Any) -> None:
        super().__init__(accelerator, zero)
        if not hasattr(zero, "single_partition_of_fp32_groups"):
            raise UserError(
                f"DeepSpeed's {type(zero).__name__} cannot be checkpointed; leave bf16 and fp16 out of the "
                "DeepSpeed config and choose trainer.precision"
            )
        self._group = {param: i for i, group in enumerate(zero.bit16_groups) for param in group}

    def slot(self, param: Tensor) -> Tensor:
        return self.zero.single_partition_of_fp32_groups[self._group[param]]

    def stretch(self, param: Tensor) -> Stretch:
        mapping = param._hp_mapping
        if mapping is None:
            return 0, 0, 0
        flat, full = mapping.hp_fragment_address, mapping.lp_fragment_address
        return full.start, flat.start, flat.numel

    def finish(self, params: list[Tensor], value_of: Callable[[Tensor], Tensor]) -> None:
        # The engine copies the master copies over when it steps, which is after the next forward.
        for param in params:
            param.detach().copy_(value_of(param))


class Zero3(_Zero):
    """Stage 3: the parameters are cut up too; the last rank's piece of each is padded."""

    def __init__(self, accelerator: Accelerator, zero: Any) -> None:
        super().__init__(accelerator, zero)
        if zero.swap_optimizer or zero.params_in_nvme_and_cpu:
            raise UserError("checkpoints do not cover offload to NVMe; use offload_*_device: cpu")

    def shape(self, param: Tensor) -> torch.Size:
        return param.ds_shape

    def slot(self, param: Tensor) -> Tensor:
        group, _, _ = self._position(param)
        return self.zero.fp32_partitioned_groups_flat[group]

    def stretch(self, param: Tensor) -> Stretch:
        _, start, padded_length = self._position(param)
        full_start = self.zero._get_param_partition_rank(param) * padded_length
        length = min(padded_length, max(0, self.shape(param).numel() - full_start))
        return full_start, start, length

    def finish(self, params: list[Tensor], value_of: Callable[[Tensor], Tensor]) -> None:
        import deepspeed

        for bucket in self._buckets([(param, None) for param in params]):
            gathered = [param for param, _ in bucket]
            with deepspeed.zero.GatheredParameters(gathered, modifier_rank=0):
                if self.accelerator.is_main_process:
                    for param in gathered:
                        param.detach().copy_(value_of(param))

    def _position(self, param: Tensor) -> tuple[int, int, int]:
        return self.zero.grad_position[self.zero.get_param_id(param)]
