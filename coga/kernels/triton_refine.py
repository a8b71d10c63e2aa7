"""Soft k-means in Triton: one program a window runs all steps, its centroids in registers.

The steps are those of `coga.kernels.refine.refine`. A step walks over tiles of tokens: logits, softmax, and
the sum of the contents that the softmax weighs. Contents come from memory once, then from the cache.

Products of float32 are three products of tf32 each ("tf32x3": what a factor loses in tf32 is a factor of its
own), and tiles are added outside of the tensor cores, whose sums are cut, not rounded: near float32, which
the choices of groups that follow need.

Cost: 6 steps products of W x C by C x G a window on tensor cores, steps W C elements from the cache.

Legend: B batch, N windows, W tokens in a window, G groups in a window, C content width; in the kernel BW
tokens of a tile, BG and BC powers of two above G and C.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coga.kernels import refine as plain

__all__ = ["refine"]

# The most that registers hold with tiles worth a tensor core: beyond, ptxas spills hundreds of bytes.
MOST_GROUPS, WIDEST = 64, 128


@triton.jit
def _unit_rows(x, eps):
    """Rows over max(their norm, eps)."""
    norm = tl.maximum(tl.sqrt_rn(tl.sum(x * x, 1)), eps)
    return tl.div_rn(x, tl.broadcast_to(norm[:, None], x.shape))


@triton.jit
def _contents(unit_ptr, first, w, c, width, C: tl.constexpr):
    """Contents of the tokens from `first` on; zeros beyond the window."""
    rows = (first + w)[:, None]
    return tl.load(unit_ptr + rows * C + c[None, :], mask=(rows < width) & (c < C)[None, :], other=0.0)


@triton.jit
def _refine_kernel(
    unit_ptr,
    prototype_ptr,
    out_ptr,
    width,
    groups,
    prototype_stride,
    steps,
    beta,
    prototype_eps,
    centroid_eps,
    C: tl.constexpr,
    BW: tl.constexpr,
    BG: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    window = tl.program_id(0).to(tl.int64)
    w, g, c = tl.arange(0, BW), tl.arange(0, BG), tl.arange(0, BC)
    unit_ptr += window * width * C
    cells = (g < groups)[:, None] & (c < C)[None, :]
    at = g[:, None] * C + c[None, :]
    prototype = tl.load(prototype_ptr + window * prototype_stride + at, mask=cells, other=0.0)
    centroid = _unit_rows(prototype, prototype_eps)
    unit = _contents(unit_ptr, 0, w, c, width, C)
    for _ in range(steps):
        total = tl.zeros([BG, BC], tl.float32)
        for first in range(0, width, BW):
            # The next tile, of this step or the next one, is on its way while this one is worked on.
            ahead = _contents(unit_ptr, tl.where(first + BW < width, first + BW, 0), w, c, width, C)
            logits = beta * tl.dot(unit, tl.trans(centroid), input_precision=PRECISION)
            logits = tl.where((g < groups)[None, :], logits, -float("inf"))
            power = tl.exp(logits - tl.max(logits, 1)[:, None])
            soft = power / tl.sum(power, 1)[:, None]  # of tokens beyond the window it meets zeros
            total += tl.dot(tl.trans(soft), unit, input_precision=PRECISION)
            unit = ahead
        centroid = _unit_rows(total, centroid_eps)
    tl.store(out_ptr + window * groups * C + at, centroid, mask=cells)


def _room(device: torch.device) -> int:
    """Bytes of shared memory that a program may take."""
    if device.type != "cuda":  # the interpreter
        return 2**20
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 2**20)


def _tile(width: int, rows: int, columns: int, room: int) -> int:
    """Tokens of a tile: as timed on an H200, or fewer where contents ahead and centroids do not fit."""
    tile = min(128 if columns <= 64 else 32, max(16, triton.next_power_of_2(width)))
    while tile > 16 and 4 * columns * (4 * tile + 2 * rows) > room:
        tile //= 2
    return tile


def refine(
    unit_BNWC: Tensor,
    prototype: Tensor,
    beta: float,
    steps: int,
    *,
    tile: int | None = None,
    warps: int = 8,
    precision: str = "tf32x3",
) -> Tensor:
    """`coga.kernels.refine.refine`: centroids (B, N, G, C) after `steps` steps in each window.

    float64, more than `MOST_GROUPS` groups and contents wider than `WIDEST` run the reference.
    """
    batch, windows, width, content = unit_BNWC.shape
    groups = prototype.shape[-2]
    rows = max(16, triton.next_power_of_2(groups))
    columns = max(16, triton.next_power_of_2(content))
    single = unit_BNWC.dtype == prototype.dtype == torch.float32
    fits = rows <= MOST_GROUPS and columns <= WIDEST
    if not (single and fits) or unit_BNWC.numel() == 0:
        return plain.refine(unit_BNWC, prototype, beta, steps)
    unit, prototype = unit_BNWC.contiguous(), prototype.contiguous()
    out = unit.new_empty(batch, windows, groups, content)
    tile = tile or _tile(width, rows, columns, _room(unit.device))
    _refine_kernel[(batch * windows,)](
        unit,
        prototype,
        out,
        width,
        groups,
        0 if prototype.dim() == 2 else groups * content,
        steps,
        float(beta),
        plain.PROTOTYPE_EPS,
        plain.CENTROID_EPS,
        C=content,
        BW=tile,
        BG=rows,
        BC=columns,
        PRECISION=precision,
        num_warps=warps,
        num_stages=1,
    )
    return out
