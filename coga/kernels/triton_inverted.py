"""Gradient of the latents that opened groups lend, group by group, through an inverted index (Triton).

Opening is a relation (token, group). Token by token, the gradient of a latent would be a race between all the
tokens that read it. Turned round, each group has the list of tokens that opened it, and sums over that list:

    dk_j = sum_{t opened j's group, h} ds_thj q_th + [first C dims] p_thj dO_th
    p = exp(q . k - lse)     ds = p (dO . c - delta)

The list of pairs is sorted by group (a stable sort of B T K small integers), cut into segments of about
SEGMENT pairs, however many tokens a group drew, and each segment is one program: rows are (token, head),
packed without gaps, members are the rows of the score tile. Segments write partial sums, which a second
kernel adds in order: the result is deterministic and needs no atomics. To keep queries in cache, the list is
first cut into blocks of `BLOCK` tokens, so that programs that run together read the same tokens.

Cost: B T K H (L + C) 2 bytes of queries and gradients (bf16), B T K H S (2 L + 2 C) multiply-adds.

Legend: B batch, T tokens, H heads, C content width, P rotary width, L = C+P, M groups of a row, K opened
groups a token, S slots of a group; a list is one (row, block, group), V of them; N = B T K pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Inverted", "invert", "slot_gradient"]

SEGMENT = 256  # pairs a program sums at most
BLOCK = 8192  # tokens whose queries and gradients (4 KB each at 12 heads of 96) share the cache

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Inverted:
    """Pairs (token, opened group) sorted by list.

    order_N    int64, pairs (flat over B, T, K) by list, then by token
    first_V    int64 (V+1), where each list starts in `order_N`
    end_V      int64, segments of lists 0 .. v
    owner      int64 (programs), list of each segment; V where there is no such segment
    blocks     lists of a group in each row
    """

    order_N: Tensor
    first_V: Tensor
    end_V: Tensor
    owner: Tensor
    blocks: int


def invert(open_BTK: Tensor, groups: int, *, segment: int = SEGMENT, block: int = BLOCK) -> Inverted:
    """Lists of the tokens that opened each of `groups` groups; static shapes, no host synchronisation."""
    batch, length, count = open_BTK.shape
    device = open_BTK.device
    blocks = triton.cdiv(length, block)
    lists = batch * blocks * groups
    small = torch.int16 if lists < 2**15 else torch.int32  # fewer radix passes
    base = torch.arange(batch, device=device)[:, None] * blocks + torch.arange(length, device=device) // block
    key = torch.where(open_BTK >= 0, base[..., None] * groups + open_BTK, lists).to(small)
    key, order = key.flatten().sort(stable=True)
    first = torch.searchsorted(key, torch.arange(lists + 1, device=device, dtype=small))
    end = ((first.diff() + segment - 1) // segment).cumsum(0)
    programs = batch * length * count // segment + lists
    owner = torch.searchsorted(end, torch.arange(programs, device=device), right=True)
    return Inverted(order, first, end, owner, blocks)


@triton.jit
def _token(order_ptr, pair, count, K: tl.constexpr):
    """Token (flat over B, T) of a pair of the segment. Unsigned: division by a constant is then one shift."""
    return (tl.load(order_ptr + pair, mask=pair < count, other=0).to(tl.uint32) // K).to(tl.int32)


@triton.jit
def _segment_kernel(
    grad_ptr,
    lse_ptr,
    delta_ptr,
    q_ptr,
    slot_ptr,
    offset_ptr,
    size_ptr,
    order_ptr,
    first_ptr,
    end_ptr,
    owner_ptr,
    partial_ptr,
    total,
    groups,
    blocks,
    lists,
    H: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    L: tl.constexpr = C + P
    program = tl.program_id(0).to(tl.int64)
    owner = tl.load(owner_ptr + program)
    if owner >= lists:
        return
    # The list's pairs, shared out evenly among its segments.
    low = tl.load(first_ptr + owner)
    pairs = tl.load(first_ptr + owner + 1) - low
    before = tl.load(end_ptr + owner - 1, mask=owner > 0, other=0)
    segments = tl.load(end_ptr + owner) - before
    last = low + (program - before + 1) * pairs // segments
    low += (program - before) * pairs // segments
    batch = owner // (blocks * groups)
    group = batch * groups + owner % groups
    start = tl.load(offset_ptr + group) + batch * total
    size = tl.load(size_ptr + group)

    c = tl.arange(0, BC)
    r = tl.arange(0, BP)
    n = tl.arange(0, BN)
    member = tl.program_id(1) * BS + tl.arange(0, BS)
    live = (member < size)[:, None]
    rows = (slot_ptr + start * L) + member[:, None] * L
    k_c = tl.load(rows + c[None, :], mask=live & (c < C)[None, :], other=0.0)
    acc_c = tl.zeros([BS, BC], tl.float32)
    if P > 0:
        k_r = tl.load(rows + C + r[None, :], mask=live & (r < P)[None, :], other=0.0)
        acc_r = tl.zeros([BS, BP], tl.float32)
    order_ptr += low
    count = (last - low).to(tl.int32)
    token = _token(order_ptr, n // H, count, K)
    for i in tl.range(0, count * H, BN, num_stages=STAGES):
        row = i + n
        real = row < count * H
        line = (token * H + row % H).to(tl.int64)
        at = q_ptr + line[:, None] * L
        q_c = tl.load(at + c[None, :], mask=real[:, None] & (c < C)[None, :], other=0.0)
        s = tl.dot(k_c, tl.trans(q_c), input_precision="ieee")
        if P > 0:
            q_r = tl.load(at + C + r[None, :], mask=real[:, None] & (r < P)[None, :], other=0.0)
            s = tl.dot(k_r, tl.trans(q_r), s, input_precision="ieee")
        grad = tl.load(
            grad_ptr + line[:, None] * C + c[None, :], mask=real[:, None] & (c < C)[None, :], other=0.0
        )
        lse = tl.load(lse_ptr + line, mask=real, other=float("inf"))
        lse = tl.where(lse == -float("inf"), float("inf"), lse) * LOG2E
        delta = tl.load(delta_ptr + line, mask=real, other=0.0)
        p = tl.exp2(s * LOG2E - lse[None, :])
        dp = tl.dot(k_c, tl.trans(grad), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q_c.dtype)
        acc_c = tl.dot(p.to(q_c.dtype), grad, acc_c, input_precision="ieee")
        acc_c = tl.dot(ds, q_c, acc_c, input_precision="ieee")
        if P > 0:
            acc_r = tl.dot(ds, q_r, acc_r, input_precision="ieee")
        token = _token(order_ptr, (i + BN + n) // H, count, K)
    target = partial_ptr + program * (SLOTS * L) + member[:, None] * L
    inside = (member < SLOTS)[:, None]
    tl.store(target + c[None, :], acc_c, mask=inside & (c < C)[None, :])
    if P > 0:
        tl.store(target + C + r[None, :], acc_r, mask=inside & (r < P)[None, :])


@triton.jit
def _reduce_kernel(
    partial_ptr,
    end_ptr,
    offset_ptr,
    size_ptr,
    out_ptr,
    total,
    groups,
    blocks,
    SIZE: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of the partial gradients of one group, block after block, segment after segment."""
    group = tl.program_id(0).to(tl.int64)
    batch = group // groups
    start = tl.load(offset_ptr + group) + batch * total
    size = tl.load(size_ptr + group)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for block in range(0, blocks):
        owner = (batch * blocks + block) * groups + group % groups
        before = tl.load(end_ptr + owner - 1, mask=owner > 0, other=0)
        end = tl.load(end_ptr + owner)
        for segment in range(before, end):
            acc += tl.load(partial_ptr + segment * SIZE + e, mask=e < SIZE, other=0.0)
    tl.store(out_ptr + start * L + e, acc, mask=e < size * L)


