"""Experiment trackers: wandb and tensorboard, called directly, so that a resume can continue the same run.

wandb keeps its files under out_dir/wandb, tensorboard under out_dir/tensorboard. On a resume wandb goes on with the
same run id (offline that is a second folder of the same id, which `wandb sync` joins), and tensorboard hides the events
after the resumed step.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rwkv_accel.errors import UserError

if TYPE_CHECKING:
    from rwkv_accel.config.schema import TrackingConfig

WandbMode = Literal["online", "offline", "disabled"]
MODULES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}
OFFLINE = "tracking.wandb_mode=offline"


class Trackers:
    """The open trackers of a run; none is fine."""

    def __init__(self, wandb_run: Any = None, writer: Any = None):
        self._wandb_run = wandb_run
        self._writer = writer

    @property
    def wandb_run_id(self) -> str | None:
        return self._wandb_run.id if self._wandb_run is not None else None

    def log(self, values: dict[str, float], step: int, section: str = "train") -> None:
        """Numbers of one step, as <section>/<name>. NaN is passed on: both trackers can show it."""
        named = {f"{section}/{name}": value for name, value in values.items()}
        if self._wandb_run is not None:
            self._wandb_run.log(named, step=step)
        if self._writer is not None:
            for name, value in named.items():
                self._writer.add_scalar(name, value, global_step=step)

    def log_texts(self, samples: list[dict[str, Any]], step: int) -> None:
        """Generated answers ({prompt, text, stopped}), as a table and as text."""
        if self._wandb_run is not None:
            import wandb

            rows = [[sample["prompt"], sample["text"], sample["stopped"]] for sample in samples]
            self._wandb_run.log({"samples/table": wandb.Table(["prompt", "text", "stopped"], rows)}, step=step)
        if self._writer is not None:
            for number, sample in enumerate(samples):
                self._writer.add_text(f"samples/{number}", f"{sample['prompt']}\n\n{sample['text']}", step)

    def log_table(self, name: str, records: list[dict[str, Any]]) -> None:
        """Records with the columns that any of them has, as one table."""
        if not records:
            return
        columns = list(dict.fromkeys(key for record in records for key in record))
        rows = [[record.get(column) for column in columns] for record in records]
        if self._wandb_run is not None:
            import wandb

            self._wandb_run.log({name: wandb.Table(columns, rows)})
        if self._writer is not None:
            lines: list[list[Any]] = [columns, ["---"] * len(columns), *rows]
            text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
            self._writer.add_text(name, text, max(record["step"] for record in records))

    def close(self) -> None:
        if self._wandb_run is not None:
            self._wandb_run.finish()
        if self._writer is not None:
            self._writer.close()


def check_trackers(tracking: TrackingConfig) -> tuple[WandbMode | None, str]:
    """Before anything costs time: are the packages there, and how will wandb run?

    Returns:
        The mode of wandb (None without wandb), and a line that says why it is offline, or "".

    Raises:
        UserError: a package is missing, or tracking.wandb_mode is online and no API key is configured or accepted.
    """
    for name in tracking.trackers:
        try:
            importlib.import_module(MODULES[name])
        except ImportError:
            raise UserError(
                f"tracking.trackers names {name}, which is not installed; run `pip install {name}` or drop it"
            ) from None
    return _wandb_mode(tracking.wandb_mode) if "wandb" in tracking.trackers else (None, "")


def open_trackers(
    tracking: TrackingConfig,
    *,
    wandb_mode: WandbMode | None,
    out_dir: Path,
    config: dict[str, Any],
    resume_run_id: str | None,
    resume_step: int,
) -> Trackers:
    """Start the trackers that the recipe names. wandb_mode comes from check_trackers."""
    wandb_run = writer = None
    if "wandb" in tracking.trackers:
        assert wandb_mode is not None
        wandb_run = _start_wandb(tracking, wandb_mode, out_dir, config, resume_run_id)
    if "tensorboard" in tracking.trackers:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(
            str(out_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None, flush_secs=10
        )
        writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```", global_step=resume_step)
    return Trackers(wandb_run, writer)


def _wandb_mode(wanted: str) -> tuple[WandbMode, str]:
    import wandb

    if wanted == "offline":
        return "offline", ""
    from_environment = wandb.setup().settings.mode
    if wanted == "auto" and from_environment != "online":
        return from_environment, f"wandb: {from_environment}, as WANDB_MODE says"
    try:
        # Asking without a prompt: wandb.init would wait for input on a terminal.
        problem = "" if wandb.login(prompt=False) else "no API key is configured (`wandb login` stores one)"
    except wandb.Error as error:
        problem = _first_line(error)
    if not problem:
        return "online", ""
    if wanted == "online":
        raise UserError(f"tracking.wandb_mode is online, but {problem}; log in, or set {OFFLINE}")
    return "offline", f"wandb: offline, because {problem}; `wandb sync` uploads the run later"


def _start_wandb(
    tracking: TrackingConfig, mode: WandbMode, out_dir: Path, config: dict[str, Any], resume_run_id: str | None
) -> Any:
    import wandb

    try:
        return wandb.init(
            project=tracking.project,
            name=tracking.run_name or out_dir.resolve().name,
            dir=str(out_dir),
            config=config,
            mode=mode,
            id=resume_run_id,
            # allow: the first start was perhaps offline and never uploaded, so the server may not know the id.
            resume="allow" if resume_run_id else None,
        )
    except wandb.Error as error:
        raise UserError(f"wandb did not start: {_first_line(error)}; mend it, or set {OFFLINE}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
