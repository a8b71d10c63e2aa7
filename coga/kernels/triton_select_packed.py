"""Selection by members of unequal groups in Triton: each place is read once.

    score[t, m] = max over members j of q_t . k_j      for groups m < max(0, t // W - 1) G that are not empty

Members are packed: those of group m lie at places offset_m .. offset_m + size_m - 1, where offset is the sum
of the sizes before. The members of a tile of BM groups are then one run of places, read BN at a time whoever
owns them: one product of the tokens with BN places, then for each group among them the largest of its own
scores, put into the group's column beside what an earlier block left there (a group may straddle blocks).
How many groups a block holds is known on the device only. There are two ways to walk them.

    nested   a loop over blocks and, in it, one over the groups of the block, from the owner of its first
             place to that of its last. Triton does not pipeline a loop around a loop, so the keys of the next
             block are read before the groups of this one.
    flat     one pipelined loop over items: a block and P groups from a first one. A block of more groups is
             several items, and its product is made again. A small kernel lists the items of each tile, and
             how many of them reach the end of each group, which is where what a token sees may end.

A block may begin among the members of one tile and end among those of the next, or beyond the last member:
the owner of each place, written once a call, decides what counts. Places beyond `slot` are its last again.

Cost: B T S L / 2 multiply-adds (causal half), a head of dense attention's scores, whatever the capacity; as
many times that, if flat, as there are items for a block. B (S + M slots / BN + M / P) integers.

Legend: B batch, T tokens, S slots (places), L latent width, M groups, G groups in a window, W window; in
kernels, BT tokens, BM groups in a tile, BN places in a block, P groups in an item, NB blocks of a tile, ITEMS
room for the items of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from coga.kernels.triton_select import (
    keep_best,
    no_choice,
    product,
    read_latents,
    token_block,
    write_choice,
)

__all__ = ["Packed", "choose_packed"]


@dataclass(frozen=True)
class Packed:
    """How to walk packed members.

    flat       items of some groups in one loop, or else blocks and in them groups
    places     of a block; None: what shared memory has room for
    groups     of an item, if flat
    stages     items in flight, if flat; None: what shared memory has room for
    registers  most of a thread; None: what the compiler takes, which may leave room for one program only
    """

    flat: bool = False
    places: int | None = None
    groups: int = 4
    stages: int | None = None
    registers: int | None = None


@triton.jit
def _owners_kernel(offset_ptr, size_ptr, owner_ptr, total, places, SLOTS: tl.constexpr):
    """One program a group: it signs its places."""
    batch = (tl.program_id(0) // total).to(tl.int64)
    group = tl.program_id(0) % total
    start = tl.load(offset_ptr + batch * total + group)
    size = tl.load(size_ptr + batch * total + group)
    n = tl.arange(0, SLOTS)
    tl.store(owner_ptr + batch * places + start + n, tl.full([SLOTS], group, tl.int32), mask=n < size)


@triton.jit
def _items_kernel(
    offset_ptr,
    size_ptr,
    item_ptr,
    reach_ptr,
    total,
    NB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    P: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """One program a tile: its items, block * BM + first group, and how many reach the end of each group."""
    tiles = tl.cdiv(total, BM)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.arange(0, BM)
    m = tl.program_id(0) % tiles * BM + column
    start = tl.load(offset_ptr + batch * total + m, mask=m < total, other=0).to(tl.int32)
    size = tl.load(size_ptr + batch * total + m, mask=m < total, other=0).to(tl.int32)
    begin = tl.sum(tl.where(column == 0, start, 0), 0)
    end = start + size
    final = tl.max(end, 0)
    end = tl.where(m < total, end, final)
    block = tl.arange(0, NB)
    place = begin + block * BN
    rest = tl.minimum(place + BN, final) - 1
    low = tl.sum((end[:, None] <= place[None, :]).to(tl.int32), 0)  # owner of the first place of a block
    high = tl.sum((end[:, None] <= rest[None, :]).to(tl.int32), 0)  # and of its last
    count = tl.where(place < final, (high - low) // P + 1, 0)
    to = tl.cumsum(count, 0) - count
    item_ptr += tl.program_id(0).to(tl.int64) * ITEMS
    for i in range(0, tl.max(count, 0)):
        tl.store(item_ptr + to + i, block * BM + low + i * P, mask=i < count)
    upto = tl.minimum(count[None, :], (column[:, None] - low[None, :]) // P + 1)
    reach = tl.sum(tl.where(place[None, :] < end[:, None], upto, 0), 1)
    tl.store(reach_ptr + batch * total + m, reach, mask=m < total)


@triton.jit
def _block(place, places, BN: tl.constexpr):
    """BN places from this one, less it. Beyond the last one it comes again, which changes no maximum."""
    return tl.minimum(tl.arange(0, BN), places - 1 - place)


@triton.jit
def _keys(slot_ptr, place, n, L: tl.constexpr, LA: tl.constexpr, LB: tl.constexpr):
    """Latents of the places that a block has."""
    return read_latents(slot_ptr + place.to(tl.int64) * L + n[:, None] * L, None, L, LA, LB)


@triton.jit
def _ends_of_block(owner_ptr, place, places, BN: tl.constexpr):
    """Owners of the first and of the last of BN places."""
    low = tl.load(owner_ptr + tl.minimum(place, places - 1))
    high = tl.load(owner_ptr + tl.minimum(place + BN, places) - 1)
    return low, high


@triton.jit
def _put(score, s, owner, m, column):
    """The scores of a tile (BT, BM) after the places that group m, of this column, owns in a block."""
    top = tl.max(tl.where((owner == m)[None, :], s, -float("inf")), 1)[:, None]
    return tl.where(column[None, :], tl.maximum(score, top), score)


@triton.jit
def _tile_nested(
    score,
    q_a,
    q_b,
    slot_ptr,
    owner_ptr,
    begin,
    end,
    first,
    last,
    places,
    L: tl.constexpr,
    LA: tl.constexpr,
    LB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Scores of the groups first .. last of a tile: blocks, and the groups of each."""
    column = first + tl.arange(0, BM)
    k_a, k_b = _keys(slot_ptr, begin, _block(begin, places, BN), L, LA, LB)
    low, high = _ends_of_block(owner_ptr, begin, places, BN)
    for place in range(begin, end, BN):
        # What the next block needs is on its way while this one's groups are walked. Owners need not be: the
        # product hides them, and registers are what bounds this loop.
        ahead = place + BN
        next_a, next_b = _keys(slot_ptr, ahead, _block(ahead, places, BN), L, LA, LB)
        next_low, next_high = _ends_of_block(owner_ptr, ahead, places, BN)
        owner = tl.load(owner_ptr + place + _block(place, places, BN))
        s = product(q_a, q_b, k_a, k_b, LB)
        for m in range(low, tl.minimum(high, last) + 1):
            score = _put(score, s, owner, m, column == m)
        k_a, k_b, low, high = next_a, next_b, next_low, next_high
    return score


