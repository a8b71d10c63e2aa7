"""Synthetic recall: sequences whose answers stand far back, and which of them a local model could know.

    pair      a key and the value after it; keys of a sequence are distinct, values uniform. Fused, a pair is
              one token of its own (and one of filler): then a single attention hop finds the answer, where
              key and value apart need two, which tiny models did not learn in a million tokens
    query     the key again; what comes next must be its value. Each key is asked once, so that no later
              query finds its answer nearby
    filler    uniform noise tokens; keys, values, noise and fused pairs have ids of their own, in this order

    mqar      pairs | queries of a quarter of the pairs | filler | queries of the others, at the very end
    scattered pairs and their queries anywhere, in this order
    needle    a pair at a depth (0 the start, 1 right before the question), other pairs anywhere, one query
              as the last token

A local layer in window w reads windows w-1 and w. So a query with its pair in an earlier window is *beyond*
the window, and one with its pair where no chain of n_layer local layers leads is *out of reach*: a model of
local layers alone knows nothing of its answer, and 1/values is the most it can score.

Legend: B rows, T tokens, Q queries of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from _common import precision
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from coga import CoGAConfig
from coga.models import CoGAGPT

__all__ = ["Row", "Vocabulary", "classes", "mqar", "needle", "recalled", "scattered", "stack"]

Ints = NDArray[np.int64]
ANSWERED_EARLY = 4  # one in so many pairs is asked right after the pairs


@dataclass(frozen=True)
class Vocabulary:
    keys: int
    values: int
    noise: int
    fused: bool = False

    @property
    def plain(self) -> int:
        """How many ids stand for a single thing."""
        return self.keys + self.values + self.noise

    @property
    def size(self) -> int:
        return self.plain + (self.keys * self.values if self.fused else 0)

    def fuse(self, key: Ints, value: Ints) -> Ints:
        """Ids of fused pairs."""
        return self.plain + key * self.values + value - self.keys


@dataclass(frozen=True)
class Row:
    """tokens (T,); positions of the asked keys (Q,), of what holds the answers (Q,), and the answers (Q,)."""

    tokens: Ints
    query: Ints
    pair: Ints
    answer: Ints


def _filler(draw: np.random.Generator, vocab: Vocabulary, length: int) -> Ints:
    return draw.integers(vocab.keys + vocab.values, vocab.plain, length)


def _draw_pairs(draw: np.random.Generator, vocab: Vocabulary, pairs: int) -> tuple[Ints, Ints]:
    key = draw.permutation(vocab.keys)[:pairs]
    return key, draw.integers(vocab.keys, vocab.keys + vocab.values, pairs)


def _state(tokens: Ints, at: Ints, key: Ints, value: Ints, vocab: Vocabulary) -> Ints:
    """Write pairs from each position on; where their values can be read."""
    if vocab.fused:
        tokens[at] = vocab.fuse(key, value)
        return at
    _write(tokens, at, key, value)
    return at + 1


def _write(tokens: Ints, at: Ints, key: Ints, value: Ints) -> None:
    """Key and value from each position on; a value that would fall behind the end is left out."""
    tokens[at] = key
    inside = at + 1 < len(tokens)
    tokens[at[inside] + 1] = value[inside]


def mqar(draw: np.random.Generator, vocab: Vocabulary, length: int, pairs: int) -> Row:
    """Multi-query associative recall over `length` >= 4 `pairs` tokens."""
    tokens = _filler(draw, vocab, length)
    key, value = _draw_pairs(draw, vocab, pairs)
    place = _state(tokens, 2 * np.arange(pairs), key, value, vocab)
    order = draw.permutation(pairs)
    early = pairs // ANSWERED_EARLY
    query = np.concatenate(
        [2 * pairs + 2 * np.arange(early), length - 2 * (pairs - early) + 2 * np.arange(pairs - early)]
    )
    _write(tokens, query, key[order], value[order])
    return Row(tokens, query, place[order], value[order])


def scattered(draw: np.random.Generator, vocab: Vocabulary, length: int, pairs: int) -> Row:
    """Pairs and queries on random places of two tokens, a pair before its query; `length` >= 4 `pairs`."""
    tokens = _filler(draw, vocab, length)
    key, value = _draw_pairs(draw, vocab, pairs)
    slots = 2 * draw.permutation(length // 2)[: 2 * pairs].reshape(2, pairs) + length % 2
    first, second = np.sort(slots, 0)
    place = _state(tokens, first, key, value, vocab)
    _write(tokens, second, key, value)
    return Row(tokens, second, place, value)


def needle(draw: np.random.Generator, vocab: Vocabulary, length: int, depth: float, pairs: int) -> Row:
    """One question, as the last token, about the pair at `depth`; `length` >= 2 `pairs` + 1."""
    tokens = _filler(draw, vocab, length)
    key, value = _draw_pairs(draw, vocab, pairs)
    slots = (length - 1) // 2
    own = round(depth * (slots - 1))
    other = draw.permutation(slots - 1)[: pairs - 1]
    other = other + (other >= own)
    offset = (length - 1) % 2  # the last place ends right before the question
    place = _state(tokens, 2 * np.concatenate([[own], other]) + offset, key, value, vocab)
    tokens[-1] = key[0]
    return Row(tokens, np.array([length - 1]), place[:1], value[:1])


def stack(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, T): the value after each asked key, -100 elsewhere."""
    tokens = np.stack([row.tokens for row in rows])
    targets = np.full_like(tokens, -100)
    for target, row in zip(targets, rows):
        target[row.query] = row.answer
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def classes(row: Row, config: CoGAConfig) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(Q,) beyond the window of every layer; (Q,) out of reach of all layers together, were they local."""
    windows = [config.layer(i).window for i in range(config.n_layer)]
    lowest = np.min([np.maximum(0, row.query // w - 1) * w for w in windows], 0)
    reached = row.query
    for window in reversed(windows):
        reached = np.maximum(0, reached // window - 1) * window
    return row.pair < lowest, row.pair < reached


@torch.no_grad()
def recalled(model: CoGAGPT, rows: Sequence[Row], device: torch.device, tokens_at_once: int) -> list[Ints]:
    """For each row whether the most likely next token is the value asked for, (Q,) 0 or 1.

    Logits are made for the asked positions only.
    """
    hidden: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    was_training = model.training
    model.eval()
    found: list[Ints] = []
    batch = max(1, tokens_at_once // len(rows[0].tokens))
    try:
        for first in range(0, len(rows), batch):
            part = rows[first : first + batch]
            tokens = stack(part)[0].to(device)
            with precision(device):
                model(tokens, targets=torch.full_like(tokens, -100))
                x_BTD = hidden.pop()
                for x_TD, row in zip(x_BTD, part):
                    logits = linear(x_TD[torch.from_numpy(row.query).to(device)], model.head_weight)
                    best = logits.argmax(-1).cpu().numpy()
                    found.append((best == row.answer).astype(np.int64))
    finally:
        hook.remove()
        model.train(was_training)
    return found
