"""Save and load of everything that a run needs to go on, independent of strategy and number of processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rwkv_accel.checkpoint.collective import all_ranks
from rwkv_accel.checkpoint.format import (
    EXTRA_FILE,
    OPTIMIZER_FILE,
    RNG_FILE,
    STATE_FILE,
    TRAINABLE_FILE,
    DamagedCheckpoint,
    Manifest,
    TensorFile,
    read_document,
    validate,
)
from rwkv_accel.checkpoint.resume import read_state
from rwkv_accel.checkpoint.rng import rng_state, set_rng_state
from rwkv_accel.checkpoint.strategy import gather_trained, scatter_trained
from rwkv_accel.checkpoint.writer import CheckpointWriter, Snapshot
from rwkv_accel.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


def save_checkpoint(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    state: dict[str, Any],
    *,
    writer: CheckpointWriter,
    name: str,
    config: dict[str, Any],
    base_digest: str | None,
    extra: dict[str, Any] | None = None,
    extra_tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Have checkpoints/<name> written, and what retention does not keep removed. Collective.

    Returns once later steps cannot change what is written; `writer` says whether it is on disk by then, and why not.
    Call at a border of optimizer updates: gradients of a half-done window are not saved.

    Args:
        model, optimizer: as accelerator.prepare returned them.
        state: TrainState.state_dict(); JSON-ready, with a `step`.
        config: dump of the run's config; JSON-ready.
        base_digest: of the frozen base, which is not saved.
        extra: anything JSON-ready, such as log offsets.
        extra_tensors: tensors that are not trained but must travel; those of the main process count.

    Returns:
        The folder, on every rank.
    """
    writer.wait()
    trained = gather_trained(accelerator, model, optimizer)
    rng = all_ranks(accelerator, rng_state(accelerator.device))
    if accelerator.is_main_process:
        tensors = {TRAINABLE_FILE: trained.params, OPTIMIZER_FILE: trained.moments}
        if extra_tensors:
            tensors[EXTRA_FILE] = {key: value.detach().to("cpu", copy=True) for key, value in extra_tensors.items()}
        document = {
            "state": state,
            "extra": extra or {},
            "config": config,
            "base_digest": base_digest,
            "world_size": accelerator.num_processes,
            "optimizer": {"kind": trained.optimizer, "steps": _names_by_step(trained.steps)},
        }
        # As text: the run goes on changing the lists in it.
        documents = {STATE_FILE: json.dumps(document), RNG_FILE: json.dumps(rng)}
        writer.write(Snapshot(state["step"], tensors, documents), name)
    return writer.checkpoints / name


def load_checkpoint(accelerator: Accelerator, model: Any, optimizer: Any, path: str | Path) -> dict[str, Any]:
    """Put a checkpoint into a prepared model and optimizer; return everything else in it. Collective.

    The number of processes and the strategy may be others than those that saved. Random number generators
    continue only on the same number of processes; on another number they are left as they are.

    Returns:
        state, extra, config, base_digest, world_size, optimizer, extra_tensors.

    Raises:
        UserError: on every rank: the folder is damaged, or does not fit the model or the optimizer.
    """
    path = Path(path)
    _check_on_all(accelerator, path)
    saved = read_state(path)
    scatter_trained(
        accelerator,
        model,
        optimizer,
        kind=saved["optimizer"]["kind"],
        params=TensorFile(path, TRAINABLE_FILE),
        moments=TensorFile(path, OPTIMIZER_FILE),
        steps=_step_by_name(saved["optimizer"]["steps"]),
    )
    saved["extra_tensors"] = read_extra_tensors(path)
    if saved["world_size"] == accelerator.num_processes:
        set_rng_state(read_document(path, RNG_FILE)[accelerator.process_index], accelerator.device)
    return saved


def _check_on_all(accelerator: Accelerator, path: Path) -> None:
    """Every rank must see the same, intact folder; one rank reads all bytes, the others look at the sizes."""
    manifest: Manifest | None = None
    problem: UserError | None = None
    try:
        manifest = validate(path, deep=accelerator.is_main_process)
    except UserError as error:
        problem = error
    seen = all_ranks(accelerator, (manifest, problem))
    for rank, (_, reported) in enumerate(seen):
        if reported is not None:
            remedy = "; take another one with checkpoint.resume=<path>"
            raise UserError(
                f"{reported}{remedy if isinstance(reported, DamagedCheckpoint) else ''} "
                f"(seen by process {rank} of {len(seen)})"
            )
    if any(manifest != seen[0][0] for manifest, _ in seen):
        raise UserError(f"processes see different files under {path}; out_dir must be on a disk that all nodes share")


def read_extra_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors that are not trained but travel with a checkpoint (PiSSA's A0, B0); empty if there are none."""
    return dict(TensorFile(path, EXTRA_FILE)) if (path / EXTRA_FILE).is_file() else {}


def _names_by_step(steps: dict[str, int]) -> dict[str, list[str]]:
    by_step: dict[str, list[str]] = {}
    for name, step in steps.items():
        by_step.setdefault(str(step), []).append(name)
    return by_step


def _step_by_name(by_step: dict[str, list[str]]) -> dict[str, int]:
    return {name: int(step) for step, names in by_step.items() for name in names}
