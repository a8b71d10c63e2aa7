"""What `inspect_groups.py` shows: the groups of a model's layers on a text, beside other groupings.

The content that a layer groups is caught on its way into the layer's grouping module, so the figures are
about exactly what the model saw; the other groupings get the same content. Reports are plain data.

Legend: N windows, W tokens in a window, G groups in a window, C content width.
"""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coga import CoGAConfig
from coga.config import LayerConfig
from coga.grouping import GroupingContext, build_grouping
from coga.grouping.metrics import (
    TOKEN_CLASSES,
    WORD_CLASSES,
    agreement,
    coherence,
    group_coherence,
    indentation_blocks,
    member_cosines,
    prototype_use,
    sentence_blocks,
    silhouette,
    token_classes,
    word_classes,
)
from coga.models import CoGAGPT

__all__ = [
    "COMPARED",
    "Caught",
    "Structure",
    "catch",
    "glyphs",
    "layer_report",
    "mean_metrics",
    "structure_of",
]

COMPARED = ("contiguous", "random", "kmeans")


@dataclass(frozen=True)
class Caught:
    """What one layer grouped: content and group ids of windows 0..N-1, shares of the prototypes (G,)."""

    layer: LayerConfig
    content_NWC: Tensor
    index_NW: np.ndarray
    usage_G: Tensor | None


@dataclass(frozen=True)
class Structure:
    """Labels of each byte: `classes` (ids into `names`) and `blocks`, with what they are called."""

    kind: str
    classes: np.ndarray
    names: tuple[str, ...]
    blocks: np.ndarray
    class_title: str
    block_title: str


@torch.no_grad()
def catch(model: CoGAGPT, tokens: Tensor) -> list[Caught]:
    """Run the model once on `tokens` (T,): what each layer with groups made of its closed windows."""
    caught: list[Caught] = []
    hooks = []

    def hook_for(layer: LayerConfig):
        def hook(module, inputs, grouping) -> None:
            usage = None if grouping.stats is None else grouping.stats.usage_G
            index = grouping.index_BNW[0].cpu().numpy()
            caught.append(Caught(layer, inputs[0][0].float().cpu(), index, usage))

        return hook

    for block in model.blocks:
        module = getattr(block.attention, "grouping", None)
        if module is not None:
            hooks.append(module.register_forward_hook(hook_for(block.attention.layer)))
    try:
        # The loss path never holds the logits of the whole text.
        model(tokens[None], targets=torch.full_like(tokens[None], -100), return_grouping=True)
    finally:
        for hook in hooks:
            hook.remove()
    for one in caught:
        if not torch.isfinite(one.content_NWC).all():
            raise ValueError(f"layer {one.layer.index}: its content holds values that are not finite")
    return caught


def structure_of(text: bytes, python: bool) -> Structure:
    """Known structure of the text: Python tokens and indentation, or words and sentences."""
    if python:
        titles = ("token classes", "indentation blocks")
        return Structure("Python", token_classes(text), TOKEN_CLASSES, indentation_blocks(text), *titles)
    titles = ("word classes", "sentences")
    return Structure("prose", word_classes(text), WORD_CLASSES, sentence_blocks(text), *titles)


def glyphs(data: bytes) -> list[tuple[str, str]]:
    """How each byte is shown: (text, kind).

    kind  c a character (on its first byte); k a later byte of it, shown as its number; n newline; t tab;
          x a byte that is no valid UTF-8 or a character without a glyph, shown by its code
    """
    out: list[tuple[str, str]] = []
    at = 0
    while at < len(data):
        first = data[at]
        width = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
        try:
            char = data[at : at + width].decode("utf-8")
        except UnicodeDecodeError:
            char = ""
        if len(char) != 1:
            out.append((f"\\x{first:02x}", "x"))
            at += 1
            continue
        if char == "\n":
            out.append(("⏎", "n"))
        elif char == "\t":
            out.append(("⇥", "t"))
        elif not char.isprintable():
            out.append((f"\\x{first:02x}" if first < 0x80 else f"\\u{ord(char):x}", "x"))
        else:
            out.append(("◌" + char if unicodedata.combining(char) else char, "c"))
        out.extend(("₂₃₄"[i], "k") for i in range(width - 1))
        at += width
    return out


