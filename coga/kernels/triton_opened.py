"""Opened groups in Triton: every token reads the members of the K groups it opened, exactly, as tokens.

    s_hj = q_h . k_j                 j: members of the token's opened groups (slots offset .. offset+size-1)
    out_h = sum_j softmax_j(s_hj) c_j        c_j: the first C dims of k_j
    lse_h = log sum_j exp s_hj               -inf where nothing is opened

Forward and the gradient of the queries run token by token: the heads of a token are the 16 or 32 rows of one
tile, a group is one contiguous tile of latents that serves as key (two products, content and rotary part) and
as value. A program is one warp: nothing is exchanged between warps, and a dozen programs on a multiprocessor
hide each other's loads. The gradient of the latents runs group by group: `coga.kernels.triton_inverted`.

Backward, from the log-sum-exp of the whole softmax (all parts of the attention) and delta = dO . O:
    p = exp(s - lse)     ds = p (dO . c - delta)     dq = sum_j ds_j k_j

Cost: B T K S L 2 bytes through L2 in either direction (bf16), B T H K S (L + C) multiply-adds forward and
B T H K S (2 L + C) for dq. The plain twin is the `members` branch of `coga.kernels.reference`.

Legend: B batch, T tokens, H heads, C content width, P rotary width, L = C+P, M groups, K opened groups a
token, S slots of a group; in kernels, BN members in a tile, PACK groups in a
tile (small groups), CHUNKS tiles in a group (large groups).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from coga.kernels.triton_inverted import columns, product, shape_options, slot_gradient

__all__ = ["opened_backward", "opened_forward"]

MOST_LISTED = 64  # a tile compares each of its rows with each opened group

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _which(i, n, PACK: tl.constexpr, CHUNKS: tl.constexpr, BN: tl.constexpr):
    """Opened groups that tile i reads: one scalar, or one entry a row where a tile holds several groups."""
    if PACK > 1:
        k = i * PACK + n // (BN // PACK)
    else:
        k = i // CHUNKS
    return k


@triton.jit
def _open(open_ptr, k, K: tl.constexpr):
    """Id of the token's k-th opened group, -1 past the end."""
    return tl.load(open_ptr + k, mask=k < K, other=-1)


@triton.jit
def _place(offset_ptr, size_ptr, group):
    """First slot and members of a group; no members for -1."""
    start = tl.load(offset_ptr + group, mask=group >= 0, other=0).to(tl.int64)
    size = tl.load(size_ptr + group, mask=group >= 0, other=0).to(tl.int32)
    return start, size


