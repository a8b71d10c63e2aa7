"""Members of groups in parts: copied so that SIZE neighbouring places always belong to one group.

    part i of group m      members i SIZE .. i SIZE + SIZE - 1 of it; beyond its last member, that one again

A maximum over members is then one over whole parts, of places side by side, without a mask, however many
members a group has; a group of n members takes ceil(n / SIZE) parts, half a part too many on average.

Cost: reads and writes the members once (B S L elements; writes half as many again at SIZE = R).

Legend: B batch, S slots (places), L latent width, M groups, P parts that there is room for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Parts", "cut"]


@dataclass(frozen=True)
class Parts:
    """latent (B, P SIZE, L); owner int32 (B, P), the group of each part; end int32 (B, M), where the parts
    of each group end. Beyond the parts of the last group latents are zeros and owners are not set."""

    latent_BSL: Tensor
    owner_BP: Tensor
    end_BM: Tensor


@triton.jit
def _cut_kernel(
    slot_ptr,
    offset_ptr,
    size_ptr,
    end_ptr,
    part_ptr,
    owner_ptr,
    total,
    places,
    room,
    L: tl.constexpr,
    LP: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One program a group."""
    batch = (tl.program_id(0) // total).to(tl.int64)
    group = tl.program_id(0) % total
    at = batch * total + group
    size = tl.load(size_ptr + at).to(tl.int32)
    count = tl.cdiv(size, SIZE)
    start = batch * places + tl.load(offset_ptr + at)
    part = batch * room + tl.load(end_ptr + at) - count
    n = tl.arange(0, SIZE)
    column = tl.arange(0, LP)[None, :]
    for i in range(0, count):
        member = tl.minimum(i * SIZE + n, size - 1)
        x = tl.load(slot_ptr + (start + member)[:, None] * L + column, mask=column < L)
        tl.store(part_ptr + ((part + i) * SIZE + n)[:, None] * L + column, x, mask=column < L)
        tl.store(owner_ptr + part + i, group)


def cut(slot_BSL: Tensor, offset_BM: Tensor, size_BM: Tensor, size: int, spare: int = 0) -> Parts:
    """Members of each group (at places offset .. offset + size - 1, contiguous tensors) in parts of `size`, a
    power of two; `spare`: parts that may be read beyond the last."""
    batch, places, width = slot_BSL.shape
    total = offset_BM.shape[1]
    count = torch.div(size_BM + (size - 1), size, rounding_mode="floor")
    end = count.cumsum(1, dtype=torch.int32)
    room = places // size + total + spare
    latent = slot_BSL.new_zeros(batch, room * size, width)
    owner = torch.empty(batch, room, dtype=torch.int32, device=slot_BSL.device)
    _cut_kernel[(batch * total,)](
        slot_BSL,
        offset_BM,
        size_BM,
        end,
        latent,
        owner,
        total,
        places,
        room,
        L=width,
        LP=triton.next_power_of_2(width),
        SIZE=size,
        num_warps=2,
    )
    return Parts(latent, owner, end)
