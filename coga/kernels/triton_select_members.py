"""Selection by members in Triton: the K far groups with the best single members for each token.

    score[t, m] = max over members j of q_t . k_j      for groups m < max(0, t // W - 1) G that are not empty

Keys, order of the tiles and what is kept are those of `coga.kernels.triton_select`. A tile of BM groups is
scored some places at a time: one product of the tokens with PACK parts of SIZE places, each the members of
one group, or some of them; the largest score of each part goes into its group's column. There is no T x M
buffer, no mask and one address for a whole product.

Where every group has all its members (capacity 1), they lie so already: a part is a group, or an even share
of one. Otherwise they are copied so first (`coga.kernels.triton_parts`).

Cost: B T S L / 2 multiply-adds (causal half), a head of dense attention's scores, and half more where
groups are unequal; B T S L / (2 tokens a program) elements, mostly from cache. The plain twin is
`coga.kernels.reference.select_members`.

Legend: B batch, T tokens, S slots, L latent width, M groups, G groups in a window, W window, K selected
groups; in kernels, BT tokens, BM groups in a tile, BN = PACK SIZE places of a product, EACH parts of every
group where all are alike and full, else 0.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from coga.kernels import reference
from coga.kernels.triton_parts import cut
from coga.kernels.triton_select import (
    choice_without_scores,
    has_kernel,
    keep_best,
    no_choice,
    product,
    read_latents,
    shape_options,
    token_block,
    write_choice,
)

__all__ = ["select_members"]


@triton.jit
def _halves(s, BT: tl.constexpr, BN: tl.constexpr):
    """Scores (BT, BN / 2) of the first and the second half of the places."""
    return tl.split(tl.permute(tl.reshape(s, (BT, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _put(score, s, owner, m, EACH: tl.constexpr):
    """The scores of a tile (BT, BM) of groups m after a part that this group owns."""
    top = tl.max(s, 1)[:, None]
    if EACH != 1:
        top = tl.maximum(score, top)
    return tl.where((m == owner)[None, :], top, score)


@triton.jit
def _owner(owner_ptr, part, end, EACH: tl.constexpr):
    """The group of a part; beyond `end` one that is not seen from this tile."""
    if EACH > 0:
        owner = part // EACH
    else:
        owner = tl.load(owner_ptr + part, mask=part < end, other=-1)
    return owner


@triton.jit
def _put_parts(
    score,
    s,
    owner_ptr,
    part,
    end,
    m,
    EACH: tl.constexpr,
    PACK: tl.constexpr,
    SIZE: tl.constexpr,
    BT: tl.constexpr,
):
    """The scores of a tile (BT, BM) of groups m after a product (BT, PACK SIZE), halved until it is parts."""
    if PACK == 1:
        score = _put(score, s, _owner(owner_ptr, part, end, EACH), m, EACH)
    else:
        low, high = _halves(s, BT, PACK * SIZE)
        score = _put_parts(score, low, owner_ptr, part, end, m, EACH, PACK // 2, SIZE, BT)
        score = _put_parts(score, high, owner_ptr, part + PACK // 2, end, m, EACH, PACK // 2, SIZE, BT)
    return score


@triton.jit
def _members_kernel(
    q_ptr,
    part_ptr,
    owner_ptr,
    end_ptr,
    out_ptr,
    length,
    total,
    places,
    parts,
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
    EACH: tl.constexpr,
    PACK: tl.constexpr,
    SIZE: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
):
    batch, t, real, q_a, q_b, visible = token_block(q_ptr, length, total, window, groups, L, LA, LB, BT)
    most = tl.max(tl.where(real, visible, 0), 0)
    best = no_choice(BT, KEEP, KP, WIDE)
    part_ptr += batch * places * L
    owner_ptr += batch * parts
    end_ptr += batch * total
    n = tl.arange(0, PACK * SIZE)
    tiles = tl.cdiv(most, BM)
    for i in range(0, tiles):
        first = (tiles - 1 - i) * BM
        stop = tl.minimum(first + BM, most)
        m = first + tl.arange(0, BM)
        if EACH > 0:
            begin, end = first * EACH, stop * EACH
        else:
            begin = tl.load(end_ptr + first - 1, mask=first > 0, other=0)
            end = tl.load(end_ptr + stop - 1)
        score = tl.full([BT, BM], -float("inf"), tl.float32)
        for part in tl.range(begin, end, PACK, num_stages=STAGES):
            row = part_ptr + tl.cast(part, tl.int64) * SIZE * L + n[:, None] * L
            k_a, k_b = read_latents(row, None, L, LA, LB)
            s = product(q_a, q_b, k_a, k_b, LB)
            score = _put_parts(score, s, owner_ptr, part, end, m, EACH, PACK, SIZE, BT)
        seen = (m[None, :] < visible[:, None]) & (score > -float("inf"))
        best = keep_best(best, tl.where(seen, score, 0.0), seen, m, scale, SPAN, WIDE)
    write_choice(out_ptr, best, batch * length + t, real, KEEP, KP, SPAN, WIDE)


def previous_power_of_2(n: int) -> int:
    """The largest power of two that is at most n."""
    return 1 << (n.bit_length() - 1)


def _even_parts(slots: int, window: int, groups: int, most: int, tile: int) -> tuple[int, int, int]:
    """Parts of each group, parts of a product of at most `most` places and their size, where groups are full;
    (0, 0, 0): where there may be others, or where they cannot be cut evenly."""
    if slots * groups != window or slots & (slots - 1):
        return 0, 0, 0
    size = min(slots, most)
    pack = max(1, min(most // size, previous_power_of_2(groups), tile))
    return (slots // size, pack, size) if pack * size >= 16 else (0, 0, 0)


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
    tokens: int | None = None,
    tile: int = 32,
    warps: int | None = None,
    part: int | None = None,
) -> Tensor:
    """`coga.kernels.reference.select_members` for a whole sequence: `position` must be 0 .. T-1.

    What `has_kernel` excludes runs the reference.
    """
    batch, length, width = index_q_BTL.shape
    total = offset_BM.shape[1]
    keep = min(count, total)
    if length == 0 or keep in (0, total):
        return choice_without_scores(index_q_BTL, size_BM == 0, keep, window, groups)
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
    q, slot, offset = (x.contiguous() for x in (index_q_BTL, slot_BSL, offset_BM))
    out = torch.empty(batch, length, keep, dtype=torch.int64, device=q.device)
    half = q.element_size() == 2
    shape = shape_options(width, total, keep, q.dtype)
    padded = shape["LA"] + shape["LB"]
    narrow = half and padded <= 160  # then three products in flight, and twice the tokens
    widest = 64 if half and padded <= 320 else 32  # places of a product; what shared memory has room for
    each, pack, size = _even_parts(slots, window, groups, 128 if narrow and slots == 128 else widest, tile)
    # The last product of a tile may begin inside what a token reads and end beyond it, but not beyond `slot`.
    read = min(max((length - 1) // window - 1, 0) * groups, total)
    if each == 0 or (read * each + pack - 1) * size > slot.shape[1]:
        each, size = 0, part or min(widest, max(16, triton.next_power_of_2(window // groups)))
        pack = widest // size
        parts = cut(slot, offset, size_BM.contiguous(), size, pack)
        slot, owner, end = parts.latent_BSL, parts.owner_BP, parts.end_BM
    else:
        owner = end = offset  # not read
    tokens = tokens or (16 if keep > 64 else 128 if narrow else 64 if half else 32)
    warps = warps or (8 if tokens == 128 and each else 4)
    _members_kernel[(batch * triton.cdiv(length, tokens),)](
        q,
        slot,
        owner,
        end,
        out,
        length,
        total,
        slot.shape[1],
        owner.shape[1],
        window,
        groups,
        1.0 / step,
        **shape,
        EACH=each,
        PACK=pack,
        SIZE=size,
        BT=tokens,
        BM=tile,
        STAGES=3 if narrow else 2,
        num_warps=warps,
        maxnreg=128 if warps == 8 and keep <= 16 else None,  # two programs beside each other, without spills
    )
    return out
