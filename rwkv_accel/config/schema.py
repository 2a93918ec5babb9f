"""The schema of a recipe: every key of a run, with its unit, its bounds and its meaning.

A recipe is one YAML file with the sections below. Whatever is about topology (processes, nodes, sharding) lives in
`accelerate_configs/`; everything else is here. Cadences are named `*_every_*` or `every_n_*`, counts `num_*` or
`max_*`, and units are suffixes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rwkv_accel.errors import UserError

Parts = Literal["emb", "head", "ln", "vectors", "lowrank"]
ADAPTER_METHODS = ("lora", "dora", "pissa", "miss")
LINEAR_TARGETS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """Base of every section: unknown keys are errors, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class InitConfig(Strict):
    """Shape of a model that is started from the official random initialisation."""

    n_layer: Positive
    """Number of blocks."""
    n_embd: Annotated[int, Field(ge=32)]
    """Channels C; a multiple of head_size."""
    vocab_size: Positive | None = None
    """Rows of the embedding. None takes the tokenizer's size (65536 for world, 257 for byte)."""
    head_size: Literal[16, 32, 64, 128] = 64
    """Channels per head N. Released models use 64."""
    seed: NonNegative = 0
    """Seed of the random matrices."""

    @model_validator(mode="after")
    def _heads_divide(self) -> InitConfig:
        if self.n_embd % self.head_size:
            raise ValueError(
                f"n_embd {self.n_embd} is not a multiple of head_size {self.head_size}; "
                f"use {self.n_embd // self.head_size * self.head_size or self.head_size}"
            )
        return self


