"""What a model will read and learn: documents token by token, coloured by the loss mask."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator

from rwkv_accel.data.documents import Document
from rwkv_accel.data.tokenizer import Tokenizer

RESET = "\x1b[0m"
# Two shades each, taken in turn, so that the borders of tokens show.
TARGET_SHADES = ("\x1b[1;32m", "\x1b[1;36m")
CONTEXT_SHADES = ("\x1b[2m", "\x1b[2;4m")
END_OF_TEXT = "<end of text>"

STYLE = """
body{font:15px/1.6 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0
1rem;color:#222;background:#fff} pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid
#ddd;border-radius:6px;padding:.8rem} pre
span{border-radius:2px}.t0{background:#b7ebc0}.t1{background:#d6f5dc}.c0{color:#666}.c1{color:#666;background:#f0f0f0}
h2{font-size:1rem;margin:1.5rem 0 .3rem}small{color:#666}
"""


def preview_text(documents: Iterable[Document], tokenizer: Tokenizer, *, colour: bool) -> Iterator[str]:
    """One block of text per document. Without colour, targets stand between the brackets ⟦ and ⟧."""
    for document in documents:
        body = _coloured(document, tokenizer) if colour else _bracketed(document, tokenizer)
        yield f"{_heading(document)}\n{body}\n"
    target = f"{TARGET_SHADES[0]}green{RESET} and {TARGET_SHADES[1]}cyan{RESET}" if colour else "⟦ ⟧"
    yield f"{target}: what the loss counts"


def preview_html(documents: Iterable[Document], tokenizer: Tokenizer) -> str:
    """A page that stands alone; the pointer on a token shows its id."""
    blocks = []
    for document in documents:
        tokens = "".join(
            f'<span class="{"tc"[not flag]}{index % 2}" title="{" ".join(map(str, ids))}">{html.escape(text)}</span>'
            for index, (ids, flag, text) in enumerate(_tokens(document, tokenizer))
        )
        blocks.append(f"<h2>{html.escape(_heading(document))}</h2>\n<pre>{tokens}</pre>")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Data preview</title><style>{STYLE}</style>\n'
        "<h1>Data preview</h1>\n<p><small>Green: targets of the loss. Grey: context. The pointer on a token shows "
        "its id.</small></p>\n" + "\n".join(blocks) + "\n</html>\n"
    )


def _heading(document: Document) -> str:
    # The first token is never predicted, whatever its flag.
    return f"{document.place}: {len(document.ids)} tokens, {sum(document.is_target[1:])} targets"


def _tokens(document: Document, tokenizer: Tokenizer) -> Iterator[tuple[list[int], bool, str]]:
    """(ids, is target, text) of each token; tokens that only together make a character come together."""
    group: list[int] = []
    last = len(document.ids) - 1
    for index, (token, flag) in enumerate(zip(document.ids, document.is_target)):
        if token == tokenizer.eot_id:
            yield [token], flag, END_OF_TEXT if index == last else f"{END_OF_TEXT}\n"
            continue
        group.append(token)
        data = tokenizer.decode_bytes(group)
        joins = index < last and document.is_target[index + 1] == flag and document.ids[index + 1] != tokenizer.eot_id
        if joins and _is_cut(data):
            continue
        yield group, flag, data.decode("utf-8", errors="backslashreplace") if data else f"<unknown token {token}>"
        group = []


def _is_cut(data: bytes) -> bool:
    """Whether the bytes end within a character."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def _coloured(document: Document, tokenizer: Tokenizer) -> str:
    parts = []
    for index, (_, flag, text) in enumerate(_tokens(document, tokenizer)):
        shade = (TARGET_SHADES if flag else CONTEXT_SHADES)[index % 2]
        # A style that runs over a line end would colour the rest of the line.
        parts.append("\n".join(f"{shade}{line}{RESET}" if line else "" for line in _printable(text).split("\n")))
    return "".join(parts)


def _bracketed(document: Document, tokenizer: Tokenizer) -> str:
    parts, inside = [], False
    for _, flag, text in _tokens(document, tokenizer):
        if flag != inside:
            parts.append("⟦" if flag else "⟧")
            inside = flag
        parts.append(_printable(text))
    return "".join(parts) + ("⟧" if inside else "")


def _printable(text: str) -> str:
    """Control characters as escapes: data must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
