"""What an export does: find the files, merge in fp32, write under a scratch name, prove, rename."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.errors import UserError
from rwkv_accel.generation.loading import find_source
from rwkv_accel.model.checkpoint_file import Checkpoint
from rwkv_accel.model.io import build_model, checkpoint_digest, read_checkpoint, save_checkpoint, save_safetensors
from rwkv_accel.model.precision import Precision
from rwkv_accel.peft.adapter_file import check_base
from rwkv_accel.peft.fla import fla_config, fla_state_dict
from rwkv_accel.peft.foreign import read_any_adapter
from rwkv_accel.peft.hf_peft import HF_CONFIG_FILE, HF_TENSORS_FILE, read_hf_peft, write_hf_peft
from rwkv_accel.peft.merge import (
    TOLERANCE,
    Loaded,
    combined_state,
    logits_of,
    merged_tensors,
    relative_error,
    running_model,
    time_state_names,
)

WEIGHTS_FILE = "model.safetensors"
DEFAULT_NAME = {
    "pth": "merged.pth",
    "safetensors": "merged.safetensors",
    "fla": "fla",
    "hf-peft": "hf_peft",
    "state": "state.pth",
}
# What an export that is a folder may be written over.
FOLDER_FILES = {"fla": {"config.json", WEIGHTS_FILE}, "hf-peft": {HF_CONFIG_FILE, HF_TENSORS_FILE}}
DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """Everything read and checked; nothing written yet."""

    base: Checkpoint
    adapters: list[Loaded]
    out: Path
    dtype: torch.dtype | None
    probe_ids: list[int]
    names: str

    @property
    def stored(self) -> torch.dtype:
        """Dtype of the merged matrices."""
        return self.dtype or self.base["emb.weight"].dtype


def export(
    sources: Sequence[str],
    *,
    to: str,
    out: str | None = None,
    overwrite: bool = False,
    base: str | None = None,
    weights: Sequence[float] | None = None,
    onto_original: bool = False,
    dtype: str = "keep",
    names: str = "official",
    method: str | None = None,
    alpha: float | None = None,
    probe: str,
) -> str:
    """Write one export and return a line that says what was written and how it was checked.

    Raises:
        UserError: a source is broken or does not fit, or the check failed; nothing is left under the final name.
    """
    target = _target(sources[0], to, out, overwrite)
    base_path, found = _find(sources, base)
    _check_replaced(target, to, [base_path, *found, *map(Path, sources)])
    checkpoint = read_checkpoint(base_path)
    factors = _factors(weights, len(found))
    adapters = []
    digest = ""
    for path, weight in zip(found, factors):
        meta, tensors = read_any_adapter(path, method=method, alpha=alpha)
        if meta.base_digest:
            digest = digest or checkpoint_digest(base_path)
            check_base(meta, digest, path, base_path)
        adapters.append(Loaded(meta, tensors, checkpoint.config, weight, onto_original))
    _check_same_quant(adapters)
    tokenizer = adapters[0].meta.tokenizer if adapters else ""
    ids = probe_ids(probe, tokenizer, checkpoint.config.vocab_size)
    job = Job(checkpoint, adapters, target, DTYPES[dtype], ids, names)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return WRITERS[to](job)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {target}: {reason}; free space or choose another --out") from None


def probe_ids(text: str, tokenizer: str, vocab_size: int) -> list[int]:
    """Token ids for the check. A vocabulary that fits no tokenizer gets the text's bytes, wrapped around."""
    fitting = [name for name in (tokenizer or "world", "byte") if build_tokenizer(name).vocab_size <= vocab_size]
    if fitting:
        return build_tokenizer(fitting[0]).encode(text)
    return [byte % vocab_size for byte in text.encode()]