class ModelConfig(Strict):
    """Which weights to start from, and how the model computes."""

    path: str | None = None
    """Base checkpoint, .pth or .safetensors in the official parameter names. All sizes are read from its shapes."""
    init: InitConfig | None = None
    """Start from random weights of this shape instead of a checkpoint."""
    wkv_backend: Literal["auto", "reference", "chunked"] = "auto"
    """Implementation of the WKV-7 recurrence. `auto` takes the fastest that runs on the device."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.init is None):
            raise ValueError("set exactly one of model.path (a checkpoint) and model.init (random weights)")
        return self


class PeftConfig(Strict):
    """What is trained: an adapter of some method, extra parts of the base, or everything."""

    method: Literal["lora", "dora", "pissa", "miss", "state", "parts", "full"] = "lora"
    """lora: low-rank adapters (arXiv 2106.09685). dora: the same with a trained magnitude per output row (arXiv
    2402.09353). pissa: adapters from the leading singular vectors, on the residual base (arXiv 2404.02948). miss: one
    small matrix repeated over the blocks of each weight (arXiv 2409.15371). state: only the initial WKV state. parts:
    only train_parts and train_patterns. full: every parameter."""
    rank: Positive = 32
    """Rank R of the adapters; with miss its block size."""
    rank_pattern: dict[str, Positive] = {}
    """Other ranks for some layers, by target or glob: `{ffn.key: 64, "blocks.0.*": 8}`. The first match counts."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """lora, dora, pissa: the delta is (alpha / rank) * B @ A. None means alpha = rank, a scale of 1."""
    rslora: bool = False
    """lora, dora, pissa: scale alpha / sqrt(rank) in place of alpha / rank (arXiv 2312.03732). Needs alpha."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability on the adapter's input."""
    targets: tuple[str, ...] = LINEAR_TARGETS
    """Linear layers that get an adapter, by exact suffix of the module name: `att.key`, `ffn.value`, `head`, or with
    the block, `blocks.3.att.key`, or a glob over the whole name. A target that matches nothing is an error."""
    miss_variant: Literal["plain", "bat", "bat_in"] = "plain"
    """miss: plain adds the matrix; bat multiplies it with the blocks of the weight, one matrix per output block, as HF
    peft; bat_in one per input block, as RWKV-PEFT. For both bats rank must divide every side."""
    svd_niter: NonNegative | None = None
    """PiSSA: power iterations of the randomised SVD; None is the exact SVD."""
    train_state: bool = False
    """Train the initial WKV state `time_state` of every block beside the method's adapters."""
    state_prompt: str | None = None
    """Text whose encoding is the start of the trained state. None starts from the base's state, or zero."""
    train_parts: tuple[Parts, ...] = ()
    """Base parameters trained beside the adapter: emb, head, ln (all norms), vectors (x_*, w0, a0, v0, k_k, k_a,
    r_k), lowrank (w1 .. g2)."""
    train_patterns: tuple[str, ...] = ()
    """More base parameters to train, by suffix (`att.w0`) or glob (`blocks.1?.ffn.*`) of the parameter's name."""
    freeze_parts: tuple[Parts, ...] = ()
    """Base parameters that stay frozen although the keys above select them."""
    freeze_patterns: tuple[str, ...] = ()
    """The same by suffix or glob."""
    layer_range: tuple[NonNegative, NonNegative] | None = None
    """First and last block in which anything trains, counted from 0. Parameters outside the blocks are not
    affected."""
    base_quant: Literal["none", "nf4", "int8"] = "none"
    """Storage of the frozen block matrices (att.receptance .. ffn.value): none, NF4 in blocks of 64 (arXiv
    2305.14314), or int8 with one scale per row. PiSSA quantises its residual."""
    double_quant: bool = False
    """nf4: store the block maxima in 8 bits too (4.13 bits per weight in place of 4.5)."""
    load_path: str | None = None
    """Adapter to continue from: a saved folder (its method, rank and targets must equal this section's), an HF PEFT
    folder, or a flat .pth of RWKV-PEFT (alpha as it was trained with)."""

    @property
    def has_adapter(self) -> bool:
        """Whether the method puts adapters on linear layers."""
        return self.method in ADAPTER_METHODS

    @property
    def trains_state(self) -> bool:
        """Whether the initial WKV states are trained."""
        return self.train_state or self.method == "state"

    @model_validator(mode="after")
    def _method_fits(self) -> PeftConfig:
        for problem in (self._adapter_problem(), self._selection_problem()):
            if problem:
                raise ValueError(problem)
        return self

    def _adapter_problem(self) -> str | None:
        method, low_rank = self.method, ("lora", "dora", "pissa")
        if self.has_adapter and not self.targets:
            return f"peft.targets is empty; name layers for peft.method {method}, or use parts, state or full"
        for key, methods in (
            ("alpha", low_rank),
            ("rslora", low_rank),
            ("dropout", ADAPTER_METHODS),
            ("rank_pattern", ADAPTER_METHODS),
            ("svd_niter", ("pissa",)),
            ("miss_variant", ("miss",)),
        ):
            value = getattr(self, key)
            if method not in methods and value != PeftConfig.model_fields[key].default:
                return f"peft.{key} applies to peft.method {', '.join(methods)}, not {method}; remove it"
        if self.rslora and self.alpha is None:
            return "peft.rslora needs peft.alpha: the scale is alpha / sqrt(rank); set peft.alpha"
        if method == "pissa" and self.dropout:
            return "peft.dropout must be 0 with peft.method pissa: its adapter carries base weights"
        return None

    def _selection_problem(self) -> str | None:
        method, ranges = self.method, self.layer_range
        if ranges is not None and ranges[0] > ranges[1]:
            return f"peft.layer_range {list(ranges)} is empty; write [first, last], both included"
        if method == "full":
            if self.train_parts or self.train_patterns or self.load_path:
                return "peft.method full trains every part and has no adapter: drop train_parts and load_path"
            if self.train_state:
                return "peft.method full saves a plain model, which has no initial states: drop peft.train_state"
            if self.base_quant != "none":
                return f"peft.base_quant {self.base_quant} needs a frozen base; use an adapter method, or none"
        if method == "parts" and not (self.train_parts or self.train_patterns or self.train_state):
            return "peft.method parts trains nothing; set peft.train_parts or peft.train_patterns"
        if self.state_prompt is not None and not self.trains_state:
            return "peft.state_prompt has no effect without a trained state; set peft.train_state or peft.method state"
        if self.double_quant and self.base_quant != "nf4":
            return f"peft.double_quant applies to peft.base_quant nf4, not {self.base_quant}; remove it"
        return None


