"""What a run writes for people: trained weights, the report, and their way to remote storage."""

from __future__ import annotations

from pathlib import Path

from rwkv_accel.checkpoint import CheckpointWriteError
from rwkv_accel.checkpoint.format import list_complete
from rwkv_accel.checkpoint.weights import WEIGHTS_DIR, save_weights
from rwkv_accel.errors import UserError, WriteError
from rwkv_accel.heartbeat import beat
from rwkv_accel.records import read_pending
from rwkv_accel.report import write_report
from rwkv_accel.run import Run
from rwkv_accel.state import TrainState
from rwkv_accel.tracking import REPORT_FILE


def report(run: Run) -> None:
    """Write report.html. A run that has ended well does not fail for want of it."""
    out_dir = Path(run.config.out_dir)
    try:
        run.log.message(f"report: {write_report([out_dir], out_dir / REPORT_FILE)}")
    except UserError as error:
        run.log.message(f"report: {error}")


def tell_failures(run: Run) -> None:
    """Say which checkpoints are not on disk, and why."""
    for failure in run.writer.take_failures():
        run.log.message(f"{failure}; the training goes on")


def last_failure(run: Run) -> CheckpointWriteError | None:
    """Collective. Wait for the checkpoint in flight; why it is not on disk, on every rank. Earlier ones are told."""
    try:
        run.writer.finish(run.accelerator)
        failure = None
    except CheckpointWriteError as error:
        failure = error
    for earlier in run.writer.take_failures():
        if str(earlier) != str(failure):
            run.log.message(str(earlier))
    return failure


def where_a_start_continues(run: Run) -> str:
    """What the same command, started again, does with what is on disk."""
    complete = list_complete(run.writer.checkpoints)
    if not complete:
        return "no checkpoint is there yet, and the same command starts from the beginning"
    folder, manifest = complete[-1]
    return f"the same command continues from {folder.name}, after step {manifest.step}"


def finish_uploads(run: Run) -> None:
    """Collective. Wait for what is on its way to remote storage, within bounds; say what has not arrived."""
    left = run.writer.finish_uploads(run.accelerator)
    if left:
        run.log.message(
            f"not uploaded to {run.config.checkpoint.remote_url}: {', '.join(left)}; all of it is in "
            f"{run.config.out_dir}, and the same command started again tries once more"
        )


def save_latest(state: TrainState, run: Run, name: str) -> WriteError | None:
    """Collective. Write adapter/<name> and remember that this step is saved; a refusal as in `save`."""
    failure = save(state, run, Path(run.config.out_dir) / WEIGHTS_DIR / name)
    if failure is None:
        run.saved_step = state.step
    return failure


def save(state: TrainState, run: Run, folder: Path) -> WriteError | None:
    """Collective. Write the trained weights into a folder. A disk that refuses does not end the run: it is told, and
    returned."""
    beat("saving the weights", in_step=True)
    read_pending(state, run)
    try:
        with run.log.pause():
            save_weights(
                run.accelerator,
                run.model,
                run.optimizer,
                config=run.config,
                state=state,
                folder=folder,
                base_path=run.base_path,
                base_digest=run.base_digest,
            )
    except WriteError as failure:
        run.log.message(f"{failure}; the training goes on")
        return failure
    if run.writer.uploads is not None:
        run.writer.uploads.add_weights(folder, state.step)
    run.log.message(f"saved {folder}")
    return None
