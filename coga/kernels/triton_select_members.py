"""Selection by members in Triton: the K far groups with the best single members for each token.

    score[t, m] = max over members j of q_t . k_j      for groups m < max(0, t // W - 1) G that are not empty

Keys, order of the tiles and what is kept are those of `coga.kernels.triton_select`. A tile of BM groups is
scored a few members at a time: one product of the tokens with BN members, whose largest score is put into
the group's column. There is no T x M buffer.

Cost: B T S L / 2 multiply-adds (causal half), a head of dense attention's scores; B T S L / (2 tokens a
program) elements, mostly from cache. The plain twin is `coga.kernels.reference.select_members`.

Legend: B batch, T tokens, S slots, L latent width, M groups, G groups in a window, W window, K selected
groups; in kernels, BT tokens, BM groups in a tile, BN members of a product, PACK groups in it (small groups),
CHUNKS products for a group (large groups).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from coga.kernels import reference
from coga.kernels.triton_select import (
    choice_without_scores,
    has_kernel,
    keep_best,
    no_choice,
    shape_options,
    write_choice,
)

__all__ = ["select_members"]


@triton.jit
def _place(offset_ptr, size_ptr, group, total, FULL: tl.constexpr, ROOM: tl.constexpr):
    """First slot and members of a group; where all groups are FULL, without a load."""
    if FULL:
        start = (group * ROOM).to(tl.int64)
        size = tl.where(group < total, ROOM, 0)
    else:
        start = tl.load(offset_ptr + group, mask=group < total, other=0).to(tl.int64)
        size = tl.load(size_ptr + group, mask=group < total, other=0).to(tl.int32)
    return start, size


@triton.jit
def _scores(q_a, q_b, slot_ptr, slot, live, L: tl.constexpr, LA: tl.constexpr, LB: tl.constexpr):
    """q . k of some slots (BT, BN), -inf where there is no member."""
    a = tl.arange(0, LA)
    row = slot_ptr + slot[:, None] * L
    k_a = tl.load(row + a[None, :], mask=live[:, None] & (a < L)[None, :], other=0.0)
    s = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")
    if LB > 0:
        b = LA + tl.arange(0, LB)
        k_b = tl.load(row + b[None, :], mask=live[:, None] & (b < L)[None, :], other=0.0)
        s = tl.dot(q_b, tl.trans(k_b), s, input_precision="ieee")
    return tl.where(live[None, :], s, -float("inf"))


@triton.jit
def _members_kernel(
    q_ptr,
    slot_ptr,
    offset_ptr,
    size_ptr,
    out_ptr,
    length,
    total,
    places,
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
    FULL: tl.constexpr,
    ROOM: tl.constexpr,
    PACK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(length, BT)
    block = blocks - 1 - tl.program_id(0) % blocks  # the longest rows of tiles first
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    t = block * BT + tl.arange(0, BT)
    real = t < length
    a = tl.arange(0, LA)
    row = q_ptr + (batch * length + t)[:, None] * L
    q_a = tl.load(row + a[None, :], mask=real[:, None] & (a < L)[None, :], other=0.0)
    q_b = q_a
    if LB > 0:
        b = LA + tl.arange(0, LB)
        q_b = tl.load(row + b[None, :], mask=real[:, None] & (b < L)[None, :], other=0.0)
    visible = tl.minimum(tl.maximum(t // window - 1, 0) * groups, total)
    most = tl.max(tl.where(real, visible, 0), 0)
    best = no_choice(BT, KEEP, KP, WIDE)
    slot_ptr += batch * places * L
    offset_ptr += batch * total
    size_ptr += batch * total
    column = tl.arange(0, BM)
    n = tl.arange(0, BN)
    tiles = tl.cdiv(most, BM)
    for i in range(0, tiles):
        first = (tiles - 1 - i) * BM
        score = tl.full([BT, BM], -float("inf"), tl.float32)
        for j in tl.range(0, tl.cdiv(tl.minimum(BM, most - first), PACK), num_stages=STAGES):
            if PACK > 1:
                start, size = _place(
                    offset_ptr, size_ptr, first + j * PACK + n // (BN // PACK), total, FULL, ROOM
                )
                member = n % (BN // PACK)
                s = _scores(q_a, q_b, slot_ptr, start + member, member < size, L, LA, LB)
                top = tl.max(tl.reshape(s, (BT, PACK, BN // PACK)), 2)
                top = tl.broadcast_to(top[:, None, :], (BT, BM // PACK, PACK))
                score = tl.where((column // PACK == j)[None, :], tl.reshape(top, (BT, BM)), score)
            else:
                start, size = _place(offset_ptr, size_ptr, first + j, total, FULL, ROOM)
                top = tl.full([BT], -float("inf"), tl.float32)
                for chunk in tl.static_range(CHUNKS):
                    member = chunk * BN + n
                    s = _scores(q_a, q_b, slot_ptr, start + member, member < size, L, LA, LB)
                    top = tl.maximum(top, tl.max(s, 1))
                score = tl.where((column == j)[None, :], top[:, None], score)
        m = first + column
        seen = (m[None, :] < visible[:, None]) & (score > -float("inf"))
        best = keep_best(best, tl.where(seen, score, 0.0), seen, m, scale, SPAN, WIDE)
    write_choice(out_ptr, best, batch * length + t, real, KEEP, KP, SPAN, WIDE)


def select_members(
    index_q_BTL: Tensor,
    position: Tensor,
    slot_BSL: Tensor,
    offset_BM: Tensor,
    size_BM: Tensor,
    *,
    count: int,
    window: int,
    groups: int,
    slots: int,
    step: float,
    tokens: int = 64,
    tile: int = 32,
    warps: int = 4,
) -> Tensor:
    """`coga.kernels.reference.select_members` for a whole sequence: `position` must be 0 .. T-1.

    What `has_kernel` excludes runs the reference.
    """
    batch, length, width = index_q_BTL.shape
    total = offset_BM.shape[1]
    keep = min(count, total)
    easy = choice_without_scores(index_q_BTL, size_BM == 0, keep, window, groups)
    if easy is not None:
        return easy
    if not has_kernel(index_q_BTL.dtype, keep):
        return reference.select_members(
            index_q_BTL,
            position,
            slot_BSL,
            offset_BM,
            size_BM,
            count=count,
            window=window,
            groups=groups,
            slots=slots,
            step=step,
        )
    assert math.frexp(step)[0] == 0.5, "the rounding step must be a power of two"
    assert index_q_BTL.dtype == slot_BSL.dtype
    q, slot, offset, size = (x.contiguous() for x in (index_q_BTL, slot_BSL, offset_BM, size_BM))
    if keep > 64:
        tokens = 16
    out = torch.empty(batch, length, keep, dtype=torch.int64, device=q.device)
    power = triton.next_power_of_2(slots)
    members = min(64, max(16, power))
    pack = max(1, members // power)
    _members_kernel[(batch * triton.cdiv(length, tokens),)](
        q,
        slot,
        offset,
        size,
        out,
        length,
        total,
        slot.shape[1],
        window,
        groups,
        1.0 / step,
        **shape_options(width, total, keep, q.dtype),
        FULL=slots * groups == window,
        ROOM=slots,
        PACK=pack,
        CHUNKS=triton.cdiv(slots, members),
        BT=tokens,
        BM=tile,
        BN=members,
        STAGES=2,
        num_warps=warps,
    )
    return out
