"""The section `checkpoint`: what is saved, when, and what a new start continues from."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from rwkv_accel.config.base import NonNegative, PathText, Positive, Strict

SECRET_OPTIONS = frozenset(
    "key secret token username password aws_access_key_id aws_secret_access_key aws_session_token".split()
)


class CheckpointConfig(Strict):
    """What is saved, when, and what a new start continues from."""

    epoch_save: NonNegative = 1
    """Save the adapter (or the full model) every this many epochs. 0 saves it only at the end of the run."""
    keep_weights: Positive | None = None
    """Saves of the adapter (or the full model) that are kept, beside best/; older ones are removed. None: all."""
    every_n_steps: Positive | None = None
    """Write a resume checkpoint every this many updates. None: no count of updates asks for one. The end of each
    epoch and a signal always do."""
    every_n_minutes: Annotated[float, Field(gt=0)] | None = None
    """Write a resume checkpoint when the last one is this many minutes old. None: time does not matter."""
    keep_last: Positive = 2
    """Resume checkpoints that are kept; older ones are removed."""
    keep_every_n_steps: Positive | None = None
    """Write a resume checkpoint at each multiple of this many updates, and never remove it. None: all grow old."""
    background: bool = True
    """Write checkpoints while the training goes on: only the copy to the host's memory holds it up. The copy (trained
    parameters and moments) stays in the memory of the main process until it is on disk."""
    remote_url: PathText | None = None
    """URL of storage that gets a copy of every checkpoint, of saved weights and of the logs, such as
    s3://bucket/folder (anything that fsspec opens). Credentials and endpoint come from the environment
    (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL). None: nothing leaves out_dir."""
    remote_options: dict[str, Any] = Field(default_factory=dict)
    """More options of the fsspec filesystem of remote_url, such as {endpoint_url: "http://minio:9000"}. No secrets:
    recipes are copied into out_dir and to trackers."""
    remote_verify: bool = True
    """Read every uploaded file back and compare its checksum. false: compare its size only."""
    remote_wait_seconds: Positive = 600
    """Longest wait for uploads that are not done when the run ends or is stopped."""
    resume: PathText = "auto"
    """auto: continue from the newest complete checkpoint in out_dir or at remote_url, if any. none: refuse an out_dir
    or a remote_url that has one. Or the path or URL of a checkpoint folder, or the URL of a run's storage; once
    out_dir has checkpoints of its own, one that lies elsewhere is not taken again."""

    @model_validator(mode="after")
    def _storage(self) -> CheckpointConfig:
        if self.remote_url is not None and "://" not in self.remote_url:
            raise ValueError(f"checkpoint.remote_url {self.remote_url!r} is no URL; write it like s3://bucket/folder")
        if self.remote_options and self.remote_url is None and "://" not in self.resume:
            raise ValueError("checkpoint.remote_options applies to checkpoint.remote_url; set that too")
        secret = _first_secret(self.remote_options)
        if secret is not None:
            raise ValueError(
                f"checkpoint.remote_options must not hold {secret}: recipes are copied into out_dir and to trackers; "
                "use the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or a credentials file"
            )
        return self


def _first_secret(options: dict[str, Any]) -> str | None:
    for name, value in options.items():
        if name in SECRET_OPTIONS:
            return name
        if isinstance(value, dict) and (found := _first_secret(value)):
            return found
    return None