class DataConfig(Strict):
    """Where the text comes from and how it becomes rows of tokens."""

    path: str | tuple[str, ...]
    """Training data, read in this order: .jsonl (one JSON object per line), .txt (documents split at runs of three
    newlines), .parquet, .arrow, .csv, .json, a folder of Dataset.save_to_disk, binidx (name.bin, with name.idx beside
    it), or hub:owner/name. Files may be URLs that fsspec knows (s3://, hf://, https://), binidx excepted."""
    split: str = "train"
    """hub and folders of several splits: the split to read."""
    subset: str | None = None
    """hub: the configuration of a data set that has several."""
    streaming: bool = False
    """hub: read through the network instead of downloading first; needs max_documents."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Mix the paths: relative share of the rows that each gives, one number per path. An epoch has as many rows as
    all paths together; a path with a larger share than it has rows is read again, in another order."""
    text_column: str = "text"
    """Column with a whole document."""
    messages_column: str = "messages"
    """Column with a list of {role, content} turns (or of {from, value}, as in the column `conversations`)."""
    prompt_column: str | None = None
    """Column with the prompt; goes with response_column and wins over the other columns."""
    response_column: str | None = None
    """Column with the reply, the only target."""
    template: str = "rwkv"
    """How turns become text. rwkv: the official User/Assistant form. raw: the texts side by side, nothing added.
    Or a .jinja file with a chat template of the Hugging Face kind."""
    target_roles: Annotated[tuple[Literal["system", "user", "assistant", "tool"], ...], Field(min_length=1)] = (
        "assistant",
    )
    """Roles whose turns are targets of the loss."""
    target_turns: Literal["all", "last"] = "all"
    """all: every turn of these roles is a target. last: only the last one of a conversation."""
    thinking: Literal["keep", "drop", "fast"] = "keep"
    """Reasoning (`reasoning_content`, or <think>..</think> at the head of a reply). keep: trained as the reply to
    `Assistant: <think`. drop: left out. fast: as keep, and replies without it follow an empty think block."""
    tokenizer: str = "world"
    """world: RWKV World vocabulary (65536 ids). byte: one id per byte plus end of text (257 ids). Or the path of a
    Hugging Face tokenizer.json, or of the folder that holds it."""
    ctx_len: Positive = 1024
    """Row length in tokens: what one sample of the model is long."""
    packing: Literal["pack", "pad", "bucket"] = "pack"
    """pack: several documents share a row, each with its own fresh state. pad: one document per row. bucket: one
    document per row, and an update's rows are of similar length, so that little is padded."""
    overlong: Literal["split", "truncate", "drop"] = "split"
    """What to do with a document longer than ctx_len. Counted and reported. split: every piece of it starts from a
    fresh state. truncate: its end, end of text included, is lost."""
    sampling: Literal["documents", "magic_prime"] = "documents"
    """documents: rows are made of documents. magic_prime (binidx only): the official pretraining order, rows of
    ctx_len tokens out of the flat stream of tokens, which cross documents without a reset."""
    max_documents: Positive | None = None
    """Read only this many documents (of each path, if they are mixed by weights)."""
    on_bad_line: Literal["stop", "skip"] = "stop"
    """A broken line or record: stop with file and line number, or skip it and count."""
    shuffle: bool = True
    """Shuffle the rows anew in every epoch (seeded by trainer.seed). False keeps the file's order."""
    cache_dir: str | None = "~/.cache/rwkv_accel/data"
    """Folder for the tokens of large sources (32 MB and more) and for the rows of large sets, found again by content
    and settings. None: tokenise at every start, in every process."""

    @model_validator(mode="after")
    def _columns_pair(self) -> DataConfig:
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError("data.prompt_column and data.response_column go together: set both or none")
        return self

    @model_validator(mode="after")
    def _orders_fit(self) -> DataConfig:
        num_paths = 1 if isinstance(self.path, str) else len(self.path)
        if self.weights is not None and len(self.weights) != num_paths:
            raise ValueError(f"data.weights has {len(self.weights)} numbers for {num_paths} paths; give one per path")
        if self.streaming and self.max_documents is None:
            raise ValueError("data.streaming needs data.max_documents: rows are planned before the first step")
        fixed = "data.packing bucket" if self.packing == "bucket" else ""
        fixed = "data.weights" if self.weights is not None else fixed
        if fixed and not self.shuffle:
            raise ValueError(f"{fixed} decides the order of rows; set data.shuffle=true")
        if self.packing == "bucket" and self.weights is not None:
            raise ValueError("data.packing bucket sorts all rows by length; with data.weights use pack or pad")
        if self.sampling == "magic_prime" and (num_paths != 1 or self.max_documents or not self.shuffle):
            raise ValueError(
                "data.sampling magic_prime reads one whole binidx in its own order: give one path, "
                "no data.max_documents, and leave data.shuffle true"
            )
        return self


