"""The schema of a recipe: every key of a run, with its unit, its bounds and its meaning.

A recipe is one YAML file with the sections below. Whatever is about topology (processes, nodes, sharding) lives in
`accelerate_configs/`; everything else is here. Cadences are named `*_every_*` or `every_n_*`, counts `num_*` or
`max_*`, and units are suffixes.

Each section is a file of its own in this folder.
"""

from __future__ import annotations

from pydantic import model_validator

from rwkv_accel.config.base import NonNegative, PathText, Positive, Strict
from rwkv_accel.config.checkpoint import CheckpointConfig
from rwkv_accel.config.data import DataConfig
from rwkv_accel.config.evaluation import EvalConfig
from rwkv_accel.config.model import InitConfig, ModelConfig
from rwkv_accel.config.optim import LrScale, OptimConfig
from rwkv_accel.config.peft import ADAPTER_METHODS, LINEAR_TARGETS, Parts, PeftConfig
from rwkv_accel.config.tracking import SamplesConfig, TrackingConfig
from rwkv_accel.config.trainer import TrainerConfig

__all__ = [
    "ADAPTER_METHODS",
    "LINEAR_TARGETS",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "InitConfig",
    "LrScale",
    "ModelConfig",
    "NonNegative",
    "OptimConfig",
    "Parts",
    "PeftConfig",
    "Positive",
    "RunConfig",
    "SamplesConfig",
    "Strict",
    "TrackingConfig",
    "TrainerConfig",
]


class RunConfig(Strict):
    """One complete run."""

    out_dir: PathText
    """Folder of the run: logs, adapters, checkpoints."""
    model: ModelConfig
    peft: PeftConfig = PeftConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    samples: SamplesConfig = SamplesConfig()

    @model_validator(mode="after")
    def _stream_has_no_epochs(self) -> RunConfig:
        if not self.data.is_endless:
            return self
        why = "data.streaming knows no epochs"
        if self.trainer.max_steps is None:
            raise ValueError(f"{why}: set trainer.max_steps, or data.max_documents to train on a part as on a file")
        if self.trainer.max_epochs > 1:
            raise ValueError(f"{why}: leave trainer.max_epochs at 1; trainer.max_steps ends the run")
        if self.eval.split_fraction:
            raise ValueError(f"{why} and no whole to take eval.split_fraction from: give eval.path")
        if self.eval.path is not None and self.eval.every_n_steps is None:
            raise ValueError(f"{why}: set eval.every_n_steps")
        if isinstance(self.eval.every_n_steps, float):
            raise ValueError(f"{why} to take a share of: set eval.every_n_steps to a number of updates")
        for key in ("max_tokens", "limit_train_batches", "overfit_batches"):
            if getattr(self.trainer, key) is not None:
                raise ValueError(f"{why} and no number of rows: set trainer.max_steps in place of trainer.{key}")
        return self
