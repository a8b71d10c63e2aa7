"""What attention does, measured on given matrices: spread, reciprocity, what a latent of width C holds.

    entropy         H(p_i) / ln(i) for a query that sees i > 1 tokens: 1 uniform, 0 one token
    token mass      a summary of group m stands for |m| tokens: each of them gets p_m / |m|, so that the
                    entropy of grouped attention compares with that of dense attention
    reciprocity     Pearson correlation of s[i,j] with s[j,i] over 0 < i-j < band, before any mask
    reconstruction  min over linear maps of rank C of |Y - map(X)| / |Y|, Y the keys and values to rebuild

Pure functions without gradient; they hold (t, H, T) at once, so call them on chunks of queries.

Legend: B batch, t queries of a chunk, H heads, s near keys of a chunk, T tokens, M groups, K opened groups,
S slots of a group, C latent width, X samples (tokens), D hidden width, Y width of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from coga.kernels.reference import Parts, gather_members, wide
from coga.types import Far

__all__ = [
    "attention_entropy",
    "linear_error",
    "rank_errors",
    "reciprocity",
    "spread_group_mass",
    "token_mass",
]


@torch.no_grad()
def attention_entropy(prob_tHs: Tensor, visible_t: Tensor) -> Tensor:
    """H(p) / ln(visible) over the last dimension; NaN for a query that sees a single token.

    prob_tHs   (..., s) probabilities, 0 for what is not seen. They need not sum to 1: a sink's share is
               attention to nothing, and is taken out before the entropy is measured
    visible_t  how many tokens each query sees; broadcast against the leading dimensions of `prob_tHs`
    """
    prob = wide(prob_tHs)
    total = prob.sum(-1, keepdim=True)
    prob = prob / total.masked_fill(total == 0, 1)
    visible = visible_t.to(prob.dtype)
    ratio = torch.special.entr(prob).sum(-1) / visible.clamp_min(2).log()
    return ratio.masked_fill((visible <= 1).expand(ratio.shape), torch.nan)


@torch.no_grad()
def spread_group_mass(
    far_BtHm: Tensor, order_BS: Tensor, offset_BM: Tensor, size_BM: Tensor, length: int
) -> Tensor:
    """Probabilities of group summaries laid out over their members' positions: (B, t, H, length).

    far_BtHm   mass of the first m groups; order_BS, offset_BM, size_BM as in `coga.types.Grouping`
    """
    count, slots = far_BtHm.shape[-1], order_BS.shape[1]
    start, size = offset_BM[:, :count], size_BM[:, :count]
    out = far_BtHm.new_zeros(*far_BtHm.shape[:-1], length)
    if count == 0 or slots == 0:
        return out
    # Slot order has the groups one after the other: a slot's group is the first that ends beyond it.
    slot = torch.arange(slots, device=order_BS.device).expand(order_BS.shape[0], -1).contiguous()
    group = torch.searchsorted((start + size).contiguous(), slot, right=True)
    inside, group = group < count, group.clamp_max(count - 1)
    share = far_BtHm / size.clamp_min(1)[:, None, None]
    index = group[:, None, None].expand(*far_BtHm.shape[:-1], slots)
    mass = share.gather(-1, index).masked_fill(~inside[:, None, None], 0)
    return out.scatter_add_(-1, order_BS[:, None, None].expand_as(mass), mass)


@torch.no_grad()
def token_mass(parts: Parts, key_position: Tensor, length: int, far: Far | None, order_BS: Tensor | None):
    """All of a chunk's attention as mass over token positions, (B, t, H, length); the sink's is left out.

    parts         of `attention_parts`, with its `key_position` (s,) and `far` (for the same queries)
    order_BS      token positions in slot order, from the `Grouping`; needed with `far`
    """
    near = parts.near_BtHs
    seen = key_position >= 0
    out = near.new_zeros(*near.shape[:-1], length)
    out.index_add_(-1, key_position[seen], near[..., seen])
    if far is None:
        return out
    if order_BS is None:
        raise ValueError("order_BS=None: must be given with far")
    if parts.far_BtHm is not None:
        out = out + spread_group_mass(parts.far_BtHm, order_BS, far.offset_BM, far.size_BM, length)
    if parts.opened_BtHk is not None:
        assert far.open_BTK is not None
        position, mask = _member_positions(far, order_BS)
        mass = parts.opened_BtHk.masked_fill(~mask[:, :, None], 0)
        out.scatter_add_(-1, position[:, :, None].expand_as(mass), mass)
    return out


def _member_positions(far: Far, order_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Token position of every opened member (B, t, K*S), and where there is one."""
    assert far.open_BTK is not None
    ids = replace(far, slot_BSL=order_BS[..., None])  # the gather of latents, applied to their positions
    position, mask = gather_members(ids, far.open_BTK)
    return position[..., 0], mask


@torch.no_grad()
def reciprocity(score_HTT: Tensor, band: int) -> Tensor:
    """Correlation of s[i,j] with s[j,i] over 0 < i-j < band, one value per leading index.

    score_HTT  (..., T, T) scores before any mask. 1 when symmetric, -1 when antisymmetric, NaN when constant
               or when the band holds no pair. The diagonal equals itself and is left out.
    """
    length = score_HTT.shape[-1]
    if score_HTT.ndim < 2 or score_HTT.shape[-2] != length:
        raise ValueError(f"score_HTT of shape {tuple(score_HTT.shape)}: must be (..., T, T)")
    position = torch.arange(length, device=score_HTT.device)
    lag = position[:, None] - position
    query, key = ((lag > 0) & (lag < band)).nonzero(as_tuple=True)
    score = wide(score_HTT).double()
    late, early = score[..., query, key], score[..., key, query]
    late, early = (x - x.mean(-1, keepdim=True) for x in (late, early))
    norm = late.norm(dim=-1) * early.norm(dim=-1)
    value = (late * early).sum(-1) / norm
    return value.masked_fill(norm == 0, torch.nan).to(wide(score_HTT).dtype)


def _rows(x: Tensor, name: str) -> Tensor:
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"{name} of shape {tuple(x.shape)}: must be (..., width) and not empty")
    return rearrange(x, "... d -> (...) d").double().cpu()


@torch.no_grad()
def linear_error(latent_XC: Tensor, target_XY: Tensor) -> float:
    """|target - best linear map of latent| / |target| (Frobenius): what these latents cannot rebuild."""
    latent, target = _rows(latent_XC, "latent_XC"), _rows(target_XY, "target_XY")
    fitted = latent @ torch.linalg.lstsq(latent, target, driver="gelsd").solution
    return float((target - fitted).norm() / target.norm())


@torch.no_grad()
def rank_errors(hidden_XD: Tensor, target_XY: Tensor, ranks: Sequence[int]) -> list[float]:
    """Relative error of the best latent of each width C: hidden -> C numbers -> target, all linear.

    Reduced-rank regression: with F the least-squares fit of the target, error(C)^2 |Y|^2 = |Y - F|^2 +
    sum of the squared singular values of F beyond the C-th. target_XY holds keys and values side by side.
    """
    hidden, target = _rows(hidden_XD, "hidden_XD"), _rows(target_XY, "target_XY")
    for rank in ranks:
        if rank < 0:
            raise ValueError(f"ranks={list(ranks)}: must be at least 0")
    fitted = hidden @ torch.linalg.lstsq(hidden, target, driver="gelsd").solution
    rest = (target - fitted).square().sum()
    tail = torch.linalg.svdvals(fitted).square()
    return [float(((rest + tail[rank:].sum()) / target.square().sum()).sqrt()) for rank in ranks]
