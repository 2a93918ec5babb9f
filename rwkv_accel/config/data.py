"""The section `data`: where the text comes from and how it becomes rows of tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rwkv_accel.config.base import PathText, PathTexts, Positive, Strict


class DataConfig(Strict):
    """Where the text comes from and how it becomes rows of tokens."""

    path: PathTexts
    """Training data, read in this order: .jsonl (one JSON object per line), .txt (documents split at runs of three
    newlines), .parquet, .arrow, .csv, .json, a folder of Dataset.save_to_disk, binidx (name.bin, with name.idx beside
    it), or hub:owner/name. Files may be URLs that fsspec knows (s3://, hf://, https://), binidx excepted."""
    split: str = "train"
    """hub and folders of several splits: the split to read."""
    subset: str | None = None
    """hub: the configuration of a data set that has several."""
    streaming: bool = False
    """Read while training: nothing is downloaded, counted or cached first, any file, URL or hub name may be endless.
    There are no epochs, so set trainer.max_steps; a source that ends starts again. With max_documents: read that many
    documents through the network before the first step, and train on them as on a file."""
    stream_block: Positive = 4096
    """streaming: documents that are read, shuffled and packed together."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Mix the paths: relative share of the rows that each gives, one number per path. An epoch has as many rows as
    all paths together; a path with a larger share than it has rows is read again, in another order. streaming:
    relative share of the tokens."""
    text_column: str = "text"
    """Column with a whole document."""
    messages_column: str = "messages"
    """Column with a list of {role, content} turns (or of {from, value}, as in the column `conversations`)."""
    prompt_column: str | None = None
    """Column with the prompt; goes with response_column and wins over the other columns."""
    response_column: str | None = None
    """Column with the reply, the only target."""
    template: PathText = "rwkv"
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
    `Assistant: <think`. drop: left out. fast (template rwkv only): as keep, and replies without it follow an empty
    think block."""
    tokenizer: PathText = "world"
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
    cache_dir: Annotated[PathText | None, Field(validate_default=True)] = "~/.cache/rwkv_accel/data"
    """Folder for the tokens of large sources (32 MB and more) and for the rows of large sets, found again by content
    and settings. None: tokenise at every start, in every process."""

    @property
    def shown_path(self) -> str:
        """The path or paths in a message."""
        return self.path if isinstance(self.path, str) else ", ".join(self.path)

    @property
    def is_endless(self) -> bool:
        """Whether the data is read while training, without a number of rows."""
        return self.streaming and self.max_documents is None

    @model_validator(mode="after")
    def _columns_pair(self) -> DataConfig:
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError("data.prompt_column and data.response_column go together: set both or none")
        return self

    @model_validator(mode="after")
    def _template_knows_fast(self) -> DataConfig:
        if self.thinking == "fast" and self.template != "rwkv":
            raise ValueError(f"data.thinking fast is a form of data.template rwkv, not of {self.template}; use keep")
        return self

    @model_validator(mode="after")
    def _orders_fit(self) -> DataConfig:
        num_paths = 1 if isinstance(self.path, str) else len(self.path)
        if self.weights is not None and len(self.weights) != num_paths:
            raise ValueError(f"data.weights has {len(self.weights)} numbers for {num_paths} paths; give one per path")
        if self.is_endless and (self.packing == "bucket" or self.sampling == "magic_prime"):
            key = "packing bucket" if self.packing == "bucket" else "sampling magic_prime"
            raise ValueError(f"data.{key} needs all rows at once; with data.streaming use packing pack or pad")
        fixed = "data.packing bucket" if self.packing == "bucket" else ""
        fixed = "data.weights" if self.weights is not None else fixed
        if fixed and not self.shuffle and not self.is_endless:
            raise ValueError(f"{fixed} decides the order of rows; set data.shuffle=true")
        if self.packing == "bucket" and self.weights is not None:
            raise ValueError("data.packing bucket sorts all rows by length; with data.weights use pack or pad")
        if self.sampling == "magic_prime" and (num_paths != 1 or self.max_documents or not self.shuffle):
            raise ValueError(
                "data.sampling magic_prime reads one whole binidx in its own order: give one path, "
                "no data.max_documents, and leave data.shuffle true"
            )
        return self
