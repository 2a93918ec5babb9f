"""The process and its surroundings: Accelerator, seeds, devices, environment. The only reader of os.environ."""

from __future__ import annotations

import io
import logging
import os
import random
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rwkv_accel.config.schema import TrainerConfig
from rwkv_accel.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

EXIT_USER_ERROR = 2
# What asks a run to stop: Ctrl-C, a scheduler's end, Slurm's warning.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Stopped by a signal after saving: a launcher should start the same command again (EX_TEMPFAIL of sysexits.h).
EXIT_STOPPED = 75
# Ended by the watchdog (EX_SOFTWARE).
EXIT_STALLED = 70
PROCESS_GROUP_TIMEOUT_SECONDS = 600
# No build of an extension lasts so long.
STALE_LOCK_SECONDS = 600
DEEPSPEED_BUCKET_VALUES = 500_000_000
"""DeepSpeed's own reduce_bucket_size."""


def is_main_process() -> bool:
    """Whether this process writes files and speaks. Valid before the Accelerator exists."""
    return os.environ.get("RANK", "0") == "0"


def process_rank() -> int:
    """Rank of this process among those that the launcher started."""
    return int(os.environ.get("RANK", "0"))


def launched_strategy() -> str:
    """What the launcher asked for, by names of accelerate_configs/: valid whether or not an Accelerator exists."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return f"zero{stage}" + ("" if offload == "none" else "_offload")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "fsdp2"
    return "ddp" if world_size() > 1 else "single"


def world_size() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def stop_file() -> Path | None:
    """File whose existence asks the run to save and stop; named by the launcher."""
    return _path_from("RWKV_ACCEL_STOP_FILE")


def requeue_file() -> Path | None:
    """File that a run stopped by request leaves for its launcher after saving."""
    return _path_from("RWKV_ACCEL_REQUEUE_FILE")


def started_file() -> Path | None:
    """File that a run leaves for its launcher once its first update is done: a later crash is worth a retry."""
    return _path_from("RWKV_ACCEL_STARTED_FILE")


def _path_from(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None


def fail(error: UserError, *, on_any_rank: bool = False) -> int:
    """Print a user's mistake as plain lines and return the exit code for it.

    on_any_rank: the process that met it speaks, not only rank 0: the others know nothing of it.
    """
    if on_any_rank or is_main_process():
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr, flush=True)  # noqa: T201
    return EXIT_USER_ERROR


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a command's main and end the process with its exit code.

    One process of several that has ended in order leaves at once: what it wrote is on disk, and tearing down the
    interpreter under the threads of gloo aborts now and then ("terminate called without an active exception"), which
    a launcher takes for a failure.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal cannot show must not end a command.
            stream.reconfigure(errors="backslashreplace")
    try:
        code: Any = main()
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        # Ctrl-C in a command that has nothing to save.
        code = 128 + signal.SIGINT
    if world_size() > 1 and code in (0, EXIT_STOPPED):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def reader_left() -> int:
    """The exit code when who reads stdout (head, less) has seen enough; Python keeps quiet about the rest."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def end_on_signals() -> None:
    """Until training takes the signals over, one ends the process and asks the launcher for another start."""

    def end_at_once(number: int, frame: Any) -> NoReturn:
        _say_stopped(number)
        # An exception would come out in the midst of an import or of a library's own cleaning up, as another one.
        os._exit(EXIT_STOPPED)

    for number in SIGNALS:
        signal.signal(number, end_at_once)


def end_by_signal(number: int, frame: Any) -> NoReturn:
    """Handler of a signal while there is nothing to save, but perhaps a temporary file to remove."""
    _say_stopped(number)
    raise SystemExit(EXIT_STOPPED)


def _say_stopped(number: int) -> None:
    # Not through sys.stderr, which the signal may have interrupted in the midst of a line.
    os.write(2, f"stopped by {signal.Signals(number).name}; nothing was lost\n".encode())


def end_with_launcher() -> None:
    """Ask the kernel for a SIGTERM when the launcher of this process dies, so that no trainer is left behind by itself.

    `kill -9` of a launcher, and with `accelerate launch` of one process any signal to it, ends the launcher alone. A
    trainer left behind would train on, unseen, in a folder where the same command is soon started again. As for any
    SIGTERM, the trainer saves. Not for a process that a shell started: that may outlive its shell (nohup).
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if not launched or sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() == 1 and not _is_launcher(1):
        raise SystemExit(EXIT_STOPPED)  # it died before


def _is_launcher(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True
    return b"launch" in command or b"torchrun" in command or b"torch.distributed.run" in command


def knows_shutdown_timeout() -> bool:
    """Whether the environment says how long torchrun waits for processes that it has told to stop."""
    return "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in os.environ


def set_environment_defaults() -> None:
    """Defaults that must be set before torch and its libraries start; what the user set stays."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP's threads spin while they wait. Shorter than its default of 300,000, they take the processors less from
    # each other on a busy machine; at 3,000 and 30,000 a quiet one was about as fast.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)


