"""Soft k-means in each window, from given prototypes.

    m_g <- p_g / |p_g|                                            p: prototypes, m: unit centroids
    steps times:  s[t, g] = softmax_g(beta c_t . m_g)             c: unit contents
                  m_g <- v_g / max(|v_g|, CENTROID_EPS),  v_g = sum_t s[t, g] c_t

Legend: B batch, N windows, W tokens in a window, G groups in a window, C content width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["CENTROID_EPS", "PROTOTYPE_EPS", "refine", "refine_step"]

# A centroid that some token prefers has norm 1 or more before it is normalised. Near zero, where the
# direction means nothing, this bounds the gradient (1 / EPS).
CENTROID_EPS = 1e-6
PROTOTYPE_EPS = 1e-12  # that of `normalize`


def refine_step(unit_BNWC: Tensor, centroid_BNGC: Tensor, beta: float) -> Tensor:
    """The centroids after one step."""
    logits = beta * (unit_BNWC @ centroid_BNGC.transpose(-1, -2))
    total = logits.softmax(-1).transpose(-1, -2) @ unit_BNWC
    return normalize(total, dim=-1, eps=CENTROID_EPS)


def refine(unit_BNWC: Tensor, prototype: Tensor, beta: float, steps: int) -> Tensor:
    """Centroids (B, N, G, C) after `steps` steps, from prototypes (G, C) or (B, N, G, C) of any length.

    Cost: 2 steps products of W x C by C x G a window.
    """
    centroid = normalize(prototype, dim=-1, eps=PROTOTYPE_EPS).expand(*unit_BNWC.shape[:2], -1, -1)
    for _ in range(steps):
        centroid = refine_step(unit_BNWC, centroid, beta)
    return centroid
