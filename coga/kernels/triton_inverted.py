"""Gradient of the latents that opened groups lend, group by group, through an inverted index (Triton).

Opening is a relation (token, group). Token by token, the gradient of a latent would be a race between all the
tokens that read it. Turned round, each group has the list of tokens that opened it, and sums over that list:

    dk_j = sum_{t opened j's group, h} ds_thj q_th + [first C dims] p_thj dO_th
    p = exp(q . k - lse)     ds = p (dO . c - delta)

The pairs are sorted by group (a stable sort of B T K small integers) and each list is cut evenly into
segments of at most SEGMENT pairs, however many tokens a group drew. A segment is one program: the columns of
its score tile are (token, head), packed without gaps, the rows are members. Segments write partial sums,
which a second kernel adds in order: the result is deterministic and needs no atomics. Shapes are static; the
host never waits.

Cost: B T K H (L + C) 2 bytes of queries and gradients (bf16), B T K H S (2 L + 2 C) multiply-adds, and
(B T K / SEGMENT + B M) S L 4 bytes of partial sums.

Legend: B batch, T tokens, H heads, C content width, P rotary width, L = C+P, M groups of a row, K opened
groups a token, S slots of a group; V = B M lists, N = B T K pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Inverted", "invert", "slot_gradient"]

SEGMENT = 256  # most pairs a program sums

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Inverted:
    """Pairs (token, opened group) sorted by list.

    order_N    int64, pairs (flat over B, T, K) by list, then by token
    first_V    int32 (V+1), where each list starts in `order_N`
    end_V      int64, segments of lists 0 .. v
    owner      int32 (programs), list of each segment; V where there is no such segment
    """

    order_N: Tensor
    first_V: Tensor
    end_V: Tensor
    owner: Tensor


@triton.jit
def _key_kernel(open_ptr, key_ptr, pairs, row, groups, lists, BLOCK: tl.constexpr):
    """List of each pair: row of the batch, then group; `lists` for an entry that opens nothing."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group = tl.load(open_ptr + n, mask=n < pairs, other=-1)
    key = tl.where(group >= 0, n // row * groups + group, lists)
    tl.store(key_ptr + n, key.to(key_ptr.dtype.element_ty), mask=n < pairs)


@triton.jit
def _lower_bound(sorted_ptr, count, value, STEPS: tl.constexpr):
    """First position in a sorted row of `count` whose entry is at least `value`."""
    low = tl.zeros_like(value)
    high = low + count
    for _ in range(STEPS):
        middle = (low + high) // 2
        entry = tl.load(sorted_ptr + middle, mask=middle < high, other=0).to(tl.int32)
        below = (entry < value) & (middle < high)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _bound_kernel(
    key_ptr,
    first_ptr,
    segments_ptr,
    pairs,
    lists,
    SEGMENT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where each list starts, and how many segments it has."""
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = _lower_bound(key_ptr, pairs, v, STEPS)
    last = _lower_bound(key_ptr, pairs, v + 1, STEPS)
    tl.store(first_ptr + v, first, mask=v <= lists)
    tl.store(segments_ptr + v, (last - first + SEGMENT - 1) // SEGMENT, mask=v < lists)


@triton.jit
def _owner_kernel(end_ptr, owner_ptr, programs, lists, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """List of each segment: the first whose last segment comes after it."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(owner_ptr + p, _lower_bound(end_ptr, lists, p + 1, STEPS), mask=p < programs)


def invert(open_BTK: Tensor, groups: int, *, segment: int = SEGMENT) -> Inverted:
    """Lists of the tokens that opened each of `groups` groups of a row, for contiguous `open_BTK`."""
    batch, length, count = open_BTK.shape
    pairs, lists = open_BTK.numel(), batch * groups
    assert max(pairs, lists) < 2**30
    small = torch.int16 if lists < 2**15 else torch.int32  # fewer radix passes
    key = torch.empty(pairs, dtype=small, device=open_BTK.device)
    _key_kernel[(triton.cdiv(pairs, 1024),)](open_BTK, key, pairs, length * count, groups, lists, BLOCK=1024)
    key, order = key.sort(stable=True)
    first = torch.empty(lists + 1, dtype=torch.int32, device=key.device)
    segments = torch.empty(lists, dtype=torch.int32, device=key.device)
    _bound_kernel[(triton.cdiv(lists + 1, 64),)](
        key, first, segments, pairs, lists, SEGMENT=segment, STEPS=pairs.bit_length(), BLOCK=64, num_warps=2
    )
    end = segments.cumsum(0)
    owner = torch.empty(pairs // segment + lists, dtype=torch.int32, device=key.device)
    _owner_kernel[(triton.cdiv(len(owner), 64),)](
        end, owner, len(owner), lists, STEPS=lists.bit_length(), BLOCK=64, num_warps=2
    )
    return Inverted(order, first, end, owner)


@triton.jit
def columns(rows, c, C: tl.constexpr):
    """Mask of a tile: these rows, and the first C columns where the tile is wider."""
    if c.shape[0] == C:
        mask = rows
    else:
        mask = rows & (c < C)[None, :]
    return mask


@triton.jit
def _halves(x):
    """Left and right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def product(x, y, start=None):
    """x @ y^T (+ start), in float32.

    float32 operands are summed in up to four parts: one chain of L additions would round twice as much as
    plain PyTorch does.
    """
    if x.dtype == tl.float32 and x.shape[1] >= 64:
        x0, x1 = _halves(x)
        y0, y1 = _halves(y)
        xa, xb = _halves(x0)
        xc, xd = _halves(x1)
        ya, yb = _halves(y0)
        yc, yd = _halves(y1)
        left = tl.dot(xa, tl.trans(ya), input_precision="ieee") + tl.dot(
            xb, tl.trans(yb), input_precision="ieee"
        )
        right = tl.dot(xc, tl.trans(yc), input_precision="ieee") + tl.dot(
            xd, tl.trans(yd), input_precision="ieee"
        )
        s = left + right
        if start is not None:
            s += start
    elif start is not None:
        if x.dtype == tl.float32:
            s = start + tl.dot(x, tl.trans(y), input_precision="ieee")
        else:
            s = tl.dot(x, tl.trans(y), start)
    else:
        s = tl.dot(x, tl.trans(y), input_precision="ieee")
    return s


@triton.jit
def _token(order_ptr, pair, count, K: tl.constexpr):
    """Token (flat over B, T) of a pair of the segment; past the end, of its last pair.

    Unsigned: the division by a constant is then one shift.
    """
    return (tl.load(order_ptr + tl.minimum(pair, count - 1)).to(tl.uint32) // K).to(tl.int32)


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
    low = tl.load(first_ptr + owner).to(tl.int64)
    pairs = tl.load(first_ptr + owner + 1) - low
    before = tl.load(end_ptr + owner - 1, mask=owner > 0, other=0)
    segments = tl.load(end_ptr + owner) - before
    last = low + (program - before + 1) * pairs // segments
    low += (program - before) * pairs // segments
    start = tl.load(offset_ptr + owner) + (owner // groups).to(tl.int64) * total
    size = tl.load(size_ptr + owner)

    c = tl.arange(0, BC)
    r = tl.arange(0, BP)
    n = tl.arange(0, BN)
    if tl.program_id(1) * BS >= size:  # nobody is there, and nobody reads what stays unwritten
        return
    member = tl.program_id(1) * BS + tl.arange(0, BS)
    live = (member < size)[:, None]
    every = (n >= 0)[:, None]
    rows = (slot_ptr + start * L) + member[:, None] * L
    k_c = tl.load(rows + c[None, :], mask=columns(live, c, C), other=0.0)
    acc_c = tl.zeros([BS, BC], tl.float32)
    if P > 0:
        k_r = tl.load(rows + C + r[None, :], mask=columns(live, r, P), other=0.0)
        acc_r = tl.zeros([BS, BP], tl.float32)
    order_ptr += low
    count = (last - low).to(tl.int32)
    token = _token(order_ptr, n // H, count, K)
    for i in tl.range(0, count * H, BN, num_stages=STAGES):
        # Columns past the end repeat the last pair and count for nothing: their p is zero.
        column = i + n
        line = (token * H + column % H).to(tl.int64)
        at = q_ptr + line[:, None] * L
        q_c = tl.load(at + c[None, :], mask=columns(every, c, C), other=0.0)
        s = product(k_c, q_c)
        if P > 0:
            q_r = tl.load(at + C + r[None, :], mask=columns(every, r, P), other=0.0)
            s = product(k_r, q_r, s)
        grad = tl.load(grad_ptr + line[:, None] * C + c[None, :], mask=columns(every, c, C), other=0.0)
        lse = tl.load(lse_ptr + line, mask=column < count * H, other=float("inf"))
        delta = tl.load(delta_ptr + line)
        p = tl.exp2(s * LOG2E - lse[None, :])
        dp = product(k_c, grad)
        ds = (p * (dp - delta[None, :])).to(q_c.dtype)
        acc_c = tl.dot(p.to(q_c.dtype), grad, acc_c, input_precision="ieee")
        acc_c = tl.dot(ds, q_c, acc_c, input_precision="ieee")
        if P > 0:
            acc_r = tl.dot(ds, q_r, acc_r, input_precision="ieee")
        token = _token(order_ptr, (i + BN + n) // H, count, K)
    target = partial_ptr + program * (SLOTS * L) + member[:, None] * L
    inside = (member < SLOTS)[:, None]
    tl.store(target + c[None, :], acc_c, mask=columns(inside, c, C))
    if P > 0:
        tl.store(target + C + r[None, :], acc_r, mask=columns(inside, r, P))


@triton.jit
def _reduce_kernel(
    partial_ptr,
    end_ptr,
    offset_ptr,
    size_ptr,
    out_ptr,
    total,
    groups,
    SIZE: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of the partial gradients of one group, segment after segment."""
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(offset_ptr + group) + group // groups * total
    size = tl.load(size_ptr + group)
    before = tl.load(end_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(end_ptr + group)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for segment in range(before, end):
        acc += tl.load(partial_ptr + segment * SIZE + e, mask=e < size * L, other=0.0)
    tl.store(out_ptr + start * L + e, acc, mask=e < size * L)


def shape_options(heads: int, content: int, rotary: int, count: int) -> dict:
    """Compile-time shape that all kernels of opened groups share; BC, BP: widths of their tiles."""
    return dict(
        H=heads,
        C=content,
        P=rotary,
        K=count,
        BC=max(16, triton.next_power_of_2(content)),
        BP=max(16, triton.next_power_of_2(max(rotary, 1))),
    )


def launch_options(shape: dict, slots: int, *, mean: int | None = None, exact: bool = False) -> dict:
    """Compile-time shape and launch of the segment kernel; `exact`: float32, off the tensor cores.

    A program sums as many members as a group holds on average, if they fit, and ends at once where there are
    none.
    A warp sums 32 members of up to 96 dims, or 16 wider ones, without spilling its accumulators. One buffer
    (STAGES 2) beats two: the next rows arrive while the warp works from registers, and more programs fit.
    """
    narrow = shape["C"] + shape["P"] <= 96
    most = 32 if narrow and not exact else 64  # two programs of one warp are faster than one of two
    members = min(most, max(16, triton.next_power_of_2(min(slots, mean or slots))))
    warps = max(1, members // (32 if narrow else 16))
    return shape | dict(
        BS=members,
        BN=16 if exact else 32 if narrow or warps == 1 else 64,
        SLOTS=slots,
        STAGES=2,
        num_warps=8 if exact else warps,
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
    mean: int | None = None,
    index: Inverted | None = None,
) -> Tensor:
    """dslot (B, S, L) in float32 from contiguous inputs; slots of no group get zero.

    `lse` is in base 2, +inf where a row read nothing.
    """
    batch, length, heads, width = q.shape
    assert batch * length * heads < 2**31
    groups, total = offset.shape[1], slot.shape[1]
    if index is None:
        index = invert(open_groups, groups)
    partial = q.new_empty(len(index.owner), slots, width, dtype=torch.float32)
    count, exact = open_groups.shape[-1], q.dtype == torch.float32
    shape = shape_options(heads, content, width - content, count)
    options = launch_options(shape, slots, mean=mean, exact=exact)
    _segment_kernel[(len(index.owner), triton.cdiv(slots, options["BS"]))](
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
        batch * groups,
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
        SIZE=slots * width,
        L=width,
        BLOCK=span,
        num_warps=4,
    )
    return out
