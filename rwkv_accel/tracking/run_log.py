"""RunLog: everything that a run writes about itself, behind one object that every rank may call."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rwkv_accel.errors import UserError
from rwkv_accel.tracking.loss_json import LossJson, read_records
from rwkv_accel.tracking.meter import Meter, Rates, peak_memory_bytes, smooth
from rwkv_accel.tracking.progress import Progress, duration
from rwkv_accel.tracking.record import EvalRecord, StepRecord
from rwkv_accel.tracking.trackers import Trackers, check_trackers, open_trackers
from rwkv_accel.tracking.train_log import TrainLog

if TYPE_CHECKING:
    from rwkv_accel.config.schema import RunConfig
    from rwkv_accel.tracking.flops import Compute

Item = TypeVar("Item")

RUN_FILE = "run.yaml"
LOCK_FILE = ".lock"
ENVIRONMENT_FILE = "environment.json"
LOSS_FILE = "loss_data.json"
EVAL_FILE = "eval_data.json"
SAMPLES_FILE = "samples.json"
TRAIN_LOG_FILE = "train_log.txt"
REPORT_FILE = "report.html"
LOG_FILES = (LOSS_FILE, EVAL_FILE, SAMPLES_FILE, TRAIN_LOG_FILE)


class RunLog:
    """The log of a rank that does not speak: takes every call and does nothing. `open` gives the main one its own."""

    @staticmethod
    def open(
        config: RunConfig,
        *,
        is_main: bool,
        total_steps: int,
        resume_step: int | None,
        device: Any,
        facts: dict[str, Any] | None = None,
        compute: Compute | None = None,
    ) -> RunLog:
        """Start logging into config.out_dir. Not collective.

        Args:
            resume_step: records after it are dropped, and `restore` is called next. None: a fresh start, which drops
                the records of an attempt that died before its first checkpoint.
            facts: model size, versions, code and hardware, for the trackers.
            compute: what the utilisation of the devices is computed from; None leaves it out.

        Raises:
            UserError: a tracker's package or key is missing, or the folder cannot be written.
        """
        if not is_main:
            return RunLog()
        return MainRunLog(config, total_steps, resume_step, device, facts=facts, compute=compute)

    def watch(self, windows: Iterable[Item]) -> Iterator[Item]:
        """Pass the loader's windows on and measure the time spent waiting for them."""
        return iter(windows)

    def log_step(self, record: StepRecord) -> None:
        """One record into loss_data.json, the trackers and the progress display."""

    def log_eval(self, step: int, epoch: int, result: EvalRecord) -> None:
        """One validation result into eval_data.json, the trackers and the progress display."""

    def log_samples(self, step: int, epoch: int, samples: list[dict[str, Any]]) -> None:
        """Generated answers ({prompt, text, stopped}) into samples.json, the trackers and the progress display."""

    def epoch_line(self, epochs_done: int) -> None:
        """The epoch that has just ended goes into train_log.txt; epochs_done counts it."""

    def message(self, text: str) -> None:
        """Text for people: above the bar, and into train_log.txt."""

    def pause(self) -> AbstractContextManager[None]:
        """Time inside (saves, evaluation) does not count as training time."""
        return nullcontext()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep so that the records of a resumed run go on as if it had never stopped."""
        return {}

    def restore(self, saved: dict[str, Any]) -> None:
        """Bring `state` back; before the first step."""

    def close(self) -> None:
        """Finish the trackers and files. The last call."""


class MainRunLog(RunLog):
    """The log of the main process."""

    def __init__(
        self,
        config: RunConfig,
        total_steps: int,
        resume_step: int | None,
        device: Any,
        *,
        facts: dict[str, Any] | None = None,
        compute: Compute | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ):
        wandb_mode, why_offline = check_trackers(config.tracking)
        self._wandb_mode = wandb_mode
        self._config, self._device, self._clock = config, device, clock
        self._facts, self._compute = facts or {}, compute
        keep_until = -1 if resume_step is None else resume_step
        resume_step = resume_step or 0
        self._total_steps, self._resume_step = total_steps, resume_step
        self._out_dir = Path(config.out_dir)
        self._trackers: Trackers | None = None
        self._is_disk_well = True
        self._state: dict[str, Any] = {
            "smoothed_loss": None,
            "epoch_loss_sum": 0.0,
            "epoch_targets": 0,
            "last_lr": 0.0,
            "wall_seconds": 0.0,
            "wandb_run_id": None,
            "num_records": [0, 0, 0],
        }
        with self._writing():
            dump = config.model_dump(mode="json")
            self._train_log = TrainLog(self._out_dir / TRAIN_LOG_FILE, dump, resume_step, now)
            self._loss_json = LossJson(self._out_dir / LOSS_FILE, keep_until)
            self._eval_json = LossJson(self._out_dir / EVAL_FILE, keep_until)
            self._samples_json = LossJson(self._out_dir / SAMPLES_FILE, keep_until)
        self._progress = Progress(config.tracking.progress, total_steps, resume_step, clock=clock)
        self._meter = Meter(clock)
        if why_offline:
            self.message(why_offline)
        if not self._loss_json.has_two_copies:
            self.message(f"{LOSS_FILE}: no hard links in {self._out_dir}, a reader may meet a write in progress")
        if self._loss_json.num_damaged:
            self.message(f"{LOSS_FILE}: dropped {self._loss_json.num_damaged} damaged records")

    def watch(self, windows: Iterable[Item]) -> Iterator[Item]:
        return self._meter.watch(windows)

    def log_step(self, record: StepRecord) -> None:
        saved = self._state
        saved["smoothed_loss"] = smooth(saved["smoothed_loss"], record.loss, record.num_steps)
        if math.isfinite(record.loss):
            saved["epoch_loss_sum"] += record.loss * record.target_tokens
            saved["epoch_targets"] += record.target_tokens
        saved["last_lr"] = record.lr
        rates = self._meter.update(
            num_steps=record.num_steps,
            tokens=record.tokens,
            target_tokens=record.target_tokens,
            steps_left=self._total_steps - record.step,
        )
        values = self._values(record, rates)
        with self._surviving():
            self._loss_json.append(values)
        self._open_trackers().log({k: v for k, v in values.items() if k != "step"}, record.step)
        self._progress.show(record.step, _line(values, rates))

    def log_eval(self, step: int, epoch: int, result: EvalRecord) -> None:
        values = result.values()
        with self._surviving():
            self._eval_json.append({"step": step, "epoch": epoch, "set": result.name, **values})
        self._open_trackers().log(values, step, section=f"eval/{result.name}")
        self.message(f"step {step}: {result.describe()}")

    def log_samples(self, step: int, epoch: int, samples: list[dict[str, Any]]) -> None:
        stopped = sum(sample["stopped"] for sample in samples) / len(samples)
        with self._surviving():
            self._samples_json.append({"step": step, "epoch": epoch, "stopped_share": stopped, "samples": samples})
        self._open_trackers().log({"stopped_share": stopped}, step, section="samples")
        self._open_trackers().log_texts(samples, step)
        for sample in samples:
            self.message(
                f"step {step}, Q: {sample['prompt']}\n  A:{sample['text'] if sample['text'] else ' (nothing)'}"
            )
        self.message(f"step {step}: {stopped:.0%} of the answers ended by themselves")

    def epoch_line(self, epochs_done: int) -> None:
        saved = self._state
        loss = saved["epoch_loss_sum"] / saved["epoch_targets"] if saved["epoch_targets"] else float("nan")
        with self._surviving():
            self._train_log.epoch(epochs_done - 1, loss, saved["last_lr"])
        saved["epoch_loss_sum"], saved["epoch_targets"] = 0.0, 0

    def message(self, text: str) -> None:
        with self._surviving():
            self._train_log.message(text)
        self._progress.message(text)

    def pause(self) -> AbstractContextManager[None]:
        return self._meter.pause()

    def state(self) -> dict[str, Any]:
        num_records = [file.num_records for file in self._files()]
        return {**self._state, "num_records": num_records, "wall_seconds": self._meter.wall_seconds()}

    def restore(self, saved: dict[str, Any]) -> None:
        assert self._trackers is None, "restore comes before the first step"
        assert set(saved) == set(self._state), f"log state holds {sorted(saved)}, expected {sorted(self._state)}"
        self._state = dict(saved)
        with self._writing():
            # Records of the checkpoint's own step, too, when they came after it: they will come again.
            for file, count in zip(self._files(), saved["num_records"]):
                file.keep_first(count)
        self._meter = Meter(self._clock, saved["wall_seconds"])

    def close(self) -> None:
        self._progress.close()
        if self._trackers is not None:
            self._trackers.log_table("eval/table", read_records(self._out_dir / EVAL_FILE)[0])
            self._trackers.close()
        for file in self._files():
            file.close()
        self._train_log.close()

    def _files(self) -> list[LossJson]:
        return [self._loss_json, self._eval_json, self._samples_json]

    def _open_trackers(self) -> Trackers:
        # At the first record, not at the start: by then a resumed run has its wandb id back.
        if self._trackers is None:
            with self._meter.pause():
                self._trackers = open_trackers(
                    self._config.tracking,
                    wandb_mode=self._wandb_mode,
                    out_dir=self._out_dir,
                    config={**self._config.model_dump(mode="json"), "environment": self._facts},
                    resume_run_id=self._state["wandb_run_id"],
                    resume_step=self._resume_step,
                )
            self._state["wandb_run_id"] = self._trackers.wandb_run_id
        return self._trackers

    def _values(self, record: StepRecord, rates: Rates) -> dict[str, Any]:
        timed = asdict(rates)
        del timed["eta_seconds"]
        if self._compute is not None:
            timed["mfu"] = self._compute.utilisation(rates.kt_s, rates.target_kt_s)
        return {
            "step": record.step,
            "epoch": record.epoch,
            "loss": record.loss,
            "smoothed_loss": self._state["smoothed_loss"],
            "lr": record.lr,
            "weight_decay": record.weight_decay,
            "grad_norm": record.grad_norm,
            "target_tokens": record.target_tokens,
            "tokens": record.tokens,
            "skipped_steps": record.skipped_steps,
            "nonfinite_steps": record.nonfinite_steps,
            **({} if record.loss_scale is None else {"loss_scale": record.loss_scale}),
            **timed,
            "memory_bytes": peak_memory_bytes(self._device),
        }

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """A full disk does not end a run: what could not be written waits in memory for the next write."""
        try:
            yield
            self._is_disk_well = True
        except OSError as error:
            if self._is_disk_well:
                self._progress.message(
                    f"cannot write the logs in {self._out_dir}: {error.strerror or error}; records are kept in memory, "
                    "and written when there is room"
                )
            self._is_disk_well = False

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"cannot write the logs in {self._out_dir}: {reason}; mend it and start the same command again"
            ) from None


def _line(values: dict[str, Any], rates: Rates) -> str:
    mfu = f" mfu {values['mfu']:.1%}" if "mfu" in values else ""
    return (
        f"epoch {values['epoch']} loss {values['loss']:.4f} (mean {values['smoothed_loss']:.4f}) "
        f"{rates.kt_s:.2f} Kt/s{mfu} eta {duration(rates.eta_seconds)} lr {values['lr']:.2e} "
        f"wait {rates.wait_share:.0%} mem {values['memory_bytes'] / 2**30:.1f} GiB"
    )