@triton.jit
def _rows(
    slot_ptr,
    start,
    size,
    i,
    n,
    L: tl.constexpr,
    PACK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BN: tl.constexpr,
):
    """Pointers to the rows of tile i, and which of them hold a member."""
    if PACK > 1:
        member = n % (BN // PACK)
        rows = slot_ptr + (start + member)[:, None] * L
    else:
        member = n + i % CHUNKS * BN
        rows = (slot_ptr + start * L) + member[:, None] * L  # scalar base: wide loads, cheap addresses
    return rows, member < size


@triton.jit
def _listed(open_ptr, offset_ptr, size_ptr, K: tl.constexpr, KP: tl.constexpr):
    """The token's opened groups side by side (KP,): first and last + 1 of their places in one list of all
    members, and from a place in the list to a slot; in all, how many members there are.
    """
    k = tl.arange(0, KP)
    start, size = _place(offset_ptr, size_ptr, _open(open_ptr, k, K))
    end = tl.cumsum(size, 0)
    return end - size, end, start - (end - size), tl.max(end, 0)


@triton.jit
def _listed_rows(slot_ptr, place, first, end, shift, members, L: tl.constexpr):
    """Pointers to the rows of some places of the list, and which of them hold a member.

    Each place lies in one group: a masked sum finds its shift without a load.
    """
    inside = (first[:, None] <= place[None, :]) & (place[None, :] < end[:, None])
    slot = place + tl.sum(tl.where(inside, shift[:, None], 0), 0)
    return slot_ptr + slot[:, None] * L, place < members


@triton.jit
def _tiles(open_ptr, K: tl.constexpr, KP: tl.constexpr, PACK: tl.constexpr, CHUNKS: tl.constexpr):
    """How many tiles a token reads."""
    k = tl.arange(0, KP)
    group = tl.load(open_ptr + k, mask=k < K, other=-1)
    return (tl.max(tl.where(group >= 0, k + 1, 0), 0) + PACK - 1) // PACK * CHUNKS


@triton.jit
def _forward_kernel(
    q_ptr,
    slot_ptr,
    offset_ptr,
    size_ptr,
    open_ptr,
    out_ptr,
    lse_ptr,
    length,
    total,
    groups,
    H: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BH: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    PACK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LISTED: tl.constexpr,
    STAGES: tl.constexpr,
):
    L: tl.constexpr = C + P
    token = tl.program_id(0).to(tl.int64)
    batch = token // length
    slot_ptr += batch * total * L
    offset_ptr += batch * groups
    size_ptr += batch * groups
    open_ptr += token * K
    h = tl.arange(0, BH)
    c = tl.arange(0, BC)
    r = tl.arange(0, BP)
    n = tl.arange(0, BN)
    head = (h < H)[:, None]
    row = q_ptr + token * (H * L) + h[:, None] * L
    q_c = tl.load(row + c[None, :], mask=columns(head, c, C), other=0.0)
    if P > 0:
        q_r = tl.load(row + C + r[None, :], mask=columns(head, r, P), other=0.0)
    m = tl.full([BH], -float("inf"), tl.float32)
    norm = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, BC], tl.float32)
    if LISTED:
        first, end, shift, members = _listed(open_ptr, offset_ptr, size_ptr, K, KP)
        tiles = (members + BN - 1) // BN
    else:
        tiles = _tiles(open_ptr, K, KP, PACK, CHUNKS)
        # Ids run two tiles ahead and places one, so that no address waits for a load of its own tile.
        start, size = _place(offset_ptr, size_ptr, _open(open_ptr, _which(0, n, PACK, CHUNKS, BN), K))
        group = _open(open_ptr, _which(1, n, PACK, CHUNKS, BN), K)
    for i in tl.range(0, tiles, num_stages=STAGES):
        if LISTED:
            rows, live = _listed_rows(slot_ptr, i * BN + n, first, end, shift, members, L)
        else:
            rows, live = _rows(slot_ptr, start, size, i, n, L, PACK, CHUNKS, BN)
        k_c = tl.load(rows + c[None, :], mask=columns(live[:, None], c, C), other=0.0)
        s = product(q_c, k_c)
        if P > 0:
            k_r = tl.load(rows + C + r[None, :], mask=columns(live[:, None], r, P), other=0.0)
            s = product(q_r, k_r, s)
        s = tl.where(live[None, :], s, -float("inf"))
        higher = tl.maximum(m, tl.max(s, 1) * LOG2E)
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(s * LOG2E - safe[:, None])
        old = tl.exp2(m - safe)
        norm = norm * old + tl.sum(p, 1)
        acc = tl.dot(p.to(k_c.dtype), k_c, acc * old[:, None], input_precision="ieee")
        m = higher
        if not LISTED:
            start, size = _place(offset_ptr, size_ptr, group)
            group = _open(open_ptr, _which(i + 2, n, PACK, CHUNKS, BN), K)
    some = norm > 0
    norm = tl.where(some, norm, 1.0)
    out = acc / norm[:, None]
    lse = tl.where(some, (m + tl.log2(norm)) / LOG2E, -float("inf"))
    target = out_ptr + token * (H * C) + h[:, None] * C + c[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=columns(head, c, C))
    tl.store(lse_ptr + token * H + h, lse, mask=h < H)