class LrScale(Strict):
    """Factors on the learning rate, by parameter group."""

    w0: Annotated[float, Field(ge=0)] = 2.0
    """Decay bias `att.w0` (twice the rate in the official trainer)."""
    emb: Annotated[float, Field(ge=0)] = 1.0
    """Embedding."""
    head: Annotated[float, Field(ge=0)] = 1.0
    """Output head."""
    lora_A: Annotated[float, Field(ge=0)] = 1.0
    """Adapter matrices A."""
    lora_B: Annotated[float, Field(ge=0)] = 1.0
    """Adapter matrices B (LoRA+ uses about 16, arXiv 2402.12354)."""
    state: Annotated[float, Field(ge=0)] = 1.0
    """Initial WKV states. Alone they want a rate of 1 falling to 0.01; beside an adapter, a scale of 100 and more."""


class OptimConfig(Strict):
    """Optimizer, learning rate and weight decay. The schedule is evaluated at every step from the step alone."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw: decoupled weight decay. sgd: plain, without momentum (for comparisons)."""
    lr_init: Annotated[float, Field(ge=0)] = 2e-5
    """Learning rate after the warmup."""
    lr_final: Annotated[float, Field(ge=0)] | None = None
    """Learning rate at the last step. None means lr_init."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "exponential"] = "cosine"
    """Path from lr_init to lr_final. wsd: stable at lr_init, then linear decay over the last wsd_decay_share."""
    wsd_decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd: share of the steps spent decaying."""
    warmup_steps: NonNegative = 0
    """Steps over which the rate rises from 1% to 100% (factor 0.01 + 0.99 * step / warmup_steps)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """AdamW moment decays."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW epsilon. Official pretraining uses 1e-18 (needs fp32 moments)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay on the large `.weight` matrices of the base only."""
    weight_decay_final: Annotated[float, Field(ge=0)] | None = None
    """Weight decay at the last step, reached exponentially. None keeps weight_decay."""
    lr_scale: LrScale = LrScale()
    """Factors per parameter group."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> OptimConfig:
        final = self.lr_init if self.lr_final is None else self.lr_final
        if self.schedule == "exponential" and (self.lr_init == 0 or final == 0):
            raise ValueError("optim.schedule exponential needs lr_init and lr_final above 0; use linear or cosine")
        if self.schedule == "constant" and final != self.lr_init:
            raise ValueError(
                f"optim.schedule constant never reaches lr_final {final:g}; drop lr_final or choose linear, cosine, "
                "wsd or exponential"
            )
        if self.weight_decay_final is not None and (self.weight_decay == 0 or self.weight_decay_final == 0):
            raise ValueError("optim.weight_decay_final is reached exponentially: both values must be above 0")
        return self


class TrainerConfig(Strict):
    """Length of the run, batch, precision and the engine's switches."""

    max_epochs: Positive = 1
    """Passes over the data."""
    max_steps: Positive | None = None
    """Stop after this many optimizer updates, even within an epoch. None: after max_epochs."""
    micro_batch_size: Positive = 1
    """Rows per process and forward pass."""
    global_batch_size: Positive | None = None
    """Rows per optimizer update over all processes. The number of micro-batches follows from it."""
    accumulate_grad_batches: Positive | None = None
    """Micro-batches per process and update; the other way to say global_batch_size. Default 1."""
    gradient_clip_val: Annotated[float, Field(ge=0)] = 1.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    """32-true: all fp32. bf16-mixed: frozen weights and arithmetic in bf16, trained weights and moments fp32.
    bf16-true: all weights bf16."""
    gradient_checkpointing: Literal["none", "block"] = "none"
    """block: keep only the input of each block and recompute the rest in the backward pass."""
    l2wrap: Annotated[float, Field(ge=0)] = 1e-4
    """Strength of the pull of the largest logit towards 0 (gradient only). 0 switches it off."""
    loss_chunk_rows: Positive = 512
    """Rows of logits that are in memory at a time while the loss is computed."""
    seed: NonNegative = 42
    """Seed of data order, adapter init and dropout."""
    log_every_n_steps: Positive = 1
    """Steps between log records; steps in between never wait for the device."""

    @model_validator(mode="after")
    def _one_batch_size(self) -> TrainerConfig:
        if self.global_batch_size is not None and self.accumulate_grad_batches is not None:
            raise ValueError("set one of trainer.global_batch_size and trainer.accumulate_grad_batches, not both")
        return self

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches per process in one full optimizer update.

        Raises:
            UserError: global_batch_size is not a multiple of micro_batch_size * world_size.
        """
        per_pass = self.micro_batch_size * world_size
        if self.global_batch_size is None:
            return self.accumulate_grad_batches or 1
        if self.global_batch_size % per_pass:
            below = self.global_batch_size // per_pass * per_pass
            fits = f"{below} or {below + per_pass}" if below else f"{per_pass}"
            raise UserError(
                f"trainer.global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {world_size} processes; use {fits}, or another micro_batch_size"
            )
        return self.global_batch_size // per_pass


class EvalConfig(Strict):
    """Validation during the run, and what follows from its loss."""

    path: str | tuple[str, ...] | None = None
    """Validation files; columns, template and tokenizer are those of the data section. Several files are several sets,
    each with its own numbers; the first one decides."""
    split_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Without a path: share of the training documents that is held out for validation and never trained on."""
    every_n_steps: Positive | None = None
    """Evaluate every this many updates."""
    every_n_epochs: Positive | None = 1
    """Evaluate at the end of every this many epochs. None: never at an epoch's end."""
    at_start: bool = False
    """Evaluate before the first update."""
    limit_batches: Positive | None = None
    """Use only this many batches of each set (micro_batch_size rows per process each)."""
    keep_best: bool = True
    """Save the weights to out_dir/best whenever the validation loss is the lowest so far."""
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Multiply the learning rate by this when the validation loss stops falling (on top of the schedule). None: off."""
    plateau_patience: NonNegative = 3
    """Evaluations without improvement that are tolerated before the rate is multiplied."""
    plateau_threshold: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    """Relative fall of the loss that counts as an improvement."""
    plateau_cooldown: NonNegative = 0
    """Evaluations after a reduction in which nothing is counted."""
    plateau_min_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Lower bound of the product of all reductions."""
    early_stop_patience: NonNegative | None = None
    """End the run after more than this many evaluations without improvement. None: never."""
    early_stop_min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Fall of the loss (nats per token) that counts as an improvement for early_stop_patience."""

    @property
    def is_on(self) -> bool:
        """Whether there is anything to validate on."""
        return self.path is not None or self.split_fraction > 0

    @model_validator(mode="after")
    def _has_data(self) -> EvalConfig:
        if self.path is not None and self.split_fraction:
            raise ValueError("set one of eval.path and eval.split_fraction, not both")
        controls = self.plateau_factor is not None or self.early_stop_patience is not None or self.at_start
        if not self.is_on and (controls or self.every_n_steps is not None):
            raise ValueError("the eval section has no data: set eval.path, or eval.split_fraction (0.02, say)")
        return self


class CheckpointConfig(Strict):
    """What is saved, when, and what a new start continues from."""

    epoch_save: NonNegative = 1
    """Save the adapter (or the full model) every this many epochs. 0 saves it only at the end of the run."""
    every_n_steps: Positive | None = None
    """Write a resume checkpoint every this many updates. None: only at the end of each epoch."""
    keep_last: Positive = 2
    """Resume checkpoints that are kept; older ones are removed."""
    resume: str = "auto"
    """auto: continue from the newest complete checkpoint in out_dir, if any. none: refuse an out_dir that has one.
    Or the path of a checkpoint folder."""


class TrackingConfig(Strict):
    """Where the numbers of a run go, beside train_log.txt and loss_data.json."""

    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Experiment trackers beside the files in out_dir."""
    project: str = "rwkv_accel"
    """Project name in the trackers."""
    run_name: str | None = None
    """Run name in the trackers. None: the name of out_dir."""
    wandb_mode: Literal["auto", "online", "offline"] = "auto"
    """auto: online when wandb has an API key, else offline (said in one line)."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """auto: a bar on a terminal, plain lines elsewhere."""


class SamplesConfig(Strict):
    """Text generated by the model while it trains and at the end of the run."""

    prompts: tuple[str, ...] = ()
    """User questions; each is put into the chat template and answered. With no prompt nothing is generated."""
    every_n_steps: Positive | None = None
    """Answer the prompts every this many updates. None: only at the end."""
    raw: bool = False
    """Take the prompts as plain text to be continued, without the chat template."""
    max_new_tokens: Positive = 64
    """Length limit of an answer in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus share that is kept when sampling."""


class RunConfig(Strict):
    """One complete run."""

    out_dir: str
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
