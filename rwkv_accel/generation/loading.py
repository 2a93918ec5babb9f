"""From what a user names (a run, an adapter folder, a checkpoint) to a model and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rwkv_accel.checkpoint.weights import INIT_FILE, base_checkpoint, latest_weights, run_folder_of
from rwkv_accel.config.load import load_config
from rwkv_accel.config.schema import ModelConfig, RunConfig
from rwkv_accel.data.tokenizer import Tokenizer, build_tokenizer
from rwkv_accel.errors import UserError
from rwkv_accel.generation.packed import MANY_ROWS, pack_linears
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.io import checkpoint_digest, load_model, read_checkpoint
from rwkv_accel.model.precision import Precision, wide_dtype
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.peft.adapter_file import META_FILE, read_meta
from rwkv_accel.peft.apply import Applier, load_model_and_apply_peft
from rwkv_accel.peft.plan import Plan, linear_shapes, trainable_shapes
from rwkv_accel.peft.quant import Quant
from rwkv_accel.tracking import RUN_FILE

CHECKPOINT_SUFFIXES = (".pth", ".safetensors")


@dataclass(frozen=True)
class Source:
    """Files that make up one model."""

    base: Path
    """Checkpoint with the base weights, or the whole fine-tuned model."""
    adapter: Path | None = None
    """Adapter folder that goes onto the base."""
    tokenizer: str | None = None
    """Tokenizer that the run or the adapter was trained with; None: not known."""
    template: str | None = None
    """data.template likewise."""


def find_source(path: str | Path, *, base: str | Path | None = None, adapter: str | Path | None = None) -> Source:
    """Files behind a run folder (its newest save), an adapter folder, an epoch's folder or a checkpoint file.

    `base` replaces the base that the run or the adapter names; `adapter` goes onto a checkpoint.

    Raises:
        UserError: nothing usable is there, or its base is gone.
    """
    path = Path(path)
    base = None if base is None else Path(base)
    if path.is_dir():
        source = _of_folder(path, base)
    elif path.suffix in CHECKPOINT_SUFFIXES or path.is_file():
        source = Source(path)
    else:
        raise UserError(f"{path} does not exist; give a run folder, an adapter folder or a checkpoint file")
    if base is not None:
        source = replace(source, base=base)
    if adapter is not None:
        if source.adapter is not None:
            raise UserError(
                f"{path} already has the adapter {source.adapter}; give base model as PATH, or drop --adapter"
            )
        adapter = Path(adapter)
        meta = read_meta(adapter)
        source = replace(
            source,
            adapter=adapter,
            tokenizer=meta.tokenizer or source.tokenizer,
            template=meta.template or source.template,
        )
    if not source.base.is_file():
        raise UserError(f"the base model {source.base} of {path} does not exist; give it with --base")
    return source


def load_generator_model(
    source: Source,
    *,
    precision: str = "32-true",
    device: str = "cpu",
    tokenizer: str | None = None,
    quant: str | None = None,
    time_state: str | Path | None = None,
    num_rows: int = MANY_ROWS,
) -> tuple[RWKV7, Tokenizer]:
    """The model, ready to generate, and its tokenizer.

    `quant` (nf4, int8) stores the block matrices of a checkpoint quantised; `time_state` is a state-tuning file that
    every sequence starts from, in place of states that the adapter may bring. `num_rows` is how many sequences will
    mostly be decoded at once.

    Raises:
        UserError: a file is broken, the adapter belongs to another base or to another quantisation of it, or the
            tokenizer or the states do not fit.
    """
    config = read_checkpoint(source.base).config
    words = build_tokenizer(tokenizer or tokenizer_of(source))
    if words.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer {words.name} has {words.vocab_size} ids, {source.base} only {config.vocab_size}; "
            "give the tokenizer that it was trained with (--tokenizer)"
        )
    dtypes = Precision.from_name(precision)
    if source.adapter is None:
        model = load_model(source.base, dtypes, transform=_quantiser(config, quant, dtypes) if quant else None)
    else:
        peft = read_meta(source.adapter).config.model_copy(update={"load_path": str(source.adapter)})
        if quant not in (None, peft.base_quant):
            raise UserError(
                f"--quant {quant}: the adapter was trained on a base stored as {peft.base_quant}; merge it first "
                f"(python -m rwkv_accel.export {source.adapter} --to pth) and quantise the merged checkpoint"
            )
        model = load_model_and_apply_peft(ModelConfig(path=str(source.base)), peft, precision=dtypes)
    if time_state is not None:
        _set_time_states(model, time_state)
    model = model.requires_grad_(False).eval().to(device)
    pack_linears(model, num_rows)
    return model, words


def tokenizer_of(source: Source) -> str:
    """Name of the tokenizer that the run or the adapter used, or whose models have this many rows.

    Raises:
        UserError: no tokenizer fits.
    """
    return source.tokenizer or _guess_tokenizer(read_checkpoint(source.base).config.vocab_size)


def model_id(source: Source) -> str:
    """What tells these weights from others: digests of the base and of the adapter. Reads the whole base."""
    adapter = f"+{read_meta(source.adapter).sha256}" if source.adapter else ""
    return checkpoint_digest(source.base) + adapter


def _quantiser(config: RWKV7Config, kind: str, dtypes: Precision) -> Applier:
    """Stores the matrices of the blocks quantised while they are read, as training on a quantised base does."""
    names = frozenset(name for name in linear_shapes(trainable_shapes(config)) if name != "head")
    plan = Plan({}, None, trained=frozenset(), state_blocks=(), quantised=names, quant=Quant(kind))
    return Applier(plan, dtypes, seed=0, frozen_tensors={})


def _set_time_states(model: RWKV7, path: str | Path) -> None:
    """Let every sequence start from a state-tuning file of `blocks.i.att.time_state` [H,N,N], any container.

    Raises:
        UserError: the file holds something else, or states of another model size.
    """
    checkpoint = read_checkpoint(path)
    config = model.config
    heads = (config.n_head, config.head_size, config.head_size)
    expected = {f"blocks.{layer}.att.time_state": heads for layer in range(config.n_layer)}
    if dict(checkpoint.shapes) != expected:
        found = next((f"{n} {list(s)}" for n, s in checkpoint.shapes.items() if expected.get(n) != s), "fewer layers")
        raise UserError(
            f"{path} is no state for this model ({found}); it must hold exactly {config.n_layer} tensors "
            f"blocks.i.att.time_state of shape {list(heads)}"
        )
    for layer, name in enumerate(expected):
        tensor = checkpoint[name].to(wide_dtype(model.compute_dtype))
        model.blocks[layer].att.time_state = torch.nn.Parameter(tensor, requires_grad=False)


def default_device() -> str:
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def checked_device(name: str) -> str:
    """The device of this name. Raises UserError if there is none here."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} cannot be used here ({reason}); leave it out for {default_device()}"
        ) from None
    return name