def extensions_folder() -> Path:
    """Where compiled extensions of torch and DeepSpeed are cached."""
    # By name only: two environments sharing a home would rebuild each other's.
    own = cache_folder() / f"ext-{zlib.crc32(sys.prefix.encode()):08x}"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", own))


def cache_folder() -> Path:
    """The user's folder for what can be made again."""
    return Path(os.path.expanduser("~")) / ".cache" / "rwkv_accel"


def cpp_compiler() -> str | None:
    """The C++ compiler of this machine: $CXX, or the first that is found; None without one."""
    asked = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [asked] if asked else ["g++", "clang++", "c++"])), None)


def set_seed(seed: int) -> None:
    """Seed python, numpy and torch. The same on every rank: data order and adapters must agree."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_engine_switches(trainer: TrainerConfig) -> None:
    """Device, determinism and debugging switches of the process. Runs before anything touches a GPU.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if trainer.accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator is gpu, but torch {torch.__version__} sees no GPU here; look at "
            "`python -m rwkv_accel.doctor`, or set trainer.accelerator=auto"
        )
    torch.use_deterministic_algorithms(bool(trainer.deterministic), warn_only=trainer.deterministic == "warn")
    # Memory that nobody wrote is never read here; filling it would cost a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = bool(trainer.deterministic)
    torch.backends.cudnn.benchmark = trainer.benchmark
    torch.autograd.set_detect_anomaly(trainer.detect_anomaly)


def check_launch(trainer: TrainerConfig) -> None:
    """Raises UserError unless the launcher started what trainer.devices and trainer.num_nodes say."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    for key, wanted, started, unit in (
        ("devices", trainer.devices, per_node, "processes per node (--num_processes over all nodes)"),
        ("num_nodes", trainer.num_nodes, world_size() // per_node, "nodes (--num_machines)"),
    ):
        if wanted is not None and wanted != started:
            raise UserError(
                f"trainer.{key} is {wanted}, but the launcher started {started} {unit}; change one of the two, or "
                f"leave trainer.{key} out"
            )


def strategy_of(accelerator: Accelerator) -> str:
    """How the launcher spreads the run, by the name of its file in accelerate_configs/."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        offload = _offload_device(plugin.deepspeed_config) not in (None, "none")
        return f"zero{plugin.zero_stage}" + ("_offload" if offload else "")
    if accelerator.distributed_type == "FSDP":
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "single"


def check_strategy(accelerator: Accelerator, trainer: TrainerConfig) -> None:
    """Raises UserError unless the launcher set up trainer.strategy."""
    found = strategy_of(accelerator)
    if trainer.strategy not in ("auto", found):
        raise UserError(
            f"trainer.strategy is {trainer.strategy}, but the launcher set up {found}; launch with --config_file "
            f"accelerate_configs/{'single_gpu' if trainer.strategy == 'single' else trainer.strategy}.yaml, or set "
            "trainer.strategy=auto"
        )


def build_accelerator(trainer: TrainerConfig, micro_batches_per_window: int) -> Accelerator:
    """The Accelerator for what the launcher started: one process, DDP, FSDP2 or DeepSpeed. Collective.

    The recipe is the one source of batch size, accumulation and clipping; the numbers are injected into the
    DeepSpeed plugin, where `auto` or a forgotten key would silently become something else.

    Args:
        micro_batches_per_window: micro-batches of one optimizer update (of a full window).
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    has_gpu = torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    fsdp_on_cpu = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not has_gpu
    if deepspeed and trainer.precision == "16-mixed":
        raise UserError(
            "trainer.precision 16-mixed is not offered under DeepSpeed, whose update scales the loss for fp16 weights "
            "only; use bf16-mixed, or accelerate_configs/ddp.yaml or fsdp2.yaml"
        )
    if deepspeed and not has_gpu:
        _skip_shared_memory_op()
    timeout = timedelta(seconds=PROCESS_GROUP_TIMEOUT_SECONDS)
    group = InitProcessGroupKwargs(backend=None if has_gpu else "gloo", timeout=timeout)
    if fsdp_on_cpu:
        del os.environ["ACCELERATE_USE_FSDP"]
    accelerator = Accelerator(
        # cpu=True would switch DeepSpeed off without a word.
        cpu=not has_gpu and not deepspeed,
        mixed_precision="no",
        gradient_accumulation_steps=micro_batches_per_window,
        # A process that nobody launched has no group to form.
        kwargs_handlers=[group] if "RANK" in os.environ else [],
    )
    if fsdp_on_cpu:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        _enable_fsdp2_on_cpu()
    if accelerator.num_processes != world_size() or (
        world_size() > 1 and accelerator.distributed_type == DistributedType.NO
    ):
        raise UserError(
            f"the launcher started {world_size()} processes but Accelerate formed a group of "
            f"{accelerator.num_processes} ({accelerator.distributed_type}); use a file from accelerate_configs/"
        )
    check_strategy(accelerator, trainer)
    if deepspeed:
        _configure_deepspeed(accelerator, trainer, micro_batches_per_window)
    return accelerator


def check_offload(accelerator: Accelerator, optimizer_name: str) -> None:
    """Raises UserError for an optimizer that DeepSpeed would replace by CPU Adam without a word."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or optimizer_name == "adamw":
        return
    device = _offload_device(plugin.deepspeed_config)
    if device not in (None, "none"):
        raise UserError(
            f"optim.optimizer {optimizer_name} cannot be combined with offload_optimizer_device {device}: DeepSpeed "
            "would run Adam in its place; use optim.optimizer=adamw, or an Accelerate config without offload"
        )


