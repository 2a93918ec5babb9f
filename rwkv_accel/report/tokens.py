"""Loss of each token of a few documents under a run's newest weights, and what the model expected in its place.

Shapes: T tokens, C channels, V vocab.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rwkv_accel.config.load import load_config
from rwkv_accel.config.schema import RunConfig
from rwkv_accel.data.corpus import open_corpora, read_documents
from rwkv_accel.data.documents import Document, ReadReport
from rwkv_accel.data.packing import Subset
from rwkv_accel.data.tokenizer import Tokenizer
from rwkv_accel.errors import UserError
from rwkv_accel.generation.loading import default_device, find_source, load_generator_model
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.report.reading import TOKEN_LOSS_FILE
from rwkv_accel.tracking import RUN_FILE

MAX_TOKENS = 1024
NUM_EXPECTED = 3
CHUNK_ROWS = 128
END_OF_TEXT = "<end of text>"


def write_token_losses(folder: Path, num_documents: int) -> Path:
    """Score documents of the validation data, or of the training data when there is none, and keep the result in
    the run's folder, where the report finds it.

    Raises:
        UserError: the run has saved no weights yet, or its data or base model is gone.
    """
    if not (folder / RUN_FILE).is_file():
        raise UserError(f"{folder} holds no {RUN_FILE}, which says where the documents are; leave --tokens out")
    config = load_config(folder / RUN_FILE)
    source = find_source(folder)
    model, tokenizer = load_generator_model(source, device=default_device())
    name, documents = chosen_documents(config, tokenizer)
    scored = [score(model, tokenizer, document) for document in islice(documents, num_documents)]
    weights = source.adapter or source.base.parent
    result = {"weights": f"weights {weights.name}, {name} data", "documents": scored}
    path = folder / TOKEN_LOSS_FILE
    part = path.with_name(f".{path.name}.tmp")
    try:
        part.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def chosen_documents(config: RunConfig, tokenizer: Tokenizer) -> tuple[str, Iterator[Document]]:
    """("validation" or "training", its documents in their order); the first validation set where there are several."""
    data = config.data
    if config.eval.path is not None:
        path = config.eval.path if isinstance(config.eval.path, str) else config.eval.path[0]
        data = data.model_copy(update={"path": path, "weights": None, "max_documents": None})
        return "validation", read_documents(data, tokenizer, ReadReport())
    if config.eval.split_fraction:
        return "validation", _held_out(config, tokenizer)
    return "training", read_documents(data, tokenizer, ReadReport())


def _held_out(config: RunConfig, tokenizer: Tokenizer) -> Iterator[Document]:
    subset = Subset(config.eval.split_fraction, config.trainer.seed, held_out=True)
    for corpus in open_corpora(config.data, tokenizer, lambda action: action()):
        store = corpus.store
        for number in subset.chosen(store.num_documents).nonzero()[0].tolist():
            begin, end = store.offsets[number : number + 2].tolist()
            flags = [True] * (end - begin) if store.is_target is None else store.is_target[begin:end].tolist()
            yield Document(f"{corpus.name} document {number}", store.ids[begin:end].tolist(), flags)


@torch.no_grad()
def score(model: RWKV7, tokenizer: Tokenizer, document: Document) -> dict[str, Any]:
    """The document's first MAX_TOKENS tokens: {text, target, loss, expected: [[text, probability], ...]}.

    The first token has no loss: nothing comes before it.
    """
    ids, flags = document.ids[:MAX_TOKENS], document.is_target[:MAX_TOKENS]
    tokens: list[dict[str, Any]] = [{"text": _text(tokenizer, ids[0]), "target": False, "loss": None}]
    loss_sum, num_targets = 0.0, 0
    if len(ids) > 1:
        ids_T = torch.tensor(ids, device=model.ln_out.weight.device)
        h_TC = model.hidden(ids_T[None, :-1], return_state=False)[0][0]
        for rows in torch.arange(len(ids) - 1, device=ids_T.device).split(CHUNK_ROWS):
            log_p_TV = torch.log_softmax(model.head(h_TC[rows]).float(), -1)
            losses = -log_p_TV.gather(1, ids_T[rows + 1, None])[:, 0]
            best = log_p_TV.topk(min(NUM_EXPECTED, log_p_TV.shape[1]))
            for row, loss, values, expected in zip(
                rows.tolist(), losses.tolist(), best.values.exp().tolist(), best.indices.tolist()
            ):
                is_target = bool(flags[row + 1])
                loss_sum, num_targets = loss_sum + loss * is_target, num_targets + is_target
                tokens.append(
                    {
                        "text": _text(tokenizer, ids[row + 1]),
                        "target": is_target,
                        "loss": round(loss, 6),
                        "expected": [[_text(tokenizer, token), round(p, 5)] for token, p in zip(expected, values)],
                    }
                )
    return {
        "place": document.place,
        "loss": loss_sum / max(num_targets, 1),
        "num_targets": num_targets,
        "num_left_out": len(document.ids) - len(ids),
        "tokens": tokens,
    }


def _text(tokenizer: Tokenizer, token: int) -> str:
    """A token that is a part of a character shows its bytes."""
    if token == tokenizer.eot_id:
        return END_OF_TEXT
    return tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace") or f"<unknown token {token}>"
