"""What one machine can do: versions, devices, dtypes, kernels, memory, disk, trackers, stale build locks."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from rwkv_accel.cluster.facts import NOT_INSTALLED, missing_paths, versions
from rwkv_accel.config.schema import RunConfig
from rwkv_accel.doctor.report import Check
from rwkv_accel.errors import UserError
from rwkv_accel.ops.wkv7 import BACKENDS, select_backend, wkv7
from rwkv_accel.runtime import STALE_LOCK_SECONDS, extensions_folder
from rwkv_accel.tracking.trackers import check_trackers

GIB = 2**30
NEEDED_PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "datasets", "safetensors")
LOW_DISK_GIB = 10
LOW_SHM_GIB = 1
MACHINE_SECONDS = 45.0
# What to look at when a check hangs.
HANGS = {
    "devices": "the GPU driver hangs: try nvidia-smi, and restart the machine",
    "kernels": "a kernel compiles or hangs: run the doctor again (what is compiled is kept), and look at `builds`",
    "disk": "the file system of out_dir hangs: try `ls` there",
    "recipe": "a file system of the recipe's files hangs: try `ls` there",
    "builds": "the file system of the home folder hangs: set TORCH_EXTENSIONS_DIR to a local one",
    "trackers": "the tracker's server hangs: set tracking.wandb_mode=offline",
}
# Largest relative difference between two fp32 implementations of the recurrence.
KERNEL_TOLERANCE = 1e-3


def examine_machine(config: RunConfig | None, seconds: float = MACHINE_SECONDS) -> list[Check]:
    """All checks of this machine; a few seconds, and `seconds` where something hangs (a dead file system, a driver)."""
    steps: dict[str, Callable[[], list[Check]]] = {
        "packages": check_packages,
        "devices": check_devices,
        "dtypes": lambda: check_dtypes(main_device()),
        "memory": check_memory,
        "disk": lambda: check_disk(Path(config.out_dir) if config else Path(".")),
        "builds": lambda: check_build_locks(build_folders()),
        "trackers": lambda: check_tracking(config),
        "recipe": lambda: check_recipe_files(config),
        "kernels": lambda: check_kernels(main_device()),
    }
    deadline = time.monotonic() + seconds
    checks = []
    for position, (name, step) in enumerate(steps.items()):
        # What hangs early leaves the others their share.
        checks += _within((deadline - time.monotonic()) / min(2, len(steps) - position), name, step)
    return checks


def _within(seconds: float, name: str, step: Callable[[], list[Check]]) -> list[Check]:
    """What the step finds, or that it did not end in time: its thread is left behind."""
    found: list[Check] = []

    def run() -> None:
        try:
            found.extend(step())
        except Exception as error:  # noqa: BLE001 - one broken check must not hide the others
            found.append(
                Check(
                    name, "FAIL", f"cannot be checked: {' '.join([type(error).__name__, *str(error).splitlines()[:1]])}"
                )
            )

    thread = threading.Thread(target=run, name=f"doctor-{name}", daemon=True)
    started = time.monotonic()
    thread.start()
    thread.join(max(1.0, seconds))
    if thread.is_alive():
        waited = f"no answer within {time.monotonic() - started:.0f} s"
        return [Check(name, "FAIL", f"{waited}; {HANGS.get(name, 'look at this machine')}")]
    return found


def main_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(index: int) -> str:
    """The device that the process with this local rank uses."""
    if index < torch.cuda.device_count():
        return f"cuda:{index} {torch.cuda.get_device_name(index)}"
    if torch.cuda.is_available():
        return "none left"
    return f"cpu ({os.cpu_count()} cores)"


def check_packages() -> list[Check]:
    found = versions()
    absent = [name for name in NEEDED_PACKAGES if found[name] == NOT_INSTALLED]
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if absent:
        return [Check("packages", "FAIL", f"{', '.join(absent)} missing; run `pip install -e .` in the repository")]
    return [Check("packages", "ok", text)]


def check_devices() -> list[Check]:
    if not torch.cuda.is_available():
        return [Check("devices", "note", f"no GPU: runs on {device_name(0)}")]
    checks = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        text = f"{device_name(index)}, sm_{major}{minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        busy = free < total / 2
        remedy = "; another process holds the rest: see nvidia-smi"
        checks.append(Check("devices", "WARN" if busy else "ok", text + remedy * busy))
    return checks


def check_dtypes(device: torch.device) -> list[Check]:
    """Which dtypes multiply on the device, by doing it."""
    works: list[str] = []
    refused: list[str] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        try:
            square = torch.eye(16, dtype=dtype, device=device) * 2
            good = bool(((square @ square).float() == 4 * torch.eye(16, device=device)).all())
        except RuntimeError:
            good = False
        (works if good else refused).append(name)
    if "bfloat16" in refused:
        text = f"no bfloat16 on {device.type}; use trainer.precision=32-true"
        return [Check("dtypes", "WARN", text)]
    return [Check("dtypes", "ok", f"{', '.join(works)} work on {device.type}")]


def check_kernels(device: torch.device) -> list[Check]:
    """Each backend of the recurrence that runs here, compared with the reference."""
    chosen, reason = select_backend("auto", device.type)
    checks = [Check("kernels", "ok", f"wkv7 on {device.type}: {chosen} ({reason})")]
    inputs = _recurrence_inputs(device)
    want = wkv7(*inputs, backend="reference")[0]
    for name in BACKENDS:
        try:
            select_backend(name, device.type)
            got = wkv7(*inputs, backend=name)[0]
        except (ValueError, RuntimeError) as error:
            text = f"{name} does not run here: {str(error).splitlines()[0]}"
            checks.append(Check("kernels", "FAIL" if name == chosen else "note", text))
            continue
        difference = float((got - want).abs().max() / want.abs().max())
        wrong = not difference < KERNEL_TOLERANCE
        text = f"{name}: relative difference to the reference {difference:.1e}"
        remedy = "; take model.wkv_backend=reference and report it"
        checks.append(Check("kernels", "FAIL" if wrong else "ok", text + remedy * wrong))
    return checks


def _recurrence_inputs(device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    r, k, v, removal = (torch.randn(1, 33, 2, 64, generator=generator) for _ in range(4))
    w_low, w0 = torch.randn(1, 33, 2, 64, generator=generator), torch.randn(2, 64, generator=generator)
    removal = torch.nn.functional.normalize(removal, dim=-1)
    return [x.to(device) for x in (r, w_low, k, v, -removal, removal * 0.5, w0)]


def check_memory() -> list[Check]:
    import psutil

    memory = psutil.virtual_memory()
    checks = [Check("memory", "ok", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available")]
    shm = Path("/dev/shm")
    if shm.is_dir():
        free = shutil.disk_usage(shm).free / GIB
        low = free < LOW_SHM_GIB
        remedy = "; NCCL uses it between the GPUs of a node: in a container give --shm-size 8g or --ipc host"
        checks.append(Check("memory", "WARN" if low else "ok", f"/dev/shm has {free:.1f} GiB free" + remedy * low))
    return checks


def check_disk(folder: Path) -> list[Check]:
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not os.access(existing, os.W_OK):
        return [Check("disk", "FAIL", f"{existing} cannot be written; choose another out_dir")]
    free = shutil.disk_usage(existing).free / GIB
    low = free < LOW_DISK_GIB
    remedy = f"; checkpoints may need more: keep {LOW_DISK_GIB} GiB free, or choose another out_dir"
    return [Check("disk", "WARN" if low else "ok", f"{folder} has {free:.1f} GiB free" + remedy * low)]


def build_folders() -> list[Path]:
    """Where compiled extensions of torch and DeepSpeed are cached: the trainer's own folder, and torch's default."""
    from torch.utils.cpp_extension import get_default_build_root

    return [extensions_folder(), Path(get_default_build_root())]


def _locks(folder: Path) -> Iterator[Path]:
    """Files named lock, one level below or two: torch's own folder has one more, by versions of python and CUDA."""
    # Not by glob, which raises where a build of another host comes and goes.
    for here, folders, files in os.walk(folder):
        depth = len(Path(here).relative_to(folder).parts)
        if depth and "lock" in files:
            yield Path(here) / "lock"
        if depth == 2:
            folders.clear()