def load_cpu_adam(accelerator: Accelerator) -> None:
    """Compile (once) and load DeepSpeed's CPU Adam, if the Accelerate config offloads; one process at a time.

    Whoever builds or merely loads it takes a `lock` file. A killed process leaves that behind, and from then on every
    start waits for it without end. A lock of the kernel, which dies with its process, tells when the file is nobody's.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or _offload_device(plugin.deepspeed_config) in (None, "none"):
        return
    import fcntl

    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(CPUAdamBuilder.NAME, verbose=False))
    with open(folder / ".in_turn", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        lock = folder / "lock"
        # In a folder of the user's choice others build, too, who know nothing of taking turns.
        if lock.exists() and (
            folder.is_relative_to(cache_folder()) or time.time() - lock.stat().st_mtime > STALE_LOCK_SECONDS
        ):
            lock.unlink()
        CPUAdamBuilder().load()


def _offload_device(deepspeed_config: dict[str, Any]) -> str | None:
    return deepspeed_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")


def _configure_deepspeed(accelerator: Accelerator, trainer: TrainerConfig, micro_batches: int) -> None:
    config: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config
    wanted = {
        "train_micro_batch_size_per_gpu": trainer.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": trainer.gradient_clip_val,
    }
    for key, value in wanted.items():
        if config.get(key, "auto") not in ("auto", value) and key != "gradient_accumulation_steps":
            raise UserError(f"the Accelerate config sets {key}={config[key]}, the recipe says {value}; remove it there")
        config[key] = value


def unwrap(model: Any) -> Any:
    """The bare model inside the wrappers of DDP, DeepSpeed and torch.compile.

    Accelerate's own unwrapping imports DeepSpeed even where it is not used, which costs seconds.
    """
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model


def prepare(
    accelerator: Accelerator, model: Any, optimizer: Any, trainer: TrainerConfig, micro_batches: int
) -> tuple[Any, Any]:
    """accelerator.prepare of model and optimizer, with what has to come before and after it. Collective."""
    load_cpu_adam(accelerator)
    _fit_bucket(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    check_engine(accelerator, model, trainer, micro_batches)
    return model, optimizer


def _fit_bucket(accelerator: Accelerator, model: Any) -> None:
    """No larger a gradient bucket than there are gradients: DeepSpeed allocates it whole, 2 GB for any adapter."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return
    zero = plugin.deepspeed_config.setdefault("zero_optimization", {})
    if zero.get("reduce_bucket_size", "auto") == "auto":
        num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        zero["reduce_bucket_size"] = min(DEEPSPEED_BUCKET_VALUES, max(num_trained, 1))


def check_engine(accelerator: Accelerator, model: Any, trainer: TrainerConfig, micro_batches: int) -> None:
    """After prepare: the engine must have taken the recipe's numbers."""
    from accelerate.utils import DistributedType

    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    got = (
        model.gradient_clipping(),
        model.gradient_accumulation_steps(),
        model.train_micro_batch_size_per_gpu(),
    )
    want = (trainer.gradient_clip_val, micro_batches, trainer.micro_batch_size)
    assert got == want, f"DeepSpeed engine has (clip, accumulation, micro batch) {got}, the recipe says {want}"
    if not hasattr(model.optimizer, "overflow"):
        raise UserError(
            "DeepSpeed without ZeRO cannot leave out an update whose gradient is not finite; set zero_stage 1, 2 or 3 "
            "in the Accelerate config, or use accelerate_configs/ddp.yaml"
        )
    if trainer.precision == "bf16-true":
        # For bf16 parameters stages 1 and 2 look at the gradient only if they are told to.
        model.optimizer.check_grad_overflow = True


def _skip_shared_memory_op() -> None:
    # Without a GPU DeepSpeed compiles this op at start-up (half a minute, needs a compiler); training never uses it.
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _enable_fsdp2_on_cpu() -> None:
    # Accelerate turns FSDP on for accelerators only; with gloo it works once the state says so.
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
