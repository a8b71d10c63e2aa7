"""Text as streams of tokens: bytes of Python's own source, of a file or of a folder; or tokenizer ids.

    corpus = load_corpus("python", length=32768)        # or a path to a file or a folder of text
    tokens_BT, targets_BT = batches(corpus, 32768, batch=1, seed=0, step=17)

The default corpus needs no download: the source of the running interpreter's standard library, whole packages
in sorted order, about 12 MB. A context is drawn inside one package (or file) wherever that is long enough, so
that far tokens belong to the same text. Packages are split, not lines: nothing of a validation package is
trained on. `batches` is a pure function of its arguments, so a resumed run draws what an unbroken one would.

A single file stays memory-mapped. A folder or the standard library is read once into one array.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Corpus", "Stream", "batches", "contexts", "load_corpus", "unigram_entropy"]

Array = NDArray[np.generic]
VALIDATION = 0.05  # share of the bytes, rounded up to whole packages
SKIPPED = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})
BLOCK = 2**24


@dataclass(frozen=True)
class Stream:
    """Tokens of one split, with the documents (packages, files) they come from.

    tokens   (n,) uint8, or a wider unsigned type with a tokenizer
    start    (documents + 1,) where each document starts, and the end of the last
    names    of the documents; bytes: size of the text the tokens stand for
    entropy  of its bytes, in bits per byte, where the tokens are ids
    """

    tokens: Array
    start: NDArray[np.int64]
    names: tuple[str, ...]
    bytes: int
    entropy: float = float("nan")

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Corpus:
    """A text split into train and validation.

    name     "python" or the path; version: of the interpreter whose library it is, else empty
    sha256   of the documents' names and bytes and of the split
    tokenizer   a `tokenizers.Tokenizer`, or None when tokens are bytes
    """

    name: str
    version: str
    sha256: str
    train: Stream
    validation: Stream
    vocab_size: int = 256
    tokenizer: Any = None

    def describe(self) -> str:
        """One line: name, version, sizes and the start of the hash."""
        version = f" {self.version}" if self.version else ""
        return (
            f"{self.name}{version}: {self.train.bytes / 1e6:.2f} MB train, "
            f"{self.validation.bytes / 1e6:.2f} MB validation "
            f"({len(self.train.names)} + {len(self.validation.names)} documents), sha256 {self.sha256[:16]}"
        )

    def text(self, tokens: list[int]) -> str:
        """Tokens as text; what is no UTF-8, or no byte, shows as U+FFFD."""
        if self.tokenizer is not None:
            return self.tokenizer.decode(tokens)
        return b"".join(bytes([t]) if t < 256 else b"\xff" for t in tokens).decode("utf-8", "replace")


def unigram_entropy(text: bytes | Array) -> float:
    """H = -sum_b p_b log2 p_b over byte values b, in bits per byte: what the frequencies alone give."""
    array = np.frombuffer(text, dtype=np.uint8) if isinstance(text, bytes) else np.asarray(text)
    if array.dtype != np.uint8 or array.size == 0:
        raise ValueError(f"text={array.size} values of {array.dtype}: must be bytes, and at least one")
    count = np.zeros(256, dtype=np.int64)
    for first in range(0, array.size, BLOCK):
        count += np.bincount(array[first : first + BLOCK], minlength=256)
    share = count[count > 0] / array.size
    return float((share * -np.log2(share)).sum()) + 0.0  # no negative zero


# --- reading ---------------------------------------------------------------------------------------------


def _files(folder: Path, suffix: str = "", skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below `folder` in sorted order, without hidden ones and links to folders."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            if entry.name not in skipped and not entry.name.startswith("."):
                yield from _files(entry, suffix, skipped)
        elif entry.is_file() and entry.name.endswith(suffix) and not entry.name.startswith("."):
            yield entry


def _python_documents() -> list[tuple[str, bytes]]:
    """Top-level packages and modules of the standard library, each as one text."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = []
    for entry in sorted(folder.iterdir()):
        # Names that are no identifiers hold the build's settings and differ between machines.
        if entry.is_dir() and entry.name.isidentifier() and entry.name not in SKIPPED:
            found.append((entry.name, b"".join(path.read_bytes() for path in _files(entry, ".py", SKIPPED))))
        elif entry.suffix == ".py" and entry.stem.isidentifier():
            found.append((entry.name, entry.read_bytes()))
    found = [(name, text) for name, text in found if text]
    if not found:
        raise ValueError(f"data='python': no source of the standard library in {folder}; use a path to text")
    return found