def check_build_locks(folders: Sequence[Path]) -> list[Check]:
    """Locks that a killed build left behind; whoever builds next waits for them for ever."""
    now = time.time()
    locks = sorted({lock for folder in folders for lock in _locks(folder)})
    checks = []
    for path in locks:
        try:
            age = now - path.stat().st_mtime
        except FileNotFoundError:  # a build that has just ended
            continue
        if age > STALE_LOCK_SECONDS:
            text = f"stale lock {path} ({age / 60:.0f} min old): no build lasts so long; delete it"
            checks.append(Check("builds", "WARN", text))
        else:
            text = f"lock {path} ({age:.0f} s old): something is being built; if nothing is, it was killed: delete it"
            checks.append(Check("builds", "note", text))
    return checks or [Check("builds", "ok", f"no stale build lock in {', '.join(map(str, folders))}")]


def check_tracking(config: RunConfig | None) -> list[Check]:
    if config is None:
        installed = [name for name in ("wandb", "tensorboard") if find_spec(name)]
        return [Check("trackers", "ok", f"installed: {', '.join(installed) or 'none'}")]
    try:
        mode, line = check_trackers(config.tracking)
    except UserError as error:
        return [Check("trackers", "FAIL", str(error))]
    named = ", ".join(config.tracking.trackers) or "none asked for"
    return [
        Check("trackers", "note" if line else "ok", f"{named}{f' (wandb {mode})' if mode else ''}{line and '; '}{line}")
    ]


def check_recipe_files(config: RunConfig | None) -> list[Check]:
    if config is None:
        return [Check("recipe", "note", "none given; name one to check its files, too")]
    missing = missing_paths(config)
    return [Check("recipe", "FAIL", f"{path} does not exist") for path in missing] or [
        Check("recipe", "ok", "the files that it names exist")
    ]
