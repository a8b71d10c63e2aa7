"""Capacity assignment in Triton: one program a window runs all rounds of proposals.

In rounds, every unplaced token proposes to its best group that has room, and a group takes the best-scored
proposals until it is full: the rule, ties included, of `coga.kernels.capacity.assign`. A proposal is one
64-bit key, (group, falling score, token), and its rank among the proposals of its group is a count of smaller
keys. The keys of the tokens still unplaced are packed to the front of a scratch row, so the count costs
W x unplaced comparisons, and after the first round few are left.

Cost: about 1.5 W^2 comparisons a window and at most G rounds of W G choices; no sort; the host never waits.

Legend: N windows, W tokens in a window, G groups in a window; in the kernel BW, BG powers of two above them,
GC groups in a tile, JC keys compared at a time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from coga.kernels import capacity
from coga.kernels.triton_select import rint

__all__ = ["assign"]

WIDEST = 4096  # tokens of a window that fit in the 12 bits of a key


@triton.jit
def _assign_kernel(
    score_ptr,
    out_ptr,
    key_ptr,
    room_ptr,
    width,
    groups,
    slots,
    scale,
    BW: tl.constexpr,
    BG: tl.constexpr,
    GC: tl.constexpr,
    JC: tl.constexpr,
):
    window = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, BW)
    score_ptr += (window * width + w)[:, None] * groups
    key_ptr += window * BW
    room_ptr += window * BG
    every = tl.arange(0, BG)
    tl.store(room_ptr + every, tl.where(every < groups, slots, 0))
    placed = tl.zeros([BW], tl.int32)
    waiting = w < width
    left = width
    tl.debug_barrier()
    while left > 0:
        # The best group with room: higher rounded score, then lower group.
        value = tl.full([BW], -float("inf"), tl.float32)
        choice = tl.full([BW], BG, tl.int32)
        for first in range(0, BG, GC):
            g = first + tl.arange(0, GC)
            inside = waiting[:, None] & (g < groups)[None, :]
            score = rint(tl.load(score_ptr + g[None, :], mask=inside, other=0.0).to(tl.float32) * scale)
            score = tl.where((tl.load(room_ptr + g) > 0)[None, :], score, -float("inf"))
            high = tl.max(score, 1)
            where = tl.min(tl.where(score == high[:, None], g[None, :], BG), 1)
            better = high > value
            choice = tl.where(better, where, choice)
            value = tl.where(better, high, value)
        # Falling score as an unsigned 32-bit field: order-preserving bits of the float, inverted.
        bits = (value + 0.0).to(tl.int32, bitcast=True)
        rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        key = (choice.to(tl.int64) << 44) | ((2147483647 - rising) << 12) | w
        # Packed to the front; the rest of the row holds keys above all others, so that it is read unmasked.
        ahead = tl.cumsum(waiting.to(tl.int32), 0)
        at = tl.where(waiting, ahead - 1, left + w - ahead)
        tl.store(key_ptr + at, tl.where(waiting, key, 0x7FFFFFFFFFFFFFFF))
        tl.debug_barrier()
        rank = tl.zeros([BW], tl.int32)
        for first in range(0, left, JC):
            other = tl.load(key_ptr + first + tl.arange(0, JC))
            rank += tl.sum((other[:, None] < key[None, :]).to(tl.int32), 0)
        # `rank` counts proposals to lower groups too: limit = those + the room of the own group.
        limit = tl.zeros([BW], tl.int32)
        below = 0
        for first in range(0, BG, GC):
            g = first + tl.arange(0, GC)
            own = waiting[:, None] & (choice[:, None] == g[None, :])
            count = tl.sum(own.to(tl.int32), 0)
            room = tl.load(room_ptr + g)
            start = below + tl.cumsum(count, 0) - count
            limit += tl.sum(tl.where(own, (start + room)[None, :], 0), 1)
            below += tl.sum(count, 0)
            tl.store(room_ptr + g, room - tl.minimum(room, count))
        taken = waiting & (rank < limit)
        placed = tl.where(taken, choice, placed)
        waiting = waiting & (rank >= limit)
        left = tl.sum(waiting.to(tl.int32), 0)
        tl.debug_barrier()
    tl.store(out_ptr + window * width + w, placed.to(tl.int64), mask=w < width)


def assign(
    score_NWG: Tensor, slots: int, step: float, *, warps: int | None = None, chunk: int = 16
) -> Tensor:
    """`coga.kernels.capacity.assign`: group (N, W) int64 of each token, at most `slots` tokens a group.

    float64 scores, and windows of more than `WIDEST` tokens, run the reference.
    """
    windows, width, groups = score_NWG.shape
    if groups * slots < width:
        raise ValueError(f"slots={slots}: {groups} groups of {slots} cannot hold {width} tokens")
    if score_NWG.dtype == torch.float64 or width > WIDEST:
        return capacity.assign(score_NWG, slots, step)
    assert math.frexp(step)[0] == 0.5, "the rounding step must be a power of two"
    score = score_NWG.detach().contiguous()
    out = torch.empty(windows, width, dtype=torch.int64, device=score.device)
    if out.numel() == 0:
        return out
    power = triton.next_power_of_2(groups)
    room = torch.empty(windows, power, dtype=torch.int32, device=score.device)
    block = max(chunk, triton.next_power_of_2(width))
    key = torch.empty(windows, block, dtype=torch.int64, device=score.device)
    _assign_kernel[(windows,)](
        score,
        out,
        key,
        room,
        width,
        groups,
        slots,
        1.0 / step,
        BW=block,
        BG=power,
        GC=min(16, power),
        JC=chunk,
        num_warps=warps or min(16, max(1, block // 32)),
    )
    return out