def _folder_documents(folder: Path) -> list[tuple[str, bytes]]:
    found = [(str(path.relative_to(folder)), path.read_bytes()) for path in _files(folder)]
    found = [(name, text) for name, text in found if text]
    if not found:
        raise ValueError(f"data={str(folder)!r}: must hold at least one file that is not empty")
    return found


def _validation_names(documents: list[tuple[str, bytes]], least: int) -> set[str]:
    """Whole documents, drawn by the hash of their names, that make up the validation share.

    The order is the same everywhere; a document much larger than the share is passed over, so that one
    package cannot take half of the text. Empty when whole documents cannot give both splits `least` bytes.
    """
    total = sum(len(text) for _, text in documents)
    goal = max(VALIDATION * total, least)
    order = sorted(
        documents, key=lambda one: hashlib.sha256(one[0].encode(errors="surrogateescape")).digest()
    )
    chosen: set[str] = set()
    size = 0
    for name, text in order:
        if size < goal and size + len(text) <= 2 * goal:
            chosen.add(name)
            size += len(text)
    return chosen if size >= least and total - size >= least else set()


def _stream(documents: list[tuple[str, bytes]]) -> Stream:
    """Documents one after the other."""
    sizes = [len(text) for _, text in documents]
    tokens = np.frombuffer(b"".join(text for _, text in documents), dtype=np.uint8)
    start = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    return Stream(tokens, start, tuple(name for name, _ in documents), sum(sizes))


def _cut_stream(stream: Stream, least: int, name: str) -> tuple[Stream, Stream]:
    """The last 5% (at least `least` bytes) as validation: for one file, or too few files to split."""
    size = len(stream)
    if size < 2 * least:
        raise ValueError(
            f"data={name!r}: holds {size} bytes, must hold at least {2 * least}: "
            f"n + 1 = {least} to train on and as many to validate on"
        )
    cut = size - max(int(VALIDATION * size), least)
    return _slice(stream, 0, cut), _slice(stream, cut, size)


def _slice(stream: Stream, first: int, last: int) -> Stream:
    kept = [
        (name, max(int(a), first), min(int(b), last))
        for name, a, b in zip(stream.names, stream.start[:-1], stream.start[1:])
        if a < last and b > first
    ]
    start = np.array([a - first for _, a, _ in kept] + [last - first], dtype=np.int64)
    return Stream(stream.tokens[first:last], start, tuple(name for name, _, _ in kept), last - first)


def _sha256(train: Stream, validation: Stream) -> str:
    digest = hashlib.sha256()
    for stream in (train, validation):
        digest.update(repr((stream.names, stream.start.tolist())).encode())
        for first in range(0, len(stream), BLOCK):
            digest.update(stream.tokens[first : first + BLOCK].tobytes())
    return digest.hexdigest()


def load_corpus(data: str | os.PathLike[str] = "python", *, length: int = 1, tokenizer: str = "") -> Corpus:
    """Read and split a corpus whose splits can each fill a context of `length` tokens.

    data       "python", or a path to a file (its last 5% validates) or a folder (whole files validate)
    length     n, tokens of a context; each split holds at least n + 1
    tokenizer  path to a tokenizer.json (`pip install 'coga[text]'`); empty for bytes
    Raises ValueError (field, value, rule) when the text is missing, empty or too short.
    """
    if length < 1:
        raise ValueError(f"length={length}: must be at least 1")
    least, name, version = length + 1, os.fspath(data), ""
    try:
        if name == "python":
            version = platform.python_version()
            documents = _python_documents()
        elif Path(name).is_dir():
            documents = _folder_documents(Path(name))
        elif Path(name).is_file():
            if Path(name).stat().st_size == 0:
                raise ValueError(f"data={name!r}: must not be empty")
            mapped = np.memmap(name, dtype=np.uint8, mode="r")
            whole = Stream(mapped, np.array([0, mapped.size]), (Path(name).name,), mapped.size)
            return _finish(name, "", *_cut_stream(whole, least, name), tokenizer, length)
        else:
            raise ValueError(f"data={name!r}: must be 'python' or an existing file or folder")
    except OSError as error:
        raise ValueError(f"data={name!r}: cannot be read ({error})") from error
    held_out = _validation_names(documents, least)
    if held_out:
        train = _stream([one for one in documents if one[0] not in held_out])
        validation = _stream([one for one in documents if one[0] in held_out])
    else:
        train, validation = _cut_stream(_stream(documents), least, name)
    return _finish(name, version, train, validation, tokenizer, length)