@triton.jit
def _query_kernel(
    grad_ptr,
    lse_ptr,
    delta_ptr,
    q_ptr,
    slot_ptr,
    offset_ptr,
    size_ptr,
    open_ptr,
    dq_ptr,
    length,
    total,
    groups,
    H: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BH: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    PACK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LISTED: tl.constexpr,
    STAGES: tl.constexpr,
):
    L: tl.constexpr = C + P
    token = tl.program_id(0).to(tl.int64)
    batch = token // length
    slot_ptr += batch * total * L
    offset_ptr += batch * groups
    size_ptr += batch * groups
    open_ptr += token * K
    h = tl.arange(0, BH)
    c = tl.arange(0, BC)
    r = tl.arange(0, BP)
    n = tl.arange(0, BN)
    head = (h < H)[:, None]
    row = q_ptr + token * (H * L) + h[:, None] * L
    q_c = tl.load(row + c[None, :], mask=columns(head, c, C), other=0.0)
    grad = tl.load(
        grad_ptr + token * (H * C) + h[:, None] * C + c[None, :], mask=columns(head, c, C), other=0.0
    )
    lse = tl.load(lse_ptr + token * H + h, mask=h < H, other=float("inf"))
    delta = tl.load(delta_ptr + token * H + h, mask=h < H, other=0.0)
    dq_c = tl.zeros([BH, BC], tl.float32)
    if P > 0:
        q_r = tl.load(row + C + r[None, :], mask=columns(head, r, P), other=0.0)
        dq_r = tl.zeros([BH, BP], tl.float32)
    if LISTED:
        first, end, shift, members = _listed(open_ptr, offset_ptr, size_ptr, K, KP)
        tiles = (members + BN - 1) // BN
    else:
        tiles = _tiles(open_ptr, K, KP, PACK, CHUNKS)
        start, size = _place(offset_ptr, size_ptr, _open(open_ptr, _which(0, n, PACK, CHUNKS, BN), K))
        group = _open(open_ptr, _which(1, n, PACK, CHUNKS, BN), K)
    for i in tl.range(0, tiles, num_stages=STAGES):
        if LISTED:
            rows, live = _listed_rows(slot_ptr, i * BN + n, first, end, shift, members, L)
        else:
            rows, live = _rows(slot_ptr, start, size, i, n, L, PACK, CHUNKS, BN)
        k_c = tl.load(rows + c[None, :], mask=columns(live[:, None], c, C), other=0.0)
        s = product(q_c, k_c)
        if P > 0:
            k_r = tl.load(rows + C + r[None, :], mask=columns(live[:, None], r, P), other=0.0)
            s = product(q_r, k_r, s)
        p = tl.where(live[None, :], tl.exp2(s * LOG2E - lse[:, None]), 0.0)
        dp = product(grad, k_c)
        ds = (p * (dp - delta[:, None])).to(k_c.dtype)
        dq_c = tl.dot(ds, k_c, dq_c, input_precision="ieee")
        if P > 0:
            dq_r = tl.dot(ds, k_r, dq_r, input_precision="ieee")
        if not LISTED:
            start, size = _place(offset_ptr, size_ptr, group)
            group = _open(open_ptr, _which(i + 2, n, PACK, CHUNKS, BN), K)
    target = dq_ptr + token * (H * L) + h[:, None] * L
    tl.store(target + c[None, :], dq_c.to(dq_ptr.dtype.element_ty), mask=columns(head, c, C))
    if P > 0:
        tl.store(target + C + r[None, :], dq_r.to(dq_ptr.dtype.element_ty), mask=columns(head, r, P))


