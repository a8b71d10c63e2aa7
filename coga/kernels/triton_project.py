"""Raw projections to queries and latents in Triton: norms, rotation, gain and index query in one pass.

    n(y) = y / sqrt(mean(y^2) + eps)
    q_h = g_h / sqrt(L) [n(x_h[:C]), rope(n(x_h[C:]))]        latent = [n(x_H[:C]), rope(n(x_H[C:]))]
    index = sum_h w_h q_h        (w_h = 1/H without weights)    what the selection scores groups with

A row of x holds the L columns of each head and, with LATENT, those of the latent after them. Forward reads x
once and writes q, latent and index once; backward reads x and the gradients and writes dx once. Rows of x may
lie further apart than they are wide: compilers pad the output of a matrix product. Everything is computed in
float32 and rounded at the end. The plain twin is `coga.models.latent.LatentProjections`.

With y = n(x): dx = (g - y mean(g y)) / sqrt(mean(x^2) + eps), g the gradient of y (for the rotary part, that
of the rotated y turned back); dg_h = sum over rows of dq_h . q_h / g_h, summed in two fixed steps.

Legend: B batch, T tokens, H heads, C content width, P rotary width, L = C + P; in kernels BT rows of a tile,
BC and BR the widths C and P/2 padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["project", "project_backward"]


@triton.jit
def _parts(row_ptr, rows, c, r, C: tl.constexpr, P: tl.constexpr):
    """Content and the two halves of the rotary part of one head, in float32."""
    x = tl.load(row_ptr + c[None, :], mask=rows & (c < C)[None, :], other=0.0).to(tl.float32)
    a, b = x, x
    if P > 0:
        half = rows & (r < P // 2)[None, :]
        a = tl.load(row_ptr + C + r[None, :], mask=half, other=0.0).to(tl.float32)
        b = tl.load(row_ptr + C + P // 2 + r[None, :], mask=half, other=0.0).to(tl.float32)
    return x, a, b


@triton.jit
def _store(row_ptr, rows, c, r, x, a, b, C: tl.constexpr, P: tl.constexpr):
    kind: tl.constexpr = row_ptr.dtype.element_ty
    tl.store(row_ptr + c[None, :], x.to(kind), mask=rows & (c < C)[None, :])
    if P > 0:
        half = rows & (r < P // 2)[None, :]
        tl.store(row_ptr + C + r[None, :], a.to(kind), mask=half)
        tl.store(row_ptr + C + P // 2 + r[None, :], b.to(kind), mask=half)


@triton.jit
def _turned(table_ptr, n, rows, r, places, P: tl.constexpr):
    """Rows of a rotary table; the table repeats after `places` rows."""
    at = table_ptr + (n % places)[:, None] * (P // 2) + r[None, :]
    return tl.load(at, mask=rows & (r < P // 2)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count", "places"])
def _forward_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    gain_ptr,
    weight_ptr,
    q_ptr,
    latent_ptr,
    index_ptr,
    count,
    places,
    stride,
    eps,
    scale,
    H: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    LATENT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    L: tl.constexpr = C + P
    n = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    rows = (n < count)[:, None]
    c = tl.arange(0, BC)
    r = tl.arange(0, BR)
    if P > 0:
        cos = _turned(cos_ptr, n, rows, r, places, P)
        sin = _turned(sin_ptr, n, rows, r, places, P)
    index_c = tl.zeros([BT, BC], tl.float32)
    index_a = tl.zeros([BT, BR], tl.float32)
    index_b = tl.zeros([BT, BR], tl.float32)
    kind: tl.constexpr = q_ptr.dtype.element_ty
    for h in range(0, H + LATENT):
        x, a, b = _parts(x_ptr + n[:, None] * stride + h * L, rows, c, r, C, P)
        gain = tl.load(gain_ptr + h, mask=h < H, other=0.0).to(tl.float32) * scale
        gain = tl.where(h < H, gain, 1.0)
        x = x * (tl.rsqrt(tl.sum(x * x, 1) / C + eps) * gain)[:, None]
        if P > 0:
            factor = (tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / P + eps) * gain)[:, None]
            first = (a * cos - b * sin) * factor
            b = (b * cos + a * sin) * factor
            a = first
        if h < H:
            _store(q_ptr + n[:, None] * (H * L) + h * L, rows, c, r, x, a, b, C, P)
            weight = 1.0 / H
            if WEIGHTED:
                weight = tl.load(weight_ptr + h).to(tl.float32)
            index_c += x.to(kind).to(tl.float32) * weight
            if P > 0:
                index_a += a.to(kind).to(tl.float32) * weight
                index_b += b.to(kind).to(tl.float32) * weight
        else:
            _store(latent_ptr + n[:, None] * L, rows, c, r, x, a, b, C, P)
    _store(index_ptr + n[:, None] * L, rows, c, r, index_c, index_a, index_b, C, P)


@triton.jit(do_not_specialize=["count", "places"])
def _backward_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    gain_ptr,
    dq_ptr,
    dlatent_ptr,
    dx_ptr,
    sums_ptr,
    count,
    places,
    stride,
    eps,
    scale,
    H: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    LATENT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    L: tl.constexpr = C + P
    n = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    rows = (n < count)[:, None]
    c = tl.arange(0, BC)
    r = tl.arange(0, BR)
    if P > 0:
        cos = _turned(cos_ptr, n, rows, r, places, P)
        sin = _turned(sin_ptr, n, rows, r, places, P)
    for h in range(0, H + LATENT):
        x, a, b = _parts(x_ptr + n[:, None] * stride + h * L, rows, c, r, C, P)
        # One load from either place: the latent is the head after the last.
        if LATENT:
            base = tl.where(h < H, dq_ptr + h * L, dlatent_ptr)
            step = tl.where(h < H, H * L, L)
        else:
            base = dq_ptr + h * L
            step = H * L
        g, ga, gb = _parts(base + n[:, None] * step, rows, c, r, C, P)
        gain = tl.load(gain_ptr + h, mask=h < H, other=0.0).to(tl.float32) * scale
        gain = tl.where(h < H, gain, 1.0)
        factor = tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]
        y = x * factor
        along = tl.sum(g * y, 1)
        total = along
        dx = (g - y * (along / C)[:, None]) * factor * gain
        da, db = ga, gb
        if P > 0:
            factor = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / P + eps)[:, None]
            a *= factor
            b *= factor
            back = ga * cos + gb * sin
            gb = gb * cos - ga * sin
            along = tl.sum(back * a, 1) + tl.sum(gb * b, 1)
            total += along
            da = (back - a * (along / P)[:, None]) * factor * gain
            db = (gb - b * (along / P)[:, None]) * factor * gain
        _store(dx_ptr + n[:, None] * ((H + LATENT) * L) + h * L, rows, c, r, dx, da, db, C, P)
        if h < H:
            tl.store(sums_ptr + tl.program_id(0) * H + h, tl.sum(total, 0))


def _launch(x: Tensor, cos: Tensor, heads: int, content: int) -> tuple[tuple, dict]:
    """Grid and the sizes that both kernels take."""
    rotary = 2 * cos.shape[-1]
    extra = x.shape[-1] // (content + rotary) - heads
    assert extra in (0, 1) and x.shape[-1] == (heads + extra) * (content + rotary)
    wide = triton.next_power_of_2(content)
    block = max(1, min(32, 2048 // wide))
    options = dict(
        H=heads,
        C=content,
        P=rotary,
        LATENT=extra,
        BT=block,
        BC=wide,
        BR=max(1, triton.next_power_of_2(max(rotary // 2, 1))),
        num_warps=4,
    )
    return (triton.cdiv(x.numel() // x.shape[-1], block),), options


def _rows(x_BTX: Tensor) -> tuple[Tensor, int]:
    """x, and how far apart its rows lie; a copy where that is not one number."""
    even = len(x_BTX) == 1 or x_BTX.stride(0) == x_BTX.shape[1] * x_BTX.stride(1)
    if not even or x_BTX.stride(2) != 1:
        x_BTX = x_BTX.contiguous()
    return x_BTX, x_BTX.stride(1)


def project(
    x_BTX: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain_H: Tensor,
    index_H: Tensor | None,
    *,
    content: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, L), latent (B, T, L) and index query (B, T, L), in the dtype of x; cos, sin contiguous.

    x_BTX     (B, T, H L) or, with the columns of the latent, (B, T, (H + 1) L); without them latent is empty
    cos, sin  (T, P/2) or (B, T, P/2)
    index_H   weights of the heads in the index query; None for their mean
    """
    heads, rows = len(gain_H), x_BTX.shape[:2]
    width = content + 2 * cos.shape[-1]
    grid, options = _launch(x_BTX, cos, heads, content)
    q = x_BTX.new_empty(*rows, heads, width)
    latent = x_BTX.new_empty(*rows, width if options["LATENT"] else 0)
    index = x_BTX.new_empty(*rows, width)
    count, places = rows.numel(), max(1, cos.shape[:-1].numel())
    x_BTX, stride = _rows(x_BTX)
    weights = gain_H if index_H is None else index_H
    outputs = (q, latent if options["LATENT"] else q, index)
    _forward_kernel[grid](
        x_BTX,
        cos,
        sin,
        gain_H,
        weights,
        *outputs,
        count,
        places,
        stride,
        eps,
        width**-0.5,
        WEIGHTED=index_H is not None,
        **options,
    )
    return q, latent, index


def project_backward(
    dq_BTHL: Tensor,
    dlatent_BTL: Tensor,
    x_BTX: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain_H: Tensor,
    *,
    content: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """dx, in the dtype of x, and dgain (H,) in float32; all but x contiguous."""
    heads, scale = len(gain_H), dq_BTHL.shape[-1] ** -0.5
    grid, options = _launch(x_BTX, cos, heads, content)
    dx = torch.empty_like(x_BTX, memory_format=torch.contiguous_format)
    x_BTX, stride = _rows(x_BTX)
    sums = x_BTX.new_empty(*grid, heads, dtype=torch.float32)
    count, places = x_BTX.shape[:2].numel(), max(1, cos.shape[:-1].numel())
    dlatent = dlatent_BTL if options["LATENT"] else dq_BTHL
    _backward_kernel[grid](
        x_BTX, cos, sin, gain_H, dq_BTHL, dlatent, dx, sums, count, places, stride, eps, scale, **options
    )
    return dx, sums.sum(0) * scale
