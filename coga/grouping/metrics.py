"""How good groups are: do they stay, are they used, are they coherent, do they follow the text's structure.

    flip rate      1 - max over one-to-one maps of ids of |{t : map(before_t) = after_t}| / W
    prototype use  exp(H(usage)) / G, the perplexity of the prototypes' shares over their number
    coherence      cos(content, mean of its own group) against cos(content, mean of another group)
    silhouette     (b - a) / max(a, b) with cosine distances, from scikit-learn
    agreement      adjusted mutual information and homogeneity against labels, from scikit-learn

Group ids mean something within one window only, so everything is computed window by window and averaged.
A token belongs to its own group's mean, so even random groups have `inside` above `between`: read both
beside the same figures for random and contiguous groups. Nothing here has a gradient; tensors of any device
and arrays are accepted. Structure of a text (labels) is in `coga.grouping.structure`.

Legend: N windows, W tokens in a window, G groups in a window, C content width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_mutual_info_score, homogeneity_score, silhouette_score
from torch import Tensor

from coga.grouping.structure import (
    TOKEN_CLASSES,
    WORD_CLASSES,
    indentation_blocks,
    sentence_blocks,
    token_classes,
    word_classes,
)

__all__ = [
    "TOKEN_CLASSES",
    "WORD_CLASSES",
    "agreement",
    "coherence",
    "flip_rate",
    "group_coherence",
    "indentation_blocks",
    "member_cosines",
    "prototype_use",
    "sentence_blocks",
    "silhouette",
    "token_classes",
    "word_classes",
]

Array = NDArray[Any]


def _numpy(value: Tensor | ArrayLike) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
    return np.asarray(value)


def _ids(value: Tensor | ArrayLike, groups: int | None, name: str) -> Array:
    """Group ids as (N, W) integers, each in 0..groups-1."""
    ids = np.atleast_2d(_numpy(value))
    if ids.ndim != 2:
        raise ValueError(f"{name} of shape {ids.shape}: must be (W,) or (N, W)")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name} of type {ids.dtype}: must be integers")
    if groups is not None and ids.size and (ids.min() < 0 or ids.max() >= groups):
        raise ValueError(f"{name} holds {ids.min()}..{ids.max()}: must be in 0..{groups - 1}")
    return ids


def flip_rate(before: Tensor | ArrayLike, after: Tensor | ArrayLike, groups: int) -> float:
    """Share of tokens that changed group, ids matched one to one as well as they can be, per window.

    before, after  (N, W) or (W,) group ids of the same tokens at two moments
    """
    old, new = _ids(before, groups, "before"), _ids(after, groups, "after")
    if old.shape != new.shape or old.size == 0:
        raise ValueError(f"after of shape {new.shape}: must match before, {old.shape}, and not be empty")
    kept = 0
    for row, column in zip(old, new):
        table = np.zeros((groups, groups), dtype=np.int64)
        np.add.at(table, (row, column), 1)
        kept += table[linear_sum_assignment(table, maximize=True)].sum()
    return float(1 - kept / old.size)


def prototype_use(usage_G: Tensor | ArrayLike) -> float:
    """Perplexity of the prototypes' shares over G: 1 when all are used alike, 1/G when one takes all."""
    usage = _numpy(usage_G).astype(np.float64)
    if usage.ndim != 1 or usage.size == 0:
        raise ValueError(f"usage_G of shape {usage.shape}: must be (G,) with G >= 1")
    if not (np.isfinite(usage).all() and (usage >= 0).all() and usage.sum() > 0):
        raise ValueError("usage_G: shares must be finite, at least 0, and not all 0")
    share = usage / usage.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()) / usage.size)


def _unit(x: Array) -> Array:
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def member_cosines(content_NWC: Tensor | ArrayLike, index_NW: Tensor | ArrayLike, groups: int) -> Array:
    """cos(content of token, mean of group), (N, W, G); NaN where the group is empty."""
    content = _numpy(content_NWC).astype(np.float64)
    content = content[None] if content.ndim == 2 else content
    index = _ids(index_NW, groups, "index_NW")
    if content.ndim != 3 or content.shape[:2] != index.shape:
        raise ValueError(
            f"content_NWC of shape {content.shape}: must be (N, W, C) with (N, W) = {index.shape}"
        )
    member = index[..., None] == np.arange(groups)
    mean = np.einsum(
        "nwg,nwc->ngc", member.astype(np.float64), content
    )  # the cosine needs no division by size
    cosine = np.einsum("nwc,ngc->nwg", _unit(content), _unit(mean))
    return np.where(member.any(1)[:, None], cosine, np.nan)


def coherence(content_NWC: Tensor | ArrayLike, index_NW: Tensor | ArrayLike, groups: int) -> dict[str, float]:
    """Mean cosine of tokens to their own group's mean and to the other groups' means of their window.

    Returns `inside` and `between`; `between` is NaN when no window has a second group.
    """
    cosine = member_cosines(content_NWC, index_NW, groups)
    own = _ids(index_NW, groups, "index_NW")[..., None] == np.arange(groups)
    other = cosine[~own & ~np.isnan(cosine)]
    return {
        "inside": float(cosine[own].mean()) if own.any() else float("nan"),
        "between": float(other.mean()) if other.size else float("nan"),
    }


def group_coherence(content_WC: Tensor | ArrayLike, index_W: Tensor | ArrayLike, groups: int) -> Array:
    """Mean cosine of each group's members to their mean, (G,); NaN for an empty group."""
    cosine = member_cosines(content_WC, index_W, groups)[0]
    index = _ids(index_W, groups, "index_W")[0]
    return np.array([cosine[index == g, g].mean() if (index == g).any() else np.nan for g in range(groups)])


def silhouette(content_WC: Tensor | ArrayLike, index_W: Tensor | ArrayLike) -> float:
    """Silhouette of one window's groups under cosine distance, in [-1, 1].

    NaN where it is not defined: a single group, or as many groups as tokens.
    """
    content = _numpy(content_WC).astype(np.float64)
    index = _ids(index_W, None, "index_W")[0]
    if content.shape[:-1] != index.shape:
        raise ValueError(f"content_WC of shape {content.shape}: must be (W, C) with W = {index.size}")
    if not 2 <= np.unique(index).size <= index.size - 1:
        return float("nan")
    return float(silhouette_score(content, index, metric="cosine"))


def agreement(index: Tensor | ArrayLike, labels: Tensor | ArrayLike) -> dict[str, float]:
    """How far groups follow labels: `ami` (0 at chance, 1 when equal) and `homogeneity` (1: pure groups).

    index, labels  (W,) or (N, W); the mean over windows. A window whose tokens all carry one label tells
    nothing and is left out; NaN when no window is left.
    """
    ids, marks = _ids(index, None, "index"), _ids(labels, None, "labels")
    if ids.shape != marks.shape:
        raise ValueError(f"labels of shape {marks.shape}: must match index, {ids.shape}")
    pairs = [(row, mark) for row, mark in zip(ids, marks) if np.unique(mark).size > 1]
    if not pairs:
        return {"ami": float("nan"), "homogeneity": float("nan")}
    ami = [adjusted_mutual_info_score(mark, row) for row, mark in pairs]
    pure = [homogeneity_score(mark, row) for row, mark in pairs]
    return {"ami": float(np.mean(ami)), "homogeneity": float(np.mean(pure))}
