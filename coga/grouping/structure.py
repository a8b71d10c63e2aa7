"""Known structure of a text, one integer per byte: what groups can be compared with.

On Python source: the classes of the standard `tokenize` module and the blocks made by indentation. On prose:
words and sentence ends, and sentences. Pure functions of bytes; any bytes are accepted.
"""

from __future__ import annotations

import keyword
import re
import tokenize
import warnings
from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "TOKEN_CLASSES",
    "WORD_CLASSES",
    "indentation_blocks",
    "sentence_blocks",
    "token_classes",
    "word_classes",
]

TOKEN_CLASSES = ("space", "name", "keyword", "number", "string", "comment", "operator", "newline", "other")
WORD_CLASSES = ("space", "word start", "word", "number", "punctuation", "sentence end", "newline", "other")

RESTARTS = 64  # an unterminated string is read to the end of the text: bounds the cost of hopeless input
TAB = 8

# f-strings are one STRING token up to Python 3.11 and parts from 3.12 on.
_STRINGS = {"STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END"}
_STRINGS |= {"TSTRING_START", "TSTRING_MIDDLE", "TSTRING_END"}
_KINDS = {"NUMBER": "number", "COMMENT": "comment", "OP": "operator", "NEWLINE": "newline", "NL": "newline"}

# Every non-ASCII byte becomes a letter, so that columns are bytes and names, strings and comments survive.
_ASCII = bytes(b if b < 128 else ord("x") for b in range(256)).replace(b"\0", b" ")


def _lines(source: bytes) -> list[bytes]:
    return (
        source.splitlines(keepends=True) if b"\r" not in source else re.findall(rb"[^\n]*\n|[^\n]+", source)
    )


def _kind(token: tokenize.TokenInfo) -> str | None:
    name = tokenize.tok_name[token.type]
    if name == "NAME":
        return "keyword" if keyword.iskeyword(token.string) else "name"
    if name in _STRINGS:
        return "string"
    if name == "ERRORTOKEN":
        return None if token.string.isspace() else "other"
    return _KINDS.get(name)


def _tokens(lines: list[str]) -> Iterator[tuple[int, int, int, int, str]]:
    """(row, column, end row, end column, class) with rows from 0; starts afresh after a line that fails."""
    first = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # literals that Python itself warns about
        for _ in range(RESTARTS):
            reached = first
            try:
                for token in tokenize.generate_tokens(partial(next, iter(lines[first:]), "")):
                    kind = _kind(token)
                    reached = max(reached, first + token.end[0] - 1)
                    if kind is not None:
                        yield (
                            first + token.start[0] - 1,
                            token.start[1],
                            first + token.end[0] - 1,
                            token.end[1],
                            kind,
                        )
                return
            except (tokenize.TokenError, SyntaxError):
                first = reached + 1
            if first >= len(lines):
                return


def token_classes(source: bytes) -> NDArray[np.int64]:
    """Class of each byte of Python source, an index into `TOKEN_CLASSES`; white space between tokens is 0.

    Source that does not tokenize gives a partial result: the line that fails is "other" from where the
    tokenizer stopped, and reading starts again on the next line.
    """
    out = np.full(len(source), TOKEN_CLASSES.index("other"), dtype=np.int64)
    plain = source.translate(_ASCII)
    for blank in re.finditer(rb"[ \t\f\r\\]+", plain):
        out[slice(*blank.span())] = 0
    for newline in re.finditer(rb"\r?\n", plain):
        out[slice(*newline.span())] = TOKEN_CLASSES.index("newline")
    lines = _lines(plain)
    start = np.concatenate([[0], np.cumsum([len(line) for line in lines])]).astype(np.int64)
    # A lone carriage return would be read as the end of a line.
    text = [re.sub(rb"\r(?!\n)", b" ", line).decode("ascii") for line in lines]
    for row, column, end_row, end_column, kind in _tokens(text):
        if row >= len(lines):
            continue  # the NEWLINE that the tokenizer adds at the end
        end_row, end_column = (end_row, end_column) if end_row < len(lines) else (len(lines), 0)
        out[start[row] + column : start[end_row] + end_column] = TOKEN_CLASSES.index(kind)
    return out


def indentation_blocks(source: bytes) -> NDArray[np.int64]:
    """Block of each byte, numbered by first appearance: a deeper line opens a block inside the current one.

    A line that returns to an indentation returns to its block; blank lines belong to the block before them.
    """
    out = np.zeros(len(source), dtype=np.int64)
    stack: list[tuple[int, int]] = []  # (width, block)
    last = position = 0
    for line in _lines(source):
        body = line.lstrip(b" \t")
        if body.strip():
            width = len(line[: len(line) - len(body)].expandtabs(TAB))
            while stack and stack[-1][0] > width:
                stack.pop()
            if not stack or stack[-1][0] < width:
                # A text cut inside a block starts with deep lines; shallower ones then open new blocks.
                stack.append((width, last))
                last += 1
        out[position : position + len(line)] = stack[-1][1] if stack else 0
        position += len(line)
    return out


_SENTENCE_END = re.compile(rb"[.!?]+[\"')\]]*(?=\s|\Z)")


def word_classes(text: bytes) -> NDArray[np.int64]:
    """Class of each byte of prose, an index into `WORD_CLASSES`. Bytes above 127 count as letters."""
    out = np.full(len(text), WORD_CLASSES.index("other"), dtype=np.int64)
    patterns = [
        ("space", rb"[ \t\f\v\r]+"),
        ("newline", rb"\r?\n"),
        ("punctuation", rb"[!-/:-@\[-`{-~]"),
        ("number", rb"[0-9]+"),
        ("word", rb"[A-Za-z\x80-\xff]+(?:['-][A-Za-z\x80-\xff]+)*"),
    ]
    for name, pattern in patterns:
        for match in re.finditer(pattern, text):
            out[slice(*match.span())] = WORD_CLASSES.index(name)
            if name == "word":
                out[match.start()] = WORD_CLASSES.index("word start")
    for match in _SENTENCE_END.finditer(text):
        out[slice(*match.span())] = WORD_CLASSES.index("sentence end")
    return out


def sentence_blocks(text: bytes) -> NDArray[np.int64]:
    """Sentence of each byte, counted from 0; a blank line ends a sentence too."""
    out = np.zeros(len(text), dtype=np.int64)
    for match in re.finditer(rb"[.!?]+[\"')\]]*(?=\s|\Z)|\n[ \t\r]*\n", text):
        out[match.end() :] += 1
    return out