def launch_options(
    shape: dict, slots: int, *, mean: int | None = None, exact: bool = False, tile: int = 32
) -> dict:
    """Compile-time shape and launch of the token-by-token kernels; `exact`: float32, off the tensor cores.

    A group has room for `slots` members and on average holds `mean` (if not given, all of them): where there
    is more room than members, tiles run over a list of all members, and only the last one is not full.
    One warp for 16 heads of up to 192 dims; twice that where the accumulators would spill.
    """
    heads = triton.next_power_of_2(shape["H"])
    warps = max(1, heads // 16) * (1 if shape["C"] + shape["P"] <= 192 else 2)
    if exact:
        tile, warps = 16, 8
    listed = mean is not None and slots > mean and shape["K"] <= MOST_LISTED
    power = triton.next_power_of_2(slots)
    pack = max(1, tile // power)
    chunks = 1 if pack > 1 else triton.cdiv(slots, tile)
    return shape | dict(
        KP=triton.next_power_of_2(shape["K"]),
        BH=max(16, heads),
        BN=tile,
        PACK=pack,
        CHUNKS=chunks,
        LISTED=listed,
        STAGES=3 if listed else 2,
        num_warps=warps,
    )


def _check(q, slot, offset, size, open_BTK, content, slots) -> None:
    assert q.dtype == slot.dtype
    assert q.dtype in (torch.bfloat16, torch.float16, torch.float32)
    assert q.shape[-1] == slot.shape[-1] >= content > 0
    assert slots > 0
    assert offset.shape == size.shape
    assert open_BTK.shape[:2] == q.shape[:2]


def opened_forward(
    q_BTHL: Tensor,
    slot_BSL: Tensor,
    offset_BM: Tensor,
    size_BM: Tensor,
    open_BTK: Tensor,
    *,
    content: int,
    slots: int,
    mean: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, C), normalised by its own log-sum-exp (B, T, H) in float32 (-inf: nothing opened)."""
    _check(q_BTHL, slot_BSL, offset_BM, size_BM, open_BTK, content, slots)
    batch, length, heads, width = q_BTHL.shape
    q, slot, offset, size, open_groups = (
        x.contiguous() for x in (q_BTHL, slot_BSL, offset_BM, size_BM, open_BTK)
    )
    count = open_groups.shape[-1]
    if count == 0 or slot.shape[1] == 0 or q.numel() == 0:
        lse = q.new_full((batch, length, heads), -torch.inf, dtype=torch.float32)
        return q.new_zeros(batch, length, heads, content), lse
    out = q.new_empty(batch, length, heads, content)
    lse = q.new_empty(batch, length, heads, dtype=torch.float32)
    exact = q.dtype == torch.float32
    shape = shape_options(heads, content, width - content, count)
    options = launch_options(shape, slots, mean=mean, exact=exact)
    _forward_kernel[(batch * length,)](
        q,
        slot,
        offset,
        size,
        open_groups,
        out,
        lse,
        length,
        slot.shape[1],
        offset.shape[1],
        **options,
    )
    return out, lse


def query_gradient(
    grad, lse, delta, q, slot, offset, size, open_groups, *, content: int, slots: int, mean: int | None = None
) -> Tensor:
    """dq (B, T, H, L) in the dtype of q from contiguous inputs; `lse` as `scaled_lse` makes it."""
    batch, length, heads, width = q.shape
    dq = torch.empty_like(q)
    count, exact = open_groups.shape[-1], q.dtype == torch.float32
    shape = shape_options(heads, content, width - content, count)
    options = launch_options(shape, slots, mean=mean, exact=exact)
    _query_kernel[(batch * length,)](
        grad,
        lse,
        delta,
        q,
        slot,
        offset,
        size,
        open_groups,
        dq,
        length,
        slot.shape[1],
        offset.shape[1],
        **options,
    )
    return dq


def scaled_lse(lse_BTH: Tensor) -> Tensor:
    """Log-sum-exp in base 2: p = exp2(s log2 e - lse); +inf, so p = 0, for a row that read nothing."""
    return torch.where(lse_BTH == -torch.inf, torch.inf, lse_BTH.float() * LOG2E.value)


def opened_backward(
    grad_BTHC: Tensor,
    lse_BTH: Tensor,
    delta_BTH: Tensor,
    q_BTHL: Tensor,
    slot_BSL: Tensor,
    offset_BM: Tensor,
    size_BM: Tensor,
    open_BTK: Tensor,
    *,
    content: int,
    slots: int,
    mean: int | None = None,
    queries_done: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries (B, T, H, L), in their dtype, and of latents in slot order (B, S, L) in float32.

    `lse_BTH` is the log-sum-exp of the whole softmax, `delta_BTH` = dO . O of the merged output.
    `queries_done` is called when the gradient of the queries has been launched.
    Deterministic: every sum has a fixed order.
    """
    _check(q_BTHL, slot_BSL, offset_BM, size_BM, open_BTK, content, slots)
    if open_BTK.shape[-1] == 0 or slot_BSL.shape[1] == 0 or q_BTHL.numel() == 0:
        return torch.zeros_like(q_BTHL), torch.zeros_like(slot_BSL, dtype=torch.float32)
    rows = (grad_BTHC.to(q_BTHL.dtype), scaled_lse(lse_BTH), delta_BTH.float(), q_BTHL)
    tensors = [x.contiguous() for x in (*rows, slot_BSL, offset_BM, size_BM, open_BTK)]
    room = dict(content=content, slots=slots, mean=mean)
    dq = query_gradient(*tensors, **room)
    if queries_done is not None:
        queries_done()
    return dq, slot_gradient(*tensors, **room)
