"""Selection by members in Triton: the K far groups with the best single members for each token.

    score[t, m] = max over members j of q_t . k_j      for groups m < max(0, t // W - 1) G that are not empty

Keys, order of the tiles and what is kept are those of `coga.kernels.triton_select`. A tile of BM groups is
scored a few members at a time: one product of the tokens with BN members, whose largest score is put into
the group's column. There is no T x M buffer.

Where every group has all its members (capacity 1), those of neighbouring groups lie side by side: a product
is then of BN members of PACK groups, or of a part of one, without a mask and with one address for all.
Where they do not, `slots` places are read for each group, whatever its size; or, if asked (`packed`), each
place once, as `coga.kernels.triton_select_packed` tells.

Cost: B T S L / 2 multiply-adds (causal half), a head of dense attention's scores; B T S L / (2 tokens a
program) elements, mostly from cache. The plain twin is `coga.kernels.reference.select_members`.

Legend: B batch, T tokens, S slots, L latent width, M groups, G groups in a window, W window, K selected
groups; in kernels, BT tokens, BM groups in a tile, BN members of a product, PACK groups in it (small groups),
CHUNKS products for a group (large groups), ROOM members of each group where all are alike and full, else 0.
"""

from __future__ import annotations

import math
from dataclasses import replace

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
    product,
    read_latents,
    shape_options,
    token_block,
    write_choice,
)
from coga.kernels.triton_select_packed import Packed, choose_packed

__all__ = ["select_members"]


@triton.jit
def _place(offset_ptr, size_ptr, group, total):
    """First slot and members of a group."""
    start = tl.load(offset_ptr + group, mask=group < total, other=0).to(tl.int64)
    size = tl.load(size_ptr + group, mask=group < total, other=0).to(tl.int32)
    return start, size


@triton.jit
def _scores(q_a, q_b, slot_ptr, slot, live, L: tl.constexpr, LA: tl.constexpr, LB: tl.constexpr):
    """q . k of the slots (BT, BN), -inf where there is no member; all are members where `live` is None."""
    k_a, k_b = read_latents(slot_ptr + slot[:, None] * L, live, L, LA, LB)
    s = product(q_a, q_b, k_a, k_b, LB)
    if live is not None:
        s = tl.where(live[None, :], s, -float("inf"))
    return s


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
    ROOM: tl.constexpr,
    PACK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    batch, t, real, q_a, q_b, visible = token_block(q_ptr, length, total, window, groups, L, LA, LB, BT)
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
        products = tl.cdiv(tl.minimum(BM, most - first), PACK) * CHUNKS
        for p in tl.range(0, products, num_stages=STAGES):
            j = p // CHUNKS
            group = first + j * PACK
            if ROOM > 0:
                part = slot_ptr + (group.to(tl.int64) * ROOM + p % CHUNKS * BN) * L
                s = _scores(q_a, q_b, part, n, None, L, LA, LB)
            else:
                start, size = _place(offset_ptr, size_ptr, group + n // (BN // PACK), total)
                member = p % CHUNKS * BN + n % (BN // PACK)
                s = _scores(q_a, q_b, slot_ptr, start + member, member < size, L, LA, LB)
            for g in tl.static_range(PACK):
                own = s
                if PACK > 1:
                    own = tl.where((n // (BN // PACK) == g)[None, :], s, -float("inf"))
                top = tl.max(own, 1)[:, None]
                if CHUNKS > 1:
                    top = tl.maximum(score, top)
                score = tl.where((column == j * PACK + g)[None, :], top, score)
        m = first + column
        seen = (m[None, :] < visible[:, None]) & (score > -float("inf"))
        best = keep_best(best, tl.where(seen, score, 0.0), seen, m, scale, SPAN, WIDE)
    write_choice(out_ptr, best, batch * length + t, real, KEEP, KP, SPAN, WIDE)


def previous_power_of_2(n: int) -> int:
    """The largest power of two that is at most n."""
    return 1 << (n.bit_length() - 1)


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
    packed: Packed | None = None,
) -> Tensor:
    """`coga.kernels.reference.select_members` for a whole sequence: `position` must be 0 .. T-1.

    What `has_kernel` excludes runs the reference. `packed`: how groups that are not all full are walked with
    each place read once; None reads `slots` places of each group.
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
    q, slot, offset, size = (x.contiguous() for x in (index_q_BTL, slot_BSL, offset_BM, size_BM))
    out = torch.empty(batch, length, keep, dtype=torch.int64, device=q.device)
    power = triton.next_power_of_2(slots)
    half = q.element_size() == 2
    shape = shape_options(width, total, keep, q.dtype)
    padded = shape["LA"] + shape["LB"]
    widest = 64 if half and padded <= 320 else 32  # members of a product; what shared memory has room for
    # Capacity 1 leaves no place of a window empty: a product is of whole groups, or of an even part of one.
    pack = max(1, min(widest // power, previous_power_of_2(groups), tile))
    members = min(pack * power, 128 if half and slots == 128 and padded <= 160 else widest)
    even = slots * groups == window and slots == power and members >= 16
    # The last product of a tile may begin inside what a token reads and end beyond it, but not beyond `slot`.
    read = min(max((length - 1) // window - 1, 0) * groups, total)
    even = even and (read + pack - 1) * slots <= slot.shape[1]
    if not even:
        members = min(64, max(16, power))
        pack = max(1, members // power)
    once = None if even or slot.shape[1] == 0 else packed
    narrow = half and padded <= 160
    roomy = narrow and (even or once is not None)  # three tiles in flight, and twice the tokens
    tokens = tokens or (16 if keep > 64 else 128 if roomy else 64 if half else 32)
    warps = warps or (8 if tokens == 128 else 4)
    stages = 3 if roomy else 2
    if once is not None:
        once = replace(once, places=once.places or widest, stages=once.stages or stages)
        choose_packed(
            q,
            slot,
            offset,
            size,
            out,
            once,
            window=window,
            groups=groups,
            slots=slots,
            scale=1.0 / step,
            shape=shape,
            tokens=tokens,
            tile=tile,
            warps=warps,
        )
        return out
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
        **shape,
        ROOM=slots if even else 0,
        PACK=pack,
        CHUNKS=triton.cdiv(slots, members),
        BT=tokens,
        BM=tile,
        BN=members,
        STAGES=stages,
        num_warps=warps,
    )
    return out
