"""Backward pass of `coga.kernels.triton_flash`: two kernels, no atomics, the same bits every time.

With p = exp(s - lse), lse and delta = dO . O of the whole softmax (every part of it), and s the scores of one
part, whatever the part:

    ds_ij = p_ij (dO_i . c_j - delta_i)
    dk_j  = sum_ih ds_ijh q_ih + p_ijh dO_ih          keys: one program sums over the queries of all heads
    dq_ih = sum_j ds_ijh k_j                          queries: one program, a head of a tile
    band:  dq_jh[:C] += alpha_h sum_i ds_ijh c_i      (keys kernel, the program that owns j)
           dc_i      += sum_h alpha_h sum_j ds_ijh q_jh[:C]   (queries kernel, a head each, summed later)
           dalpha_h  += sum_ij ds_ijh (q_jh . c_i)

The keys kernel holds BN keys and streams (token, head) rows, which are contiguous in memory, as columns of
the scores, so that no probability crosses shared memory. It serves tokens, groups that attend, and summaries
(FAR); long query ranges are cut into SPLIT parts whose results are added in order. The queries kernel runs
last: it starts from the gradients that other kernels found (opened part, band) and writes dq once.

Cost: (2 L + 2 C) multiply-adds a pair in the keys kernel, (2 L + C) in the queries kernel.

Legend: as in `triton_flash`.
"""

# ruff: noqa: RET505, SIM109 - a compile-time branch of a kernel is written as if/else
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coga.kernels.triton_flash import (
    CAUSAL,
    FAR,
    GROUPED,
    LOG2E,
    WINDOWED,
    band_low,
    bit_word,
    far_count,
    key_high,
    key_low,
    load_tile,
    widths,
)

__all__ = ["delta_rows", "keys_gradient", "queries_gradient"]


# --------------------------------------------------------------------------------------------------- delta


