"""A trace of a few updates by torch's profiler, readable in chrome://tracing and Perfetto."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

PROFILE_DIR = "profile"
WAIT_STEPS = 1
"""Updates that are left out: the first ones allocate and choose kernels."""
WARMUP_STEPS = 1
"""Updates that the profiler needs to come to speed; not recorded."""
TRACED_STEPS = 3


class StepProfiler:
    """The profiler of a process that records nothing. `open` gives the main one its own."""

    @staticmethod
    def open(kind: str | None, out_dir: str, say: Callable[[str], None], *, is_main: bool) -> StepProfiler:
        """A profiler of the kind that trainer.profiler names."""
        return TorchProfiler(Path(out_dir) / PROFILE_DIR, say) if kind == "pytorch" and is_main else StepProfiler()

    def step(self, step: int) -> None:
        """Update number `step` is done."""

    def close(self) -> None:
        """No update will follow."""


class TorchProfiler(StepProfiler):
    """Waits, warms up, records TRACED_STEPS updates into one file, and is gone."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        import torch
        from torch.profiler import ProfilerActivity, profile, schedule

        self._folder, self._say, self._last_step = folder, say, 0
        self._path: Path | None = None
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile: Any = profile(
            activities=activities,
            schedule=schedule(wait=WAIT_STEPS, warmup=WARMUP_STEPS, active=TRACED_STEPS, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )
        self._steps_left = WAIT_STEPS + WARMUP_STEPS + TRACED_STEPS
        self._profile.start()

    def step(self, step: int) -> None:
        if self._profile is None:
            return
        self._last_step, self._steps_left = step, self._steps_left - 1
        self._profile.step()
        if self._steps_left == 0:
            self.close()

    def close(self) -> None:
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        if self._path is None:
            self._say(f"profiler: no trace, it needs more than {WAIT_STEPS + WARMUP_STEPS} updates")

    def _write(self, profile: Any) -> None:
        if self._steps_left >= TRACED_STEPS:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / f"step-{self._last_step:08d}.json"
        profile.export_chrome_trace(str(self._path))
        self._say(f"profiler: trace up to step {self._last_step} in {self._path}")