def _target(source: str, to: str, out: str | None, overwrite: bool) -> Path:
    if out is None and not Path(source).is_dir():
        raise UserError(f"--out is needed for the file {source}; for example --out {DEFAULT_NAME[to]}")
    target = Path(out) if out is not None else Path(source) / DEFAULT_NAME[to]
    suffix = Path(DEFAULT_NAME[to]).suffix
    if suffix and target.suffix != suffix:
        raise UserError(f"--out {target} must end in {suffix} for --to {to}")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; give --overwrite, or another --out")
    return target


def _check_replaced(target: Path, to: str, sources: Sequence[Path]) -> None:
    """Raises UserError unless what lies at the target is an earlier export, or nothing."""
    if not target.exists():
        return
    if any(path.exists() and target.samefile(path) for path in sources):
        raise UserError(f"--out {target} is what the export is made from; give another")
    if target.is_dir():
        if to not in FOLDER_FILES:
            raise UserError(f"--out {target} is a folder; name the file in it")
        if other := sorted({path.name for path in target.iterdir()} - FOLDER_FILES[to]):
            raise UserError(f"--out {target} holds {other[0]}, which no export wrote; give another folder")
    elif to in FOLDER_FILES:
        raise UserError(f"--out {target} is a file; --to {to} writes a folder")


def _find(sources: Sequence[str], base: str | None) -> tuple[Path, list[Path]]:
    """The base checkpoint and the adapters; a source that is a whole model has none."""
    bases, adapters = [], []
    for source in sources:
        path = Path(source)
        if (path / HF_CONFIG_FILE).is_file() or (base is not None and path.is_file()):
            adapters.append(path)
            continue
        located = find_source(path, base=base)
        bases.append(located.base)
        if located.adapter is not None:
            adapters.append(located.adapter)
    if base is not None:
        bases = [Path(base)]
    if not bases:
        raise UserError(f"{sources[0]} does not say where its base model is; give it with --base")
    if len(sources) > 1 and len(adapters) != len(sources):
        raise UserError("only adapters can be added up; one of the sources is a whole model")
    return bases[0], adapters


def _factors(weights: Sequence[float] | None, num_adapters: int) -> list[float]:
    if weights is None:
        return [1.0] * num_adapters
    if len(weights) != num_adapters:
        raise UserError(f"--weights gives {len(weights)} factors for {num_adapters} adapters; give one for each")
    if not all(map(math.isfinite, weights)):
        raise UserError("--weights holds a factor that is not finite; give plain numbers")
    return list(weights)


def _check_same_quant(adapters: Sequence[Loaded]) -> None:
    if len({adapter.plan.quant for adapter in adapters}) > 1:
        raise UserError("the adapters were trained on differently quantised bases; merge them with --onto original")


def write_model(job: Job) -> str:
    """--to pth, --to safetensors."""
    # The suffix decides the container, so it stays at the end of the scratch name.
    scratch = job.out.with_name(f".{job.out.stem}.unproven{job.out.suffix}")
    try:
        save_checkpoint(dict(merged_tensors(job.base, job.adapters, job.dtype)), scratch)
        error = _prove(job, read_checkpoint(scratch))
        os.replace(scratch, job.out)
    finally:
        scratch.unlink(missing_ok=True)
    note = ""
    if time_state_names(job.adapters):
        note = "; it carries time_state, which the pip package rwkv ignores: use --to state there"
    return f"{_said(job, error)}{note}"


def write_fla(job: Job) -> str:
    """--to fla."""
    if time_state_names(job.adapters):
        raise UserError("the fla format has no place for initial states; use --to pth, or --to state beside it")
    merged = dict(merged_tensors(job.base, job.adapters, job.dtype))
    error = _prove(job, merged)

    def fill(folder: Path) -> None:
        save_safetensors(fla_state_dict(merged), folder / WEIGHTS_FILE)
        config = json.dumps(fla_config(job.base.config, job.stored), indent=2) + "\n"
        (folder / "config.json").write_text(config, encoding="utf-8")

    _write_folder(job.out, fill)
    return _said(job, error)