@triton.jit
def _delta_kernel(grad_ptr, out_ptr, delta_ptr, rows, C: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BM
    x = tl.arange(0, BM)
    c = tl.arange(0, BC)
    grad = load_tile(grad_ptr + first * C, x, rows - first, c, C, C, True).to(tl.float32)
    out = load_tile(out_ptr + first * C, x, rows - first, c, C, C, True).to(tl.float32)
    tl.store(delta_ptr + first + x, tl.sum(grad * out, 1), mask=first + x < rows)


def delta_rows(grad_BTHC: Tensor, out_BTHC: Tensor) -> Tensor:
    """dO . O of every row, (B, T, H) in float32; contiguous inputs."""
    content = grad_BTHC.shape[-1]
    delta = grad_BTHC.new_empty(grad_BTHC.shape[:-1], dtype=torch.float32)
    block = max(1, 4096 // triton.next_power_of_2(content))
    _delta_kernel[(triton.cdiv(delta.numel(), block),)](
        grad_BTHC,
        out_BTHC,
        delta,
        delta.numel(),
        C=content,
        BC=triton.next_power_of_2(content),
        BM=block,
        num_warps=4,
    )
    return delta


# ---------------------------------------------------------------------------------------------------- keys


@triton.jit
def query_low(j, MODE: tl.constexpr, UNIT: tl.constexpr, GROUPS: tl.constexpr):
    """First query that reads key j."""
    if MODE == FAR:
        return (j // GROUPS + 2) * UNIT
    elif MODE == GROUPED:
        return j // UNIT * UNIT
    else:
        return j


@triton.jit
def query_high(j, length, MODE: tl.constexpr, UNIT: tl.constexpr):
    """End of the queries that read key j."""
    if MODE == WINDOWED:
        return tl.minimum((j // UNIT + 2) * UNIT, length)
    else:
        return j * 0 + length


@triton.jit
def band_high(j, MODE: tl.constexpr, UNIT: tl.constexpr, BAND: tl.constexpr):
    """End of the queries that have a reciprocal term with key j; the band starts with the queries."""
    if MODE == GROUPED:
        return (j // UNIT + 2) * UNIT
    else:
        return j + BAND


@triton.jit
def _row_values(lse_ptr, delta_ptr, at, live):
    """log-sum-exp in base 2 and delta; rows that are absent or read nothing get p = 0."""
    lse = tl.load(lse_ptr + at, mask=live, other=float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse) * LOG2E
    return lse, tl.load(delta_ptr + at, mask=live, other=0.0)


@triton.jit
def _packed_rows(
    acc_c,
    acc_r,
    k_c,
    k_r,
    bias,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    q_ptr,
    far_bias_ptr,
    bits_ptr,
    j0,
    low,
    high,
    length,
    part,
    H: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    MODE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    OPENED: tl.constexpr,
    SPLIT: tl.constexpr,
    MASK: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Rows (token, head) of tokens low .. high-1, part `part` of SPLIT; MASK where not all keys are read."""
    L: tl.constexpr = C + P
    x = tl.arange(0, BM)
    n = tl.arange(0, BN)
    c = tl.arange(0, BC)
    r = tl.arange(0, BP)
    count = tl.maximum(high - low, 0) * H
    span = ((count + SPLIT - 1) // SPLIT + BM - 1) // BM * BM
    end = low * H + tl.minimum(count, (part + 1) * span)
    for row in range(low * H + part * span, end, BM):
        line = row + tl.full([], 0, tl.int64)
        live = x < end - row
        q_c = load_tile(q_ptr + line * L, x, end - row, c, L, C, True)
        s = tl.dot(k_c, tl.trans(q_c), input_precision="ieee")
        if P > 0:
            q_r = load_tile(q_ptr + line * L + C, x, end - row, r, L, P, True)
            s = tl.dot(k_r, tl.trans(q_r), s, input_precision="ieee")
        grad = load_tile(grad_ptr + line * C, x, end - row, c, C, C, True)
        lse, delta = _row_values(lse_ptr, delta_ptr, line + x, live)
        token = (row + x) // H
        if MODE == FAR:
            lse -= tl.load(far_bias_ptr + (row + x) % H).to(tl.float32) * LOG2E
        if MODE == FAR or MODE == GROUPED:
            p = tl.exp2(s * LOG2E + (bias[:, None] - lse[None, :]))
        else:
            p = tl.exp2(s * LOG2E - lse[None, :])
        if OPENED:
            word = bit_word(bits_ptr, token, live, j0, length, n, BN, True)
            p = tl.where((word & (1 << (n % 32))[:, None]) != 0, 0.0, p)
        if MASK:
            j = (j0 + n)[:, None]
            seen = token[None, :] >= query_low(j, MODE, UNIT, GROUPS)
            seen = seen & (token[None, :] < query_high(j, length, MODE, UNIT))
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(k_c, tl.trans(grad), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q_c.dtype)
        acc_c = tl.dot(p.to(q_c.dtype), grad, acc_c, input_precision="ieee")
        acc_c = tl.dot(ds, q_c, acc_c, input_precision="ieee")
        if P > 0:
            acc_r = tl.dot(ds, q_r, acc_r, input_precision="ieee")
    return acc_c, acc_r


@triton.jit(do_not_specialize=["length", "total", "words"])
def _keys_kernel(
    grad_ptr,
    lse_ptr,
    delta_ptr,
    q_ptr,
    key_ptr,
    log_size_ptr,
    far_bias_ptr,
    bits_ptr,
    alpha_ptr,
    dkey_ptr,
    dq_band_ptr,
    length,
    total,
    words,
    H: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    MODE: tl.constexpr,
    UNIT: tl.constexpr,
    BAND: tl.constexpr,
    GROUPS: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    OPENED: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    L: tl.constexpr = C + P
    j0 = tl.program_id(0) * BN  # early keys are read most (but near): they start first
    part = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    last = tl.minimum(j0 + BN, total) - 1
    x = tl.arange(0, BM)
    n = tl.arange(0, BN)
    c = tl.arange(0, BC)
    r = tl.arange(0, BP)
    key_ptr += batch * total * L
    q_ptr += batch * length * (H * L)
    grad_ptr += batch * length * (H * C)
    lse_ptr += batch * length * H
    delta_ptr += batch * length * H
    bits_ptr += batch * words * length
    k_c = load_tile(key_ptr + j0 * L, n, total - j0, c, L, C, True)
    k_r = k_c
    acc_c = tl.zeros([BN, BC], tl.float32)
    acc_r = acc_c
    if P > 0:
        k_r = load_tile(key_ptr + j0 * L + C, n, total - j0, r, L, P, True)
        acc_r = tl.zeros([BN, BP], tl.float32)
    bias = tl.zeros([BN], tl.float32)
    if MODE == FAR or MODE == GROUPED:
        # A key past the end counts as an empty group: p = 0.
        size = tl.load(log_size_ptr + batch * total + j0 + n, mask=j0 + n < total, other=-float("inf"))
        bias = size.to(tl.float32) * LOG2E
    low = query_low(j0, MODE, UNIT, GROUPS)
    edge = query_low(last, MODE, UNIT, GROUPS)
    if RECIPROCAL:
        edge = tl.maximum(edge, band_high(last, MODE, UNIT, BAND))
    edge = tl.minimum(edge, length)
    inner = tl.maximum(query_high(j0, length, MODE, UNIT), edge)

    if RECIPROCAL:
        # Tokens low .. edge-1, head by head, as one loop; the rows of keys past the end are not stored.
        blocks = (edge - low + BM - 1) // BM
        head0 = part * H // SPLIT
        heads = (part + 1) * H // SPLIT - head0
        dq_band_ptr += batch * length * (H * C)
        dq_acc = tl.zeros([BN, BC], tl.float32)
        for step in range(0, heads * blocks):
            head = head0 + step // blocks
            block = step % blocks
            i0 = low + block * BM
            i = i0 + x
            line = i0 * tl.full([], H, tl.int64) + head
            live = i < edge
            q_c = load_tile(q_ptr + line * L, x, edge - i0, c, H * L, C, True)
            s = tl.dot(k_c, tl.trans(q_c), input_precision="ieee")
            if P > 0:
                q_r = load_tile(q_ptr + line * L + C, x, edge - i0, r, H * L, P, True)
                s = tl.dot(k_r, tl.trans(q_r), s, input_precision="ieee")
            own = load_tile(key_ptr + i0 * L, x, edge - i0, c, L, C, True)
            at = q_ptr + (j0 * tl.full([], H, tl.int64) + head) * L
            key_query = load_tile(at, n, total - j0, c, H * L, C, True)
            term = tl.dot(key_query, tl.trans(own), input_precision="ieee")
            grad = load_tile(grad_ptr + line * C, x, edge - i0, c, H * C, C, True)
            lse, delta = _row_values(lse_ptr, delta_ptr, line + x * H, live)
            alpha = tl.load(alpha_ptr + head).to(tl.float32)
            j = (j0 + n)[:, None]
            seen = (i[None, :] >= query_low(j, MODE, UNIT, GROUPS)) & live[None, :]
            seen = seen & (i[None, :] < query_high(j, length, MODE, UNIT)) & (j < total)
            near = seen & (i[None, :] < band_high(j, MODE, UNIT, BAND))
            s += tl.where(near, term * alpha, 0.0)
            p = tl.exp2(s * LOG2E + (bias[:, None] - lse[None, :]))
            p = tl.where(seen, p, 0.0)
            dp = tl.dot(k_c, tl.trans(grad), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            back = tl.where(near, ds * alpha, 0.0).to(q_c.dtype)
            ds = ds.to(q_c.dtype)
            acc_c = tl.dot(p.to(q_c.dtype), grad, acc_c, input_precision="ieee")
            acc_c = tl.dot(ds, q_c, acc_c, input_precision="ieee")
            if P > 0:
                acc_r = tl.dot(ds, q_r, acc_r, input_precision="ieee")
            dq_acc = tl.dot(back, own, tl.where(block == 0, 0.0, dq_acc), input_precision="ieee")
            target = (
                dq_band_ptr + (j0 * tl.full([], H, tl.int64) + head) * C + n[:, None] * (H * C) + c[None, :]
            )
            done = (n < total - j0) & (block == blocks - 1)
            value = dq_acc.to(dq_band_ptr.dtype.element_ty)
            tl.store(target, value, mask=done[:, None] & (c < C)[None, :])
    else:
        acc_c, acc_r = _packed_rows(
            acc_c, acc_r, k_c, k_r, bias, grad_ptr, lse_ptr, delta_ptr, q_ptr, far_bias_ptr, bits_ptr,
            j0, low, edge, length, part, H, C, P, MODE, UNIT, GROUPS, OPENED, SPLIT, True, BC, BP, BM, BN,
        )  # fmt: skip
    acc_c, acc_r = _packed_rows(
        acc_c, acc_r, k_c, k_r, bias, grad_ptr, lse_ptr, delta_ptr, q_ptr, far_bias_ptr, bits_ptr,
        j0, edge, inner, length, part, H, C, P, MODE, UNIT, GROUPS, OPENED, SPLIT, False, BC, BP, BM, BN,
    )  # fmt: skip
    if MODE == WINDOWED:
        acc_c, acc_r = _packed_rows(
            acc_c, acc_r, k_c, k_r, bias, grad_ptr, lse_ptr, delta_ptr, q_ptr, far_bias_ptr, bits_ptr,
            j0, inner, query_high(last, length, MODE, UNIT), length, part,
            H, C, P, MODE, UNIT, GROUPS, OPENED, SPLIT, True, BC, BP, BM, BN,
        )  # fmt: skip

    copy = part.to(tl.int64) * tl.num_programs(2) + batch
    target = dkey_ptr + (copy * total + j0) * L + n[:, None] * L
    live = (n < total - j0)[:, None]
    tl.store(target + c[None, :], acc_c, mask=live & (c < C)[None, :])
    if P > 0:
        tl.store(target + C + r[None, :], acc_r, mask=live & (r < P)[None, :])


# ------------------------------------------------------------------------------------------------- queries


@triton.jit(do_not_specialize=["length", "total", "words"])
def _queries_kernel(
    grad_ptr,
    lse_ptr,
    delta_ptr,
    q_ptr,
    latent_ptr,
    group_ptr,
    log_size_ptr,
    far_bias_ptr,
    bits_ptr,
    alpha_ptr,
    sink_ptr,
    dq_opened_ptr,
    dq_band_ptr,
    dq_ptr,
    dc_ptr,
    sums_ptr,
    length,
    total,
    words,
    H: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    MODE: tl.constexpr,
    UNIT: tl.constexpr,
    BAND: tl.constexpr,
    GROUPS: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    SINK: tl.constexpr,
    OPENED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    L: tl.constexpr = C + P
    head = tl.program_id(0) % H
    tile = tl.num_programs(0) // H - 1 - tl.program_id(0) // H
    batch = tl.program_id(1).to(tl.int64)
    first = tile * BM
    last = tl.minimum(first + BM, length) - 1
    x = tl.arange(0, BM)
    n = tl.arange(0, BN)
    c = tl.arange(0, BC)
    r = tl.arange(0, BP)
    i = first + x
    rows = length - first
    start_row = batch * length + first
    line = start_row * H + head
    latent_ptr += batch * length * L
    q_head = q_ptr + (batch * length * H + head) * L
    row_step = tl.full([], H * L, tl.int64)
    q_c = load_tile(q_ptr + line * L, x, rows, c, H * L, C, True)
    grad = load_tile(grad_ptr + line * C, x, rows, c, H * C, C, True)
    lse, delta = _row_values(lse_ptr, delta_ptr, line + x * H, x < rows)
    dq_c = tl.zeros([BM, BC], tl.float32)
    if OPENED:
        dq_c += load_tile(dq_opened_ptr + line * L, x, rows, c, H * L, C, True).to(tl.float32)
    if RECIPROCAL:
        dq_c += load_tile(dq_band_ptr + line * C, x, rows, c, H * C, C, True).to(tl.float32)
    if P > 0:
        q_r = load_tile(q_ptr + line * L + C, x, rows, r, H * L, P, True)
        dq_r = tl.zeros([BM, BP], tl.float32)
        if OPENED:
            dq_r += load_tile(dq_opened_ptr + line * L + C, x, rows, r, H * L, P, True).to(tl.float32)
    cell = (batch * (tl.num_programs(0) // H) + tile) * H + head
    cells = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    if SINK:
        nothing = tl.exp2(tl.load(sink_ptr + head).to(tl.float32) * LOG2E - lse)
        tl.store(sums_ptr + cell, tl.sum(-nothing * delta, 0))

    if MODE == GROUPED:
        log_size_ptr += batch * length
    low = key_low(first, MODE, UNIT)
    end = key_high(first, length, MODE, UNIT)
    if RECIPROCAL:
        end = tl.minimum(end, band_low(first, MODE, UNIT, BAND))
    if key_low(last, MODE, UNIT) != low:
        end = low
    whole = low + tl.maximum(end - low, 0) // BN * BN
    if RECIPROCAL:
        own = load_tile(latent_ptr + first * L, x, rows, c, L, C, True)
        alpha = tl.load(alpha_ptr + head).to(tl.float32)
        dc = tl.zeros([BM, BC], tl.float32)
        dalpha = tl.zeros([BM], tl.float32)
    for start in range(whole, key_high(last, length, MODE, UNIT), BN):
        at = latent_ptr + start * L
        k_c = load_tile(at, n, length - start, c, L, C, True)
        s = tl.dot(q_c, tl.trans(k_c), input_precision="ieee")
        if P > 0:
            k_r = load_tile(at + C, n, length - start, r, L, P, True)
            s = tl.dot(q_r, tl.trans(k_r), s, input_precision="ieee")
        j = (start + n)[None, :]
        seen = j < key_high(i, length, MODE, UNIT)[:, None]
        if RECIPROCAL:
            key_query = load_tile(q_head + start * row_step, n, length - start, c, H * L, C, True)
            term = tl.dot(own, tl.trans(key_query), input_precision="ieee")
            near = seen & (j >= band_low(i, MODE, UNIT, BAND)[:, None])
            s += tl.where(near, term * alpha, 0.0)
        if MODE == GROUPED:
            size = tl.load(log_size_ptr + start + n, mask=start + n < length, other=0.0).to(tl.float32)
            s = s + size[None, :]
        if MODE == WINDOWED:
            seen = seen & (j >= key_low(i, MODE, UNIT)[:, None])
        p = tl.where(seen, tl.exp2(s * LOG2E - lse[:, None]), 0.0)
        dp = tl.dot(grad, tl.trans(k_c), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        if RECIPROCAL:
            back = tl.where(near, ds, 0.0)
            dalpha += tl.sum(back * term, 1)
            dc = tl.dot((back * alpha).to(k_c.dtype), key_query, dc, input_precision="ieee")
        ds = ds.to(k_c.dtype)
        dq_c = tl.dot(ds, k_c, dq_c, input_precision="ieee")
        if P > 0:
            dq_r = tl.dot(ds, k_r, dq_r, input_precision="ieee")
    if RECIPROCAL:
        tl.store(sums_ptr + cells + cell, tl.sum(dalpha, 0))
        target = dc_ptr + line * C + x[:, None] * (H * C) + c[None, :]
        tl.store(target, dc.to(dc_ptr.dtype.element_ty), mask=(x < rows)[:, None] & (c < C)[None, :])

    for start in range(low, whole, BN):
        at = latent_ptr + start * L
        k_c = load_tile(at, n, 0, c, L, C, False)
        s = tl.dot(q_c, tl.trans(k_c), input_precision="ieee")
        if P > 0:
            k_r = load_tile(at + C, n, 0, r, L, P, False)
            s = tl.dot(q_r, tl.trans(k_r), s, input_precision="ieee")
        if MODE == GROUPED:
            size = tl.load(log_size_ptr + start + n).to(tl.float32)
            s = s + size[None, :]
        p = tl.exp2(s * LOG2E - lse[:, None])
        dp = tl.dot(grad, tl.trans(k_c), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(k_c.dtype)
        dq_c = tl.dot(ds, k_c, dq_c, input_precision="ieee")
        if P > 0:
            dq_r = tl.dot(ds, k_r, dq_r, input_precision="ieee")

    if GROUPS > 0:
        group_ptr += batch * total * L
        log_size_ptr += batch * total
        bits_ptr += batch * words * length
        lse -= tl.load(far_bias_ptr + head).to(tl.float32) * LOG2E
        count = far_count(i, total, UNIT, GROUPS)
        whole = far_count(first, total, UNIT, GROUPS) // BN * BN
        dbias = tl.zeros([BM], tl.float32)
        for start in range(0, whole, BN):
            at = group_ptr + start * L
            g_c = load_tile(at, n, 0, c, L, C, False)
            s = tl.dot(q_c, tl.trans(g_c), input_precision="ieee")
            if P > 0:
                g_r = load_tile(at + C, n, 0, r, L, P, False)
                s = tl.dot(q_r, tl.trans(g_r), s, input_precision="ieee")
            size = tl.load(log_size_ptr + start + n).to(tl.float32) * LOG2E
            p = tl.exp2(s * LOG2E + (size[None, :] - lse[:, None]))
            if OPENED:
                word = bit_word(bits_ptr, i, i < length, start, length, n, BN, False)
                p = tl.where((word & (1 << (n % 32))[None, :]) != 0, 0.0, p)
            dp = tl.dot(grad, tl.trans(g_c), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            dbias += tl.sum(ds, 1)
            ds = ds.to(g_c.dtype)
            dq_c = tl.dot(ds, g_c, dq_c, input_precision="ieee")
            if P > 0:
                dq_r = tl.dot(ds, g_r, dq_r, input_precision="ieee")
        for start in range(whole, far_count(last, total, UNIT, GROUPS), BN):
            at = group_ptr + start * L
            g_c = load_tile(at, n, total - start, c, L, C, True)
            s = tl.dot(q_c, tl.trans(g_c), input_precision="ieee")
            if P > 0:
                g_r = load_tile(at + C, n, total - start, r, L, P, True)
                s = tl.dot(q_r, tl.trans(g_r), s, input_precision="ieee")
            size = tl.load(log_size_ptr + start + n, mask=start + n < total, other=0.0).to(tl.float32) * LOG2E
            p = tl.exp2(s * LOG2E + (size[None, :] - lse[:, None]))
            hidden = (start + n)[None, :] >= count[:, None]
            if OPENED:
                word = bit_word(bits_ptr, i, i < length, start, length, n, BN, False)
                hidden = hidden | ((word & (1 << (n % 32))[None, :]) != 0)
            p = tl.where(hidden, 0.0, p)
            dp = tl.dot(grad, tl.trans(g_c), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            dbias += tl.sum(ds, 1)
            ds = ds.to(g_c.dtype)
            dq_c = tl.dot(ds, g_c, dq_c, input_precision="ieee")
            if P > 0:
                dq_r = tl.dot(ds, g_r, dq_r, input_precision="ieee")
        tl.store(sums_ptr + 2 * cells + cell, tl.sum(dbias, 0))

    target = dq_ptr + line * L + x[:, None] * (H * L)
    live = (x < rows)[:, None]
    tl.store(target + c[None, :], dq_c.to(dq_ptr.dtype.element_ty), mask=live & (c < C)[None, :])
    if P > 0:
        tl.store(target + C + r[None, :], dq_r.to(dq_ptr.dtype.element_ty), mask=live & (r < P)[None, :])


# ------------------------------------------------------------------------------------------------ launchers


def _keys_tiles(dtype: torch.dtype, content: int, mode: int) -> dict:
    """Tile and schedule: timed on an H100 for content <= 64 (docs/log.md), elsewhere what fits."""
    if dtype == torch.float32:  # no tensor cores: wide tiles only make ptxas spill, and slow
        block = 32 if content <= 64 else 16
        return dict(BM=block, BN=32, num_warps=4, num_stages=1)
    if content <= 64 and mode == FAR.value:
        return dict(BM=128, BN=64, num_warps=4, num_stages=2)
    if content <= 64 and mode == CAUSAL.value:
        return dict(BM=64, BN=64, num_warps=4, num_stages=2)
    if content <= 64:
        return dict(BM=32, BN=64, num_warps=4, num_stages=3)
    if content <= 128:
        return dict(BM=64, BN=64, num_warps=8, num_stages=2)
    return dict(BM=32, BN=64, num_warps=8, num_stages=1)


def _queries_tiles(dtype: torch.dtype, content: int, summaries: bool) -> dict:
    """Tile and schedule: timed for content <= 64 (docs/log.md), elsewhere what fits."""
    if dtype == torch.float32:  # no tensor cores: wide tiles only make ptxas spill, and slow
        block = 32 if content <= 64 else 16
        return dict(BM=block, BN=32, num_warps=4, num_stages=1)
    if content <= 64:
        return dict(BM=64, BN=32 if summaries else 64, num_warps=4, num_stages=3)
    if content <= 128:
        return dict(BM=128, BN=64, num_warps=8, num_stages=1)
    return dict(BM=64, BN=32, num_warps=8, num_stages=1)


PROGRAMS = 1024  # the keys kernel is cut until there are about so many programs
MOST_PARTS = 32
# A sum of 1.5 million rows on the tensor cores came out 0.5% short in every element (docs/log.md): where they
# add, 16 rows at a time, they cut off rather than round. The loss grows with the number of additions.
MOST_ROWS = 2**18


def _parts(programs: int, rows: int, tile: int) -> int:
    """Parts of a range of at most `rows` rows, half of them on average: enough programs, each of them with
    some tiles of rows, and none with more rows than one sum may take."""
    wanted = min(PROGRAMS // max(programs, 1), rows // 2 // (16 * tile), MOST_PARTS)
    return max(1, wanted, triton.cdiv(rows, MOST_ROWS))


def keys_gradient(
    grad_BTHC: Tensor,
    lse_BTH: Tensor,
    delta_BTH: Tensor,
    q_BTHL: Tensor,
    key_BNL: Tensor,
    *,
    content: int,
    mode: int,
    unit: int,
    band: int = 0,
    alpha_H: Tensor | None = None,
    log_size_BN: Tensor | None = None,
    far_bias_H: Tensor | None = None,
    groups: int = 0,
    bits: Tensor | None = None,
    tiles: dict | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the keys (B, N, L) in float32 and, with alpha, the band's gradient of the key queries.

    The keys are the token latents (CAUSAL, WINDOWED), the groups that attend (GROUPED), or the summaries that
    tokens read (FAR: unit is the window, `groups` G). The second result is (B, T, H, C) in the dtype of q;
    the first lacks what the reciprocal term adds to c_i (`queries_gradient`).
    """
    batch, length, heads, width = q_BTHL.shape
    total = key_BNL.shape[1]
    tiles = tiles or _keys_tiles(q_BTHL.dtype, content, mode)
    blocks = triton.cdiv(total, tiles["BN"])
    if parts is None:
        reach = length if mode != WINDOWED.value else min(length, unit * 3 // 2)
        parts = _parts(blocks * batch, reach * heads, tiles["BM"])
    dkey = q_BTHL.new_empty(parts, batch, total, width, dtype=torch.float32)
    band_gradient = None
    if alpha_H is not None:
        band_gradient = q_BTHL.new_empty(batch, length, heads, content)

    def given(x):
        return q_BTHL if x is None else x  # never read

    _keys_kernel[(blocks, parts, batch)](
        grad_BTHC,
        lse_BTH,
        delta_BTH,
        q_BTHL,
        key_BNL,
        given(log_size_BN),
        given(far_bias_H),
        given(bits),
        given(alpha_H),
        dkey,
        given(band_gradient),
        length,
        total,
        0 if bits is None else bits.shape[1],
        H=heads,
        **widths(width, content),
        MODE=mode,
        UNIT=unit,
        BAND=band,
        GROUPS=groups,
        RECIPROCAL=alpha_H is not None,
        OPENED=bits is not None,
        SPLIT=parts,
        **tiles,
    )
    return (dkey[0] if parts == 1 else dkey.sum(0)), band_gradient


def queries_gradient(
    grad_BTHC: Tensor,
    lse_BTH: Tensor,
    delta_BTH: Tensor,
    q_BTHL: Tensor,
    latent_BTL: Tensor,
    *,
    content: int,
    mode: int,
    unit: int,
    band: int = 0,
    alpha_H: Tensor | None = None,
    sink_H: Tensor | None = None,
    log_size_BM: Tensor | None = None,
    group_BML: Tensor | None = None,
    far_bias_H: Tensor | None = None,
    groups: int = 0,
    bits: Tensor | None = None,
    dq_opened: Tensor | None = None,
    dq_band: Tensor | None = None,
    tiles: dict | None = None,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """dq (B, T, H, L) in the dtype of q, dc (B, T, H, C) of the reciprocal term, dsink, dalpha, dbias (H,).

    dq starts from `dq_opened` and from `dq_band`, the second result of `keys_gradient`.
    """
    batch, length, heads, width = q_BTHL.shape
    assert group_BML is None or (bits is None) == (dq_opened is None)
    assert (alpha_H is None) == (dq_band is None)
    tiles = tiles or _queries_tiles(q_BTHL.dtype, content, group_BML is not None)
    blocks = triton.cdiv(length, tiles["BM"])
    dq = torch.empty_like(q_BTHL)
    dc = None if dq_band is None else torch.empty_like(dq_band)
    sums = q_BTHL.new_empty(3, batch, blocks, heads, dtype=torch.float32)

    def given(x):
        return q_BTHL if x is None else x  # never read

    _queries_kernel[(blocks * heads, batch)](
        grad_BTHC,
        lse_BTH,
        delta_BTH,
        q_BTHL,
        latent_BTL,
        given(group_BML),
        given(log_size_BM),
        given(far_bias_H),
        given(bits),
        given(alpha_H),
        given(sink_H),
        given(dq_opened),
        given(dq_band),
        dq,
        given(dc),
        sums,
        length,
        0 if group_BML is None else group_BML.shape[1],
        0 if bits is None else bits.shape[1],
        H=heads,
        **widths(width, content),
        MODE=mode,
        UNIT=unit,
        BAND=band,
        GROUPS=groups,
        RECIPROCAL=alpha_H is not None,
        SINK=sink_H is not None,
        OPENED=dq_opened is not None,
        **tiles,
    )
    # One sum each: outputs of a custom op may not share memory.
    present = (("sink", sink_H), ("alpha", alpha_H), ("far_bias", far_bias_H))
    return dq, dc, {name: sums[k].sum((0, 1)) for k, (name, x) in enumerate(present) if x is not None}