def launch_options(heads: int, content: int, rotary: int, count: int, slots: int) -> dict:
    """Compile-time shape and launch of the segment kernel."""
    return dict(
        H=heads,
        C=content,
        P=rotary,
        K=count,
        BC=max(16, triton.next_power_of_2(content)),
        BP=max(16, triton.next_power_of_2(max(rotary, 1))),
        BS=min(64, max(16, triton.next_power_of_2(slots))),
        BN=32,
        SLOTS=slots,
        STAGES=3,
        num_warps=1,
    )


def slot_gradient(
    grad,
    lse,
    delta,
    q,
    slot,
    offset,
    size,
    open_groups,
    *,
    content: int,
    slots: int,
    index: Inverted | None = None,
) -> Tensor:
    """dslot (B, S, L) in float32 from contiguous inputs; slots of no group get zero."""
    batch, length, heads, width = q.shape
    assert batch * length * heads < 2**31
    groups, total = offset.shape[1], slot.shape[1]
    if index is None:
        index = invert(open_groups, groups)
    lists = batch * index.blocks * groups
    programs = index.owner.shape[0]
    partial = q.new_empty(programs, slots, width, dtype=torch.float32)
    options = launch_options(heads, content, width - content, open_groups.shape[-1], slots)
    _segment_kernel[(programs, triton.cdiv(slots, options["BS"]))](
        grad,
        lse,
        delta,
        q,
        slot,
        offset,
        size,
        index.order_N,
        index.first_V,
        index.end_V,
        index.owner,
        partial,
        total,
        groups,
        index.blocks,
        lists,
        **options,
    )
    out = q.new_zeros(batch, total, width, dtype=torch.float32)
    span = min(1024, triton.next_power_of_2(slots * width))
    _reduce_kernel[(batch * groups, triton.cdiv(slots * width, span))](
        partial,
        index.end_V,
        offset,
        size,
        out,
        total,
        groups,
        index.blocks,
        SIZE=slots * width,
        L=width,
        BLOCK=span,
        num_warps=4,
    )
    return out