def write_hf(job: Job) -> str:
    """--to hf-peft."""
    if not job.adapters:
        raise UserError(f"{job.base.path} is a whole model and no adapter; write it with --to fla or --to pth")
    if len(job.adapters) != 1 or job.adapters[0].weight != 1:
        raise UserError("--to hf-peft converts one adapter with factor 1; merge several with --to pth")
    ours = job.adapters[0]

    def fill(folder: Path) -> None:
        inner = folder / "hf"
        write_hf_peft(
            inner, ours.meta.config, ours.plan.adapters, ours.tensors, names=job.names, base=str(job.base.path)
        )
        peft, tensors = read_hf_peft(inner)
        theirs = Loaded(type(ours.meta)(peft.model_dump(mode="json"), ""), tensors, job.base.config)
        _prove_layers(job.base, Loaded(ours.meta, ours.tensors, job.base.config, onto_original=True), theirs)
        for path in list(inner.iterdir()):
            os.replace(path, folder / path.name)
        inner.rmdir()

    _write_folder(job.out, fill)
    quantised = f"; trained on a {ours.plan.quant.kind} base" if ours.plan.quant else ""
    return f"wrote {job.out}: {len(ours.plan.adapters)} adapters, read back and equal{quantised}"


def write_state(job: Job) -> str:
    """--to state."""
    names = time_state_names(job.adapters)
    if not names:
        raise UserError("no source trains initial states; train with peft.method state or peft.train_state")
    states = {name: combined_state(name, job.adapters, job.base.get(name)) for name in names}
    save_checkpoint(states, job.out)
    return f"wrote {job.out}: {len(states)} states [H, value, key] in fp32"


WRITERS: dict[str, Callable[[Job], str]] = {
    "pth": write_model,
    "safetensors": write_model,
    "fla": write_fla,
    "hf-peft": write_hf,
    "state": write_state,
}


def _prove(job: Job, merged: Mapping[str, Tensor]) -> float:
    """Error of the merged model's logits on the probe. Raises UserError above the tolerance."""
    frozen = job.base["emb.weight"].dtype
    running = logits_of(running_model(job.base.config, job.base, job.adapters, frozen), job.probe_ids)
    precision = Precision(compute=torch.float32, frozen=job.stored, trainable=torch.float32)
    stored = logits_of(build_model(job.base.config, merged, precision).eval(), job.probe_ids)
    error, limit = relative_error(running, stored), TOLERANCE[job.stored]
    if not error <= limit:
        raise UserError(
            f"the merged model is not the same model: its logits differ by {error:.2g} of their spread, the limit for "
            f"{_dtype_name(job.stored)} is {limit:g}; nothing was written; try --dtype fp32"
        )
    return error


def _prove_layers(base: Mapping[str, Tensor], ours: Loaded, theirs: Loaded) -> None:
    """Raises UserError unless both give the same merged weight in every layer."""
    for module in ours.plan.adapters:
        weight_OI = base[f"{module}.weight"]
        first, second = (side.layer(module, weight_OI, torch.float32) for side in (ours, theirs))
        assert first is not None
        if second is None or not torch.allclose(
            first.merged_weight(), second.merged_weight(), rtol=1e-4, atol=1e-5 * float(weight_OI.abs().max())
        ):
            raise UserError(f"the converted adapter differs at {module}; nothing was written, please report this")


def _write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    scratch = folder.with_name(f".{folder.name}.unproven")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        fill(scratch)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _said(job: Job, error: float) -> str:
    what = f"{len(job.adapters)} adapters merged" if len(job.adapters) != 1 else "1 adapter merged"
    return (
        f"wrote {job.out}: {what}, stored as {_dtype_name(job.stored)}; logits on {len(job.probe_ids)} probe tokens "
        f"differ by {error:.2g} of their spread (limit {TOLERANCE[job.stored]:g})"
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
