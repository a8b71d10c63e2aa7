"""The attention-entropy term: how far attention falls short of looking everywhere.

    1 - H_i / ln(i + 1),  H_i the entropy of token i's attention over the tokens it can see

averaged over heads and at most 64 evenly spaced queries. The mass of a group summary counts as spread over
its members: p_m adds p_m (log|g_m| - log p_m). The sink is left out and the rest renormalised.
Added with `entropy_weight`, it works against attention that collapses onto few tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coga.kernels.reference import attention_parts, far_at, wide
from coga.types import Far

__all__ = ["entropy_shortfall"]

QUERIES = 64


@torch.compiler.disable(reason="Triton 3.6 fails on a reduction that Inductor makes of the entropy term")
def entropy_shortfall(
    q_BTHL: Tensor,
    latent_BTL: Tensor,
    *,
    content: int,
    window: int | None,
    band: int,
    alpha_H: Tensor | None,
    sink_H: Tensor | None,
    far: Far | None,
    length_B: Tensor | None,
) -> Tensor:
    """Scalar in [0, 1]; differentiable. Memory: 64 x T x H scores. Compiled models run it uncompiled, so
    `fullgraph=True` is an error where it has a weight."""
    length = q_BTHL.shape[1]
    stride = -(-length // QUERIES)
    position = torch.arange(stride - 1, length, stride, device=q_BTHL.device)
    q, latent = wide(q_BTHL), wide(latent_BTL)
    far, members = far_at(far, position)
    parts = attention_parts(
        q[:, position],
        position,
        latent,
        torch.arange(length, device=q.device),
        content=content,
        window=window,
        band=band,
        alpha_H=alpha_H,
        c_BtC=latent[:, position, :content],
        key_query_BnHC=q[..., :content],
        sink_H=sink_H,
        far=far,
        members=members,
    )
    seen = [p for p in (parts.near_BtHs, parts.opened_BtHk, parts.far_BtHm) if p is not None]
    mass = torch.stack([p.sum(-1) for p in seen]).sum(0).clamp_min(1e-12)
    entropy = torch.stack([-torch.xlogy(p, p.clamp_min(1e-30)).sum(-1) for p in seen]).sum(0)
    if parts.far_BtHm is not None:
        assert far is not None and far.log_size_BM is not None
        spread = far.log_size_BM.masked_fill(far.log_size_BM.isinf(), 0).to(mass.dtype)
        entropy = entropy + (parts.far_BtHm * spread[:, None, None]).sum(-1)
    entropy = entropy / mass + mass.log()  # of the distribution without the sink
    most = (position + 1).to(mass.dtype).log()
    weight = (position > 0).to(mass.dtype).expand(q.shape[0], -1)
    if length_B is not None:
        weight = weight * (position < length_B[:, None])
    shortfall = 1 - entropy / most.clamp_min(1e-12)[:, None]
    return (shortfall.mean(-1) * weight).sum() / weight.sum().clamp_min(1)