def _finish(name: str, version: str, train: Stream, validation: Stream, path: str, length: int) -> Corpus:
    sha256 = _sha256(train, validation)
    if not path:
        return Corpus(name, version, sha256, train, validation)
    tool = _read_tokenizer(path)
    train, validation = _encode(tool, train), _encode(tool, validation)
    for stream in (train, validation):
        if len(stream) <= length:
            raise ValueError(
                f"data={name!r}: holds {len(stream)} tokens in a split, must be above n={length}"
            )
    return Corpus(name, version, sha256, train, validation, tool.get_vocab_size(), tool)


# --- tokenizers (optional extra) ---------------------------------------------------------------------------


def _read_tokenizer(path: str):
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError(f"tokenizer={path!r}: needs `pip install 'coga[text]'`") from error
    if not Path(path).is_file():
        raise ValueError(f"tokenizer={path!r}: must be an existing tokenizer.json")
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer={path!r}: cannot be read ({error})") from error


def _encode(tool, stream: Stream) -> Stream:
    """Ids of each document; bytes that are no UTF-8 become U+FFFD."""
    kind = np.uint16 if tool.get_vocab_size() <= 2**16 else np.uint32
    parts = [
        np.array(tool.encode(bytes(stream.tokens[a:b]).decode("utf-8", "replace")).ids, dtype=kind)
        for a, b in zip(stream.start[:-1], stream.start[1:])
    ]
    start = np.concatenate([[0], np.cumsum([len(x) for x in parts], dtype=np.int64)])
    return Stream(np.concatenate(parts), start, stream.names, stream.bytes, unigram_entropy(stream.tokens))


# --- sampling ----------------------------------------------------------------------------------------------


def _cut(stream: Stream, starts: list[int], length: int) -> tuple[Tensor, Tensor]:
    rows = np.stack([stream.tokens[a : a + length + 1] for a in starts]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _check(stream: Stream, length: int, batch: int) -> None:
    if batch < 1:
        raise ValueError(f"batch={batch}: must be at least 1")
    if not 1 <= length < len(stream):
        raise ValueError(f"length={length}: must be between 1 and the split's tokens - 1 = {len(stream) - 1}")


def batches(corpus: Corpus, length: int, batch: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Tokens and next tokens, (B, T) int64, of training step `step`: a pure function of its arguments.

    A uniform position picks the document, so that long ones are drawn in proportion; the context then starts
    anywhere it fits inside that document, or at the start of one that is too short and runs into the next.
    """
    stream = corpus.train
    _check(stream, length, batch)
    # The second word keeps steps of one seed apart from another seed's.
    draw = np.random.default_rng([seed % 2**63, step])
    starts = []
    for _ in range(batch):
        point, share = draw.random(2)
        document = int(np.searchsorted(stream.start, int(point * len(stream)), side="right")) - 1
        first, last = int(stream.start[document]), int(stream.start[document + 1])
        room = last - first - length
        start = first + int(share * room) if room > 0 else first
        starts.append(min(start, len(stream) - length - 1))
    return _cut(stream, starts, length)


def contexts(corpus: Corpus, length: int, count: int) -> tuple[Tensor, Tensor]:
    """Fixed validation contexts, (count, T) each: spread evenly, inside the longest documents first.

    Documents that can hold a whole context come first, longest first; what is still missing is spread evenly
    over the validation stream.
    """
    stream = corpus.validation
    _check(stream, length, count)
    size = np.diff(stream.start)
    order = np.argsort(-size, kind="stable")
    starts = [int(stream.start[i]) for i in order if size[i] > length][:count]
    missing = count - len(starts)
    room = len(stream) - length - 1
    starts += [room * i // max(1, missing) for i in range(missing)]
    return _cut(stream, starts, length)
