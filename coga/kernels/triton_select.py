"""Selection in Triton: the K far groups that each token opens, with no T x M buffer.

    score[t, m] = q_t . g_m + log|g_m|      for groups m < max(0, t // W - 1) G with |g_m| > 0
    key = round(score / step), then lower group     one integer orders both

A program holds a few tokens and streams tiles of groups, latest first. Each token keeps its K best keys as an
unordered set; of a tile only the keys above the set's lowest matter, and they are taken one by one: while any
token's best remaining key beats its lowest kept one, swap them. The threshold rises fast, so a tile costs a
handful of swaps: on random scores about K (1 + ln(M / tile)) a token for the whole sequence.

The choice equals `coga.kernels.reference.select` except where two scores are closer than the rounding step
(another order of summation moves a score by an ulp across a rounding boundary). In half precision keys are
32 bits wide: the rounded score saturates at 2^30 / M steps (16,384 units of score at M = 1,024 in bfloat16);
float32 keys have 64 bits.

Cost: B T M L / 2 multiply-adds (causal half), B T M L / (2 tokens a program) elements, mostly from cache.

Legend: B batch, T tokens, L latent width, M groups, G groups in a window, W window, K selected groups.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from coga.kernels import reference

__all__ = ["select"]

LARGEST = 256  # most groups a token may select here; more go to the reference


@triton.jit
def rint(x):
    """Round half to even, as `torch.round`: adding 2^23 leaves no fraction bits (exact in IEEE float32)."""
    big = tl.where(x >= 0, 8388608.0, -8388608.0)
    return tl.where(tl.abs(x) < 8388608.0, (x + big) - big, x)


@triton.jit
def no_choice(BT: tl.constexpr, KEEP: tl.constexpr, KP: tl.constexpr, WIDE: tl.constexpr):
    """Keys (BT, KP) of BT tokens that have chosen nothing yet; `none` is below every key.

    Distinct placeholders below every key, so that a swap replaces exactly one entry; the columns beyond KEEP
    are above every key and never replaced.
    """
    slot = tl.arange(0, KP)
    if WIDE:
        none = -(2**62)
        slot = slot.to(tl.int64)
    else:
        none = -(2**31)
    start = tl.where(slot < KEEP, none + 1 + slot, -(none + 1))
    return tl.broadcast_to(start[None, :], [BT, KP])


@triton.jit
def keep_best(best, score, seen, m, scale, SPAN: tl.constexpr, WIDE: tl.constexpr):
    """The best keys so far, after the groups m, where seen, with these scores (BT, BM)."""
    if WIDE:
        none = -(2**62)
        limit: tl.constexpr = 2**62 // SPAN - 1
    else:
        none = -(2**31)
        limit: tl.constexpr = 2**30 // SPAN - 1
    score = tl.minimum(tl.maximum(rint(score * scale), -limit), limit)
    if WIDE:
        key = score.to(tl.int64) * SPAN + (SPAN - 1 - m)[None, :]
    else:
        key = score.to(tl.int32) * SPAN + (SPAN - 1 - m)[None, :]
    key = tl.where(seen, key, none)
    top = tl.max(key, 1)
    lowest = tl.min(best, 1)
    while tl.max((top > lowest).to(tl.int32), 0) > 0:
        out = (best == lowest[:, None]) & (top > lowest)[:, None]
        best = tl.where(out, top[:, None], best)
        key = tl.where(key == top[:, None], none, key)
        lowest = tl.min(best, 1)
        top = tl.max(key, 1)
    return best


@triton.jit
def write_choice(
    out_ptr, best, row, live, KEEP: tl.constexpr, KP: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr
):
    """Chosen groups of each row, ascending, -1 last."""
    if WIDE:
        none = -(2**62)
    else:
        none = -(2**31)
    slot = tl.arange(0, KP)
    found = (best > none + KP) & (slot < KEEP)[None, :]
    index = tl.where(found, SPAN - 1 - (best & (SPAN - 1)).to(tl.int32), SPAN)
    index = tl.sort(index, 1)
    index = tl.where(index == SPAN, -1, index).to(tl.int64)
    target = out_ptr + row[:, None] * KEEP + slot[None, :]
    tl.store(target, index, mask=live[:, None] & (slot < KEEP)[None, :])


@triton.jit
def read_part(row, column, live, L: tl.constexpr, WHOLE: tl.constexpr):
    """Some columns of the latents of rows; a mask only where there is something to leave out."""
    if live is not None:
        x = tl.load(row + column[None, :], mask=live[:, None] & (column < L)[None, :], other=0.0)
    elif WHOLE:
        x = tl.load(row + column[None, :])
    else:
        x = tl.load(row + column[None, :], mask=(column < L)[None, :], other=0.0)
    return x


@triton.jit
def read_latents(row, live, L: tl.constexpr, LA: tl.constexpr, LB: tl.constexpr):
    """Latents of rows in two parts of LA and LB columns; without a second part, twice the first."""
    a = read_part(row, tl.arange(0, LA), live, L, L == LA + LB)
    b = a
    if LB > 0:
        b = read_part(row, LA + tl.arange(0, LB), live, L, L == LA + LB)
    return a, b


@triton.jit
def product(q_a, q_b, k_a, k_b, LB: tl.constexpr):
    """q . k (BT, BN) of latents in two parts."""
    s = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")
    if LB > 0:
        s = tl.dot(q_b, tl.trans(k_b), s, input_precision="ieee")
    return s


@triton.jit
def token_block(
    q_ptr,
    length,
    total,
    window,
    groups,
    L: tl.constexpr,
    LA: tl.constexpr,
    LB: tl.constexpr,
    BT: tl.constexpr,
):
    """This program's sequence and tokens (BT), which are real, their queries, how many groups each sees."""
    blocks = tl.cdiv(length, BT)
    block = blocks - 1 - tl.program_id(0) % blocks  # the longest rows of tiles first
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    t = block * BT + tl.arange(0, BT)
    real = t < length
    q_a, q_b = read_latents(q_ptr + (batch * length + t)[:, None] * L, real, L, LA, LB)
    visible = tl.minimum(tl.maximum(t // window - 1, 0) * groups, total)
    return batch, t, real, q_a, q_b, visible


@triton.jit
def _select_kernel(
    q_ptr,
    group_ptr,
    log_size_ptr,
    out_ptr,
    length,
    total,
    window,
    groups,
    scale,
    L: tl.constexpr,
    LA: tl.constexpr,
    LB: tl.constexpr,
    KEEP: tl.constexpr,
    KP: tl.constexpr,
    SPAN: tl.constexpr,
    WIDE: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
):
    batch, t, real, q_a, q_b, visible = token_block(q_ptr, length, total, window, groups, L, LA, LB, BT)
    most = tl.max(tl.where(real, visible, 0), 0)
    best = no_choice(BT, KEEP, KP, WIDE)
    group_ptr += batch * total * L
    log_size_ptr += batch * total
    tiles = tl.cdiv(most, BM)
    for i in range(0, tiles):
        m = (tiles - 1 - i) * BM + tl.arange(0, BM)
        g_a, g_b = read_latents(group_ptr + m[:, None] * L, m < total, L, LA, LB)
        score = product(q_a, q_b, g_a, g_b, LB)
        log_size = tl.load(log_size_ptr + m, mask=m < total, other=-float("inf"))
        seen = (m[None, :] < visible[:, None]) & (log_size > -float("inf"))[None, :]
        score += tl.where(log_size > -float("inf"), log_size, 0.0)[None, :]
        best = keep_best(best, score, seen, m, scale, SPAN, WIDE)
    write_choice(out_ptr, best, batch * length + t, real, KEEP, KP, SPAN, WIDE)


def choice_without_scores(
    index_q_BTL: Tensor, empty_BM: Tensor, keep: int, window: int, groups: int
) -> Tensor:
    """The choice where there is none to make: nothing (K = 0) or all that a token may read (K >= M)."""
    batch, length, _ = index_q_BTL.shape
    total = empty_BM.shape[1]
    if keep == 0 or length == 0:
        return index_q_BTL.new_zeros(batch, length, keep, dtype=torch.int64)
    group = torch.arange(total, device=empty_BM.device)
    position = torch.arange(length, device=empty_BM.device)
    seen = group < reference.visible_groups(position, window, groups)[:, None]
    index = torch.where(seen & ~empty_BM[:, None], group, total).sort(-1).values
    return torch.where(index == total, -1, index)


def has_kernel(dtype: torch.dtype, keep: int) -> bool:
    """Whether a selection runs here: not float64, and not of more than `LARGEST` but not all groups."""
    return dtype != torch.float64 and keep <= LARGEST


def shape_options(width: int, total: int, keep: int, dtype: torch.dtype) -> dict:
    """Compile-time shape of both selections: widths of the two parts of a latent, and of the keys."""
    power = triton.next_power_of_2(width)
    first = max(16, power if power == width else power // 2)
    span = triton.next_power_of_2(total)
    return dict(
        L=width,
        LA=first,
        LB=0 if width <= first else max(16, triton.next_power_of_2(width - first)),
        KEEP=keep,
        KP=triton.next_power_of_2(keep),
        SPAN=span,
        WIDE=dtype == torch.float32 or span > 2**16,
    )


def select(
    index_q_BTL: Tensor,
    position: Tensor,
    group_BML: Tensor,
    log_size_BM: Tensor,
    *,
    count: int,
    window: int,
    groups: int,
    step: float,
    tokens: int = 32,
    tile: int = 32,
    warps: int = 1,
) -> Tensor:
    """`coga.kernels.reference.select` for a whole sequence: `position` must be 0 .. T-1.

    What `has_kernel` excludes runs the reference.
    """
    batch, length, width = index_q_BTL.shape
    total = group_BML.shape[1]
    keep = min(count, total)
    if length == 0 or keep in (0, total):
        return choice_without_scores(index_q_BTL, log_size_BM.isinf(), keep, window, groups)
    if not has_kernel(index_q_BTL.dtype, keep):
        return reference.select(
            index_q_BTL,
            position,
            group_BML,
            log_size_BM,
            count=count,
            window=window,
            groups=groups,
            step=step,
        )
    assert math.frexp(step)[0] == 0.5, "the rounding step must be a power of two"
    assert index_q_BTL.dtype == group_BML.dtype
    q, group = index_q_BTL.contiguous(), group_BML.contiguous()
    if keep > 64:
        tokens = 16
    out = torch.empty(batch, length, keep, dtype=torch.int64, device=q.device)
    _select_kernel[(batch * triton.cdiv(length, tokens),)](
        q,
        group,
        log_size_BM.float().contiguous(),
        out,
        length,
        total,
        window,
        groups,
        1.0 / step,
        **shape_options(width, total, keep, q.dtype),
        BT=tokens,
        BM=tile,
        num_warps=warps,
    )
    return out