def _of_folder(folder: Path, base: Path | None) -> Source:
    if (folder / META_FILE).is_file():
        return _of_adapter(folder, base)
    models = [folder / f"model{suffix}" for suffix in CHECKPOINT_SUFFIXES if (folder / f"model{suffix}").is_file()]
    if models:
        run = run_folder_of(folder)
        if run is None:
            return Source(models[0])
        data = _recipe(run).data
        return Source(models[0], tokenizer=data.tokenizer, template=data.template)
    if (folder / RUN_FILE).is_file():
        return _of_folder(latest_weights(folder), base)
    raise UserError(f"{folder} is no run (no {RUN_FILE}) and no save (no {META_FILE}, no model.pth); give one of these")


def _of_adapter(folder: Path, base: Path | None) -> Source:
    meta, run = read_meta(folder), run_folder_of(folder)
    candidates = [path for path in (base, Path(meta.base_path) if meta.base_path else None) if path]
    tokenizer, template = meta.tokenizer, meta.template
    if run is not None:
        # The run may have moved since: what it started from may still lie in it or where its recipe says.
        config = _recipe(run)
        started_from = config.model.path
        candidates.append(base_checkpoint(started_from) if started_from else run / INIT_FILE)
        tokenizer, template = tokenizer or config.data.tokenizer, template or config.data.template
    if not candidates:
        raise UserError(f"adapter {folder} does not say where its base model is; give it with --base")
    existing = [path for path in candidates if path.is_file()]
    return Source((existing or candidates)[0], folder, tokenizer, template or None)


def _recipe(run: Path) -> RunConfig:
    return load_config(run / RUN_FILE)


def _guess_tokenizer(vocab_size: int) -> str:
    """The tokenizer whose models have this many rows. Raises UserError when none has."""
    for name in ("world", "byte"):
        if build_tokenizer(name).vocab_size == vocab_size:
            return name
    raise UserError(f"the model has {vocab_size} token ids, which fits no tokenizer; name it with --tokenizer")