@triton.jit
def _tile_flat(
    score,
    q_a,
    q_b,
    slot_ptr,
    owner_ptr,
    item_ptr,
    count,
    begin,
    first,
    places,
    L: tl.constexpr,
    LA: tl.constexpr,
    LB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of the groups of a tile from its first `count` items."""
    column = first + tl.arange(0, BM)
    item = tl.load(item_ptr)
    for i in tl.range(0, count, num_stages=STAGES):
        place = begin + item // BM * BN
        n = _block(place, places, BN)
        k_a, k_b = _keys(slot_ptr, place, n, L, LA, LB)
        owner = tl.load(owner_ptr + place + n)
        m = first + item % BM
        item = tl.load(item_ptr + i + 1)  # the next one, so that no address waits for it
        s = product(q_a, q_b, k_a, k_b, LB)
        for g in tl.static_range(P):
            score = _put(score, s, owner, m + g, column == m + g)
    return score


@triton.jit
def _packed_kernel(
    q_ptr,
    slot_ptr,
    offset_ptr,
    size_ptr,
    owner_ptr,
    item_ptr,
    reach_ptr,
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
    FLAT: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    P: tl.constexpr,
    ITEMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    batch, t, real, q_a, q_b, visible = token_block(q_ptr, length, total, window, groups, L, LA, LB, BT)
    most = tl.max(tl.where(real, visible, 0), 0)
    best = no_choice(BT, KEEP, KP, WIDE)
    slot_ptr += batch * places * L
    owner_ptr += batch * places
    offset_ptr += batch * total
    size_ptr += batch * total
    tiles = tl.cdiv(most, BM)
    for i in range(0, tiles):
        tile = tiles - 1 - i
        first = tile * BM
        last = tl.minimum(first + BM, most) - 1
        begin = tl.load(offset_ptr + first).to(tl.int32)
        score = tl.full([BT, BM], -float("inf"), tl.float32)
        if FLAT:
            work = item_ptr + (batch * tl.cdiv(total, BM) + tile) * ITEMS
            count = tl.load(reach_ptr + batch * total + last)
            run = (owner_ptr, work, count, begin, first, places)
            score = _tile_flat(score, q_a, q_b, slot_ptr, *run, L, LA, LB, BM, BN, P, STAGES)
        else:
            end = (tl.load(offset_ptr + last) + tl.load(size_ptr + last)).to(tl.int32)
            run = (owner_ptr, begin, end, first, last, places)
            score = _tile_nested(score, q_a, q_b, slot_ptr, *run, L, LA, LB, BM, BN)
        m = first + tl.arange(0, BM)
        seen = (m[None, :] < visible[:, None]) & (score > -float("inf"))
        best = keep_best(best, tl.where(seen, score, 0.0), seen, m, scale, SPAN, WIDE)
    write_choice(out_ptr, best, batch * length + t, real, KEEP, KP, SPAN, WIDE)


def _owners(offset: Tensor, size: Tensor, places: int, slots: int) -> Tensor:
    """Group of each place (B, S) int32; M for those of none."""
    batch, total = offset.shape
    owner = torch.full((batch, places), total, dtype=torch.int32, device=offset.device)
    block = triton.next_power_of_2(slots)
    _owners_kernel[(batch * total,)](offset, size, owner, total, places, SLOTS=block, num_warps=1)
    return owner


def _items(
    offset: Tensor, size: Tensor, places: int, slots: int, tile: int, block: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Items of each tile (B, tiles, ITEMS + 1), where the last is read but not used; reach (B, M)."""
    batch, total = offset.shape
    tiles = triton.cdiv(total, tile)
    blocks = triton.cdiv(min(tile * slots, places), block)
    # A block of n groups is ceil(n / P) items, and the groups of all blocks are at most `tile` + blocks - 1.
    most = blocks + triton.cdiv(tile, groups) + 1
    item = torch.empty(batch, tiles, most, dtype=torch.int32, device=offset.device)
    reach = torch.empty(batch, total, dtype=torch.int32, device=offset.device)
    shape = dict(NB=triton.next_power_of_2(blocks), BM=tile, BN=block, P=groups, ITEMS=most)
    _items_kernel[(batch * tiles,)](offset, size, item, reach, total, **shape)
    return item, reach


def choose_packed(
    q: Tensor,
    slot: Tensor,
    offset: Tensor,
    size: Tensor,
    out: Tensor,
    how: Packed,
    *,
    window: int,
    groups: int,
    slots: int,
    scale: float,
    shape: dict,
    tokens: int,
    tile: int,
    warps: int,
) -> None:
    """Writes the choice of each token into `out` (B, T, K); all tensors contiguous, members packed."""
    assert how.places is not None and how.stages is not None
    batch, length, _ = q.shape
    total, places = offset.shape[1], slot.shape[1]
    owner = _owners(offset, size, places, slots)
    item = reach = owner  # not read
    most = 0
    if how.flat:
        item, reach = _items(offset, size, places, slots, tile, how.places, how.groups)
        most = item.shape[2]
    _packed_kernel[(batch * triton.cdiv(length, tokens),)](
        q,
        slot,
        offset,
        size,
        owner,
        item,
        reach,
        out,
        length,
        total,
        places,
        window,
        groups,
        scale,
        **shape,
        FLAT=how.flat,
        BT=tokens,
        BM=tile,
        BN=how.places,
        P=how.groups,
        ITEMS=most,
        STAGES=how.stages,
        num_warps=warps,
        maxnreg=how.registers,
    )
