"""Which heads the selection of groups listens to.

A token scores far groups with one query, a weighted sum of those of its heads:

    index_q_t = sum_h w_h q_th

The mean (w_h = 1/H) lets many heads that look everywhere outvote the few that look for one token. What the
weights should find are the tokens on which some head sets most of its attention:

    a_tj = sum_h p_thj^3       p: attention to all of the past and the sink, j: in windows <= w - 2
    loss = sum_tj a_tj (log(a_tj / sum_j a_tj) - log softmax_j(index_q_t . c_j)) / sum_tj a_tj

over evenly spaced tokens t. Cubes count what the sharpest head is sure of; only w gets a gradient. p leaves
out the reciprocal term. Source: the index of DeepSeek-V3.2 (2025) is taught by the sum of the heads'
attention, sum_h p; why not here: docs/findings.md.

Legend: B batch, T tokens, n tokens that are asked, H heads, L latent width, W window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coga.kernels.reference import wide

__all__ = ["asked", "divergence", "index_loss", "index_query"]

SHARPNESS = 3
QUERIES, SCORES = 64, 2**19  # tokens of a row that are asked, at least LEAST; a head's scores in all rows
LEAST = 8


def index_query(q_BTHL: Tensor, index_H: Tensor | None) -> Tensor:
    """(B, T, L): the queries of all heads, weighted; their mean where there are no weights."""
    if index_H is None:
        return q_BTHL.mean(2)
    return (wide(q_BTHL) * index_H[:, None]).sum(2).to(q_BTHL.dtype)


def asked(
    q_BTHL: Tensor,
    latent_BTL: Tensor,
    sink_H: Tensor | None,
    window: int,
    length_B: Tensor | None,
    most: int,
    scores: int = SCORES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, H, n, T), target (B, n, T), and which keys are far (n, T), for n tokens that have any.

    n: at most `most`, and so many that a head has about `scores` in all rows, but at least 8.
    """
    length, first = q_BTHL.shape[1], 2 * window
    count = min(length - first, max(LEAST, min(most, scores // q_BTHL.shape[:2].numel())))
    turn = torch.arange(count, device=q_BTHL.device)
    position = first + (2 * turn + 1) * (length - first) // (2 * count)
    key = torch.arange(length, device=q_BTHL.device)
    score = wide(torch.einsum("bnhl,bsl->bhns", q_BTHL[:, position], latent_BTL))
    seen = score.masked_fill(key > position[:, None], -torch.inf)
    total = seen.logsumexp(-1, keepdim=True)
    if sink_H is not None:
        total = torch.logaddexp(total, sink_H[:, None, None].to(total.dtype))
    far = key < (position // window - 1)[:, None] * window
    target = ((seen - total).exp() ** SHARPNESS).sum(1) * far
    if length_B is not None:
        target = target * (position < length_B[:, None])[..., None]
    return score, target, far


def divergence(score: Tensor, target: Tensor, far: Tensor, index_H: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to the weights (H,)."""
    total = target.sum().clamp_min(torch.finfo(target.dtype).tiny)
    each = target.sum(-1, keepdim=True)
    index = torch.einsum("h,bhns->bns", index_H.to(score.dtype), score).masked_fill(~far, -torch.inf)
    log_p = index.log_softmax(-1).masked_fill(~far, 0)
    loss = (torch.xlogy(target, target) - target * log_p).sum() - torch.xlogy(each, each).sum()
    wrong = (log_p.exp() * each - target).masked_fill(~far, 0)
    return loss / total, torch.einsum("bhns,bns->h", score, wrong) / total


def index_loss(
    q_BTHL: Tensor,
    latent_BTL: Tensor,
    index_H: Tensor,
    *,
    sink_H: Tensor | None,
    window: int,
    length_B: Tensor | None,
) -> Tensor:
    """Scalar, at least 0; needs T > 2W. Memory: 8 to 64 x T x H scores, none of which backward needs."""
    # In at least float32: autocast would round what cubes have made small.
    with torch.no_grad(), torch.autocast(q_BTHL.device.type, enabled=False):
        found = asked(q_BTHL, latent_BTL, sink_H, window, length_B, QUERIES)
        loss, slope_H = divergence(*found, index_H)
    # A gradient of a few numbers is cheaper made here than from kept scores.
    return loss + ((index_H - index_H.detach()) * slope_H).sum()
