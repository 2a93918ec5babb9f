"""The section `peft`: what is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rwkv_accel.config.base import NonNegative, PathText, Positive, Strict

Parts = Literal["emb", "head", "ln", "vectors", "lowrank"]
ADAPTER_METHODS = ("lora", "dora", "pissa", "miss")
LINEAR_TARGETS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")


class PeftConfig(Strict):
    """What is trained: an adapter of some method, extra parts of the base, or everything."""

    method: Literal["lora", "dora", "pissa", "miss", "state", "parts", "full"] = "lora"
    """lora: low-rank adapters (arXiv 2106.09685). dora: the same with a trained magnitude per output row (arXiv
    2402.09353). pissa: adapters from the leading singular vectors, on the residual base (arXiv 2404.02948). miss: one
    small matrix repeated over the blocks of each weight (arXiv 2409.15371). state: only the initial WKV state. parts:
    only train_parts and train_patterns. full: every parameter."""
    rank: Positive = 32
    """Rank R of the adapters; with miss its block size."""
    rank_pattern: dict[str, Positive] = {}  # noqa: RUF012 (pydantic copies defaults)
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
    state_prompt: Annotated[str, Field(min_length=1)] | None = None
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
    load_path: PathText | None = None
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