def _hue_ranks(mean_GC: np.ndarray, filled: np.ndarray) -> list[int]:
    """Groups around a colour wheel, alike ones next to each other: by angle in their first two components."""
    rank = np.zeros(len(mean_GC), dtype=int)
    if filled.sum() > 2:
        norm = np.linalg.norm(mean_GC, axis=-1, keepdims=True)
        unit = mean_GC / np.where(norm > 0, norm, 1)
        centred = unit - unit[filled].mean(0)
        plane = np.linalg.svd(centred[filled], full_matrices=False)[2][:2]
        place = centred @ plane.T
        angle = np.arctan2(place[:, -1], place[:, 0])
    else:
        angle = np.arange(len(mean_GC), dtype=float)
    rank[np.argsort(np.where(filled, angle, np.inf), kind="stable")] = np.arange(len(mean_GC))
    return rank.tolist()


def _finite(value: float, digits: int = 4) -> float | None:
    return None if not math.isfinite(value) else round(float(value), digits)


def _describe(
    content_WC: Tensor, index_W: np.ndarray, groups: int, labels: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Everything shown about one grouping of one window."""
    content = content_WC.double().numpy()
    metrics: dict[str, float | None] = {k: _finite(v) for k, v in coherence(content, index_W, groups).items()}
    metrics["silhouette"] = _finite(silhouette(content, index_W))
    for name, label in labels.items():
        for key, value in agreement(index_W, label).items():
            metrics[f"{name} {key}"] = _finite(value)
    size = np.bincount(index_W, minlength=groups)
    member = (index_W[:, None] == np.arange(groups)).astype(float)
    mean = member.T @ content / np.maximum(size, 1)[:, None]
    likeness = np.where(
        np.eye(groups, dtype=bool), np.nan, member_cosines(mean, np.arange(groups), groups)[0]
    )
    likeness[:, size == 0] = np.nan
    nearest = [
        int(np.nanargmax(row)) if size[g] and not np.isnan(row).all() else None
        for g, row in enumerate(likeness)
    ]
    return {
        "index": index_W.tolist(),
        "metrics": metrics,
        "coherence": [_finite(x, 3) for x in group_coherence(content, index_W, groups)],
        "nearest": nearest,
        "nearness": [None if m is None else _finite(likeness[g, m], 3) for g, m in enumerate(nearest)],
        "hue": _hue_ranks(mean, size > 0),
    }


@torch.no_grad()
def layer_report(
    config: CoGAConfig, caught: Caught, windows: list[int], structure: Structure
) -> dict[str, Any]:
    """One layer's groups in some windows, its own grouping first, then the others on the same content."""
    layer = caught.layer
    own = layer.grouping
    content = caught.content_NWC[windows]
    context = GroupingContext(
        window_BN=torch.tensor(windows)[None], valid_BN=torch.ones(1, len(windows), dtype=torch.bool)
    )
    index = {own: caught.index_NW[windows]}
    for name in COMPARED:
        if name != own:
            other = build_grouping(config.replace(grouping=name), replace(layer, grouping=name))
            index[name] = other(content[None], context).index_BNW[0].numpy()
    shown = []
    for place, window in enumerate(windows):
        span = slice(window * layer.window, (window + 1) * layer.window)
        labels = {"class": structure.classes[span], "block": structure.blocks[span]}
        groupings = {
            name: _describe(content[place], ids[place], layer.groups, labels) for name, ids in index.items()
        }
        shown.append({"window": window, "groupings": groupings})
    return {
        "layer": layer.index,
        "own": own,
        "window_size": layer.window,
        "group_size": layer.group_size,
        "groups": layer.groups,
        "slots": {name: replace(layer, grouping=name).slots for name in index},
        "use": None if caught.usage_G is None else _finite(prototype_use(caught.usage_G)),
        "windows": shown,
    }


def mean_metrics(report: dict[str, Any], name: str) -> dict[str, float | None]:
    """Metrics of one grouping averaged over the report's windows; None where no window has the figure."""
    rows = [window["groupings"][name]["metrics"] for window in report["windows"]]
    means = {}
    for key in rows[0]:
        values = [row[key] for row in rows if row[key] is not None]
        means[key] = round(sum(values) / len(values), 4) if values else None
    return means
