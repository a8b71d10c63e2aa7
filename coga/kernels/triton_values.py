"""Values of the heads and their output gate in Triton: one pass forward, one pass backward.

    v_h = o_h U_h        y = [v_1 .. v_H] * sigmoid(g)        (y = v without a gate)

Forward reads o and g once and writes y. Backward keeps neither v nor sigmoid(g); it reads dy, g and o once
and computes v again:

    dv = dy sigmoid(g)        dg = dy v sigmoid(g) (1 - sigmoid(g))
    do_h = dv_h U_h^T         dU_h = sum over tokens of o_h^T dv_h

Products add in float32; v is not rounded before the gate, dv is rounded for its products. A program of the
backward pass sums dU_h over every SPLITth tile of tokens, and the sums are added in a fixed order. The plain
twin is `coga.models.latent.LatentProjections`.

Cost: 2 B T H C E FLOPs forward, three times as many backward.

Legend: B batch, T tokens, H heads, C content width, E = D/H; in kernels BM tokens of a tile, BC and BE the
widths C and E padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coga.kernels.triton_flash import load_tile
from coga.kernels.triton_flash_backward import MOST_ROWS

__all__ = ["gated_values", "gated_values_backward"]


@triton.jit(do_not_specialize=["count"])
def _forward_kernel(
    mixed_ptr,
    up_ptr,
    gate_ptr,
    y_ptr,
    count,
    H: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BE: tl.constexpr,
):
    # The heads of a tile run side by side: together they read and write whole rows.
    head = tl.program_id(0) % H
    first = (tl.program_id(0) // H).to(tl.int64) * BM
    n = tl.arange(0, BM)
    c = tl.arange(0, BC)
    e = tl.arange(0, BE)
    rows = count - first
    at = first * (H * E) + head * E
    up = load_tile(up_ptr + head * (C * E), c, C, e, E, E, BC != C)
    mixed = load_tile(mixed_ptr + first * (H * C) + head * C, n, rows, c, H * C, C, True)
    y = tl.dot(mixed, up, input_precision="ieee")
    if GATED:
        gate = load_tile(gate_ptr + at, n, rows, e, H * E, E, True)
        y *= tl.sigmoid(gate.to(tl.float32))
    target = y_ptr + at + n[:, None] * (H * E) + e[None, :]
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=(n < rows)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["count"])
def _backward_kernel(
    dy_ptr,
    mixed_ptr,
    up_ptr,
    gate_ptr,
    dmixed_ptr,
    dup_ptr,
    dgate_ptr,
    count,
    H: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BE: tl.constexpr,
):
    head = tl.program_id(0) % H
    n = tl.arange(0, BM)
    c = tl.arange(0, BC)
    e = tl.arange(0, BE)
    wide = tl.full([], BM, tl.int64)  # rows times width may pass 2^31
    kind: tl.constexpr = mixed_ptr.dtype.element_ty
    up = load_tile(up_ptr + head * (C * E), c, C, e, E, E, BC != C)
    dup = tl.zeros([BC, BE], tl.float32)
    for block in range(tl.program_id(0) // H, tl.cdiv(count, BM), SPLIT):
        first = block * wide
        rows = count - first
        at = first * (H * E) + head * E
        start = first * (H * C) + head * C
        mixed = load_tile(mixed_ptr + start, n, rows, c, H * C, C, True)
        dv = load_tile(dy_ptr + at, n, rows, e, H * E, E, True)
        if GATED:
            dy = dv.to(tl.float32)
            gate = load_tile(gate_ptr + at, n, rows, e, H * E, E, True)
            share = tl.sigmoid(gate.to(tl.float32))
            dv = (dy * share).to(kind)
            dgate = tl.dot(mixed, up, input_precision="ieee") * (dy * share * (1 - share))
            target = dgate_ptr + at + n[:, None] * (H * E) + e[None, :]
            tl.store(target, dgate.to(kind), mask=(n < rows)[:, None] & (e < E)[None, :])
        dmixed = tl.dot(dv, tl.trans(up), input_precision="ieee")
        target = dmixed_ptr + start + n[:, None] * (H * C) + c[None, :]
        tl.store(target, dmixed.to(kind), mask=(n < rows)[:, None] & (c < C)[None, :])
        dup = tl.dot(tl.trans(mixed), dv, dup, input_precision="ieee")
    target = dup_ptr + tl.program_id(0).to(tl.int64) * (C * E) + c[:, None] * E + e[None, :]
    tl.store(target, dup, mask=(c < C)[:, None] & (e < E)[None, :])


def _tiles(dtype: torch.dtype, content: int, width: int, backward: bool) -> dict:
    """Tile and schedule: timed in bf16 at widths of 64 (docs/log.md), elsewhere what spills no registers."""
    if dtype == torch.float32:  # no tensor cores: wide tiles only make ptxas spill, and slow
        return dict(BM=32, num_warps=8, num_stages=1)
    if max(content, width) > 64:
        return dict(BM=64, num_warps=8, num_stages=1)
    return dict(BM=64, num_warps=4, num_stages=2) if backward else dict(BM=128, num_warps=8, num_stages=1)


def _sizes(mixed_BTHC: Tensor, up_HCE: Tensor) -> tuple[int, dict]:
    """Tokens of all rows, and the sizes that both kernels take."""
    heads, content, width = up_HCE.shape
    assert mixed_BTHC.shape[2:] == (heads, content) and mixed_BTHC.dtype == up_HCE.dtype
    wide = (max(16, triton.next_power_of_2(x)) for x in (content, width))
    return mixed_BTHC.shape[:2].numel(), dict(H=heads, C=content, E=width, **dict(zip(("BC", "BE"), wide)))


def gated_values(
    mixed_BTHC: Tensor, up_HCE: Tensor, gate_BTD: Tensor | None, *, tiles: dict | None = None
) -> Tensor:
    """y (B, T, D), in the dtype of all inputs, which are contiguous; no gate: the values alone."""
    count, sizes = _sizes(mixed_BTHC, up_HCE)
    tiles = tiles or _tiles(mixed_BTHC.dtype, sizes["C"], sizes["E"], False)
    y = mixed_BTHC.new_empty(*mixed_BTHC.shape[:2], sizes["H"] * sizes["E"])
    _forward_kernel[(triton.cdiv(count, tiles["BM"]) * sizes["H"],)](
        mixed_BTHC,
        up_HCE,
        y if gate_BTD is None else gate_BTD,
        y,
        count,
        GATED=gate_BTD is not None,
        **sizes,
        **tiles,
    )
    return y


PROGRAMS = 3 * 132  # of the backward pass: what an H100 holds at once, by the registers they take


def _splits(count: int, heads: int, tile: int) -> int:
    """Programs a head: enough for the device, each with a tile at least and no longer a sum than may be."""
    wanted = min(PROGRAMS // heads, triton.cdiv(count, tile))
    return max(1, wanted, triton.cdiv(count, MOST_ROWS))


def gated_values_backward(
    dy_BTD: Tensor,
    mixed_BTHC: Tensor,
    up_HCE: Tensor,
    gate_BTD: Tensor | None,
    *,
    tiles: dict | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dmixed, dup (H, C, E) in float32, and dgate where there is a gate; all inputs contiguous."""
    count, sizes = _sizes(mixed_BTHC, up_HCE)
    tiles = tiles or _tiles(mixed_BTHC.dtype, sizes["C"], sizes["E"], True)
    splits = splits or _splits(count, sizes["H"], tiles["BM"])
    if mixed_BTHC.dtype != torch.float32:  # dU_h has C rows, and the fast products of sm_90 have 64 at least
        sizes["BC"] = max(64, sizes["BC"])
    dmixed = mixed_BTHC.new_empty(mixed_BTHC.shape)
    dup = up_HCE.new_empty(splits, *up_HCE.shape, dtype=torch.float32)
    dgate = None if gate_BTD is None else gate_BTD.new_empty(gate_BTD.shape)
    _backward_kernel[(splits * sizes["H"],)](
        dy_BTD,
        mixed_BTHC,
        up_HCE,
        dy_BTD if gate_BTD is None else gate_BTD,
        dmixed,
        dup,
        dmixed if dgate is None else dgate,
        count,
        GATED=gate_BTD is not None,
        SPLIT=splits,
        **sizes,
        **tiles,
    )
    return dmixed, dup.sum(0), dgate
