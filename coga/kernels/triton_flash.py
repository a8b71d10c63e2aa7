"""Near, far and group attention in one Triton pass over the keys: the tile-shaped parts of the softmax.

A program owns BM queries of one head and walks the keys they may read in tiles of BN: first group summaries,
then tokens. One latent, shared by all heads, is key and value, so a tile of keys is loaded once and used by
both products. With s in natural logarithms:

    near (WINDOWED, CAUSAL)   s_ij = q_i . k_j + alpha_h (q_j . c_i)[band]       low(i) <= j < high(i)
    far                       s_im = q_i . g_m + log|g_m| + bias_h               unopened m < max(0, w-1) G
    groups (GROUPED)          s_ij = q_i . g_j + log|g_j| + alpha_h (q_j . c_i)[band]

The pass ends with the sink and with the opened part (an output and a log-sum-exp of its own), so that one
output and one log-sum-exp are written. Tiles that every query sees whole skip the masks; the reciprocal
product is computed only for tiles that touch the band. Opened groups are excluded through bit words
(`opened_bits`), one bit a token and group, built once for all heads.

Cost: B H T (near + far keys) (L + C) multiply-adds. The plain twin is `coga.kernels.reference`; the backward
pass is `coga.kernels.triton_flash_backward`.

Legend: B batch, T tokens (or groups, where groups attend), H heads, C content width, P rotary width,
L = C+P, M groups, G groups in a window, K opened groups a token; i query, j key; in kernels BM queries and BN
keys of a tile, BC and BP widths padded to a power of two.
"""

# ruff: noqa: RET505 - a compile-time branch of a kernel is written as if/else
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["CAUSAL", "FAR", "GROUPED", "WINDOWED", "flash_forward", "opened_bits", "widths"]

LOG2E = tl.constexpr(1.4426950408889634)

# What a query may read (MODE): all of the past, two windows, groups of windows <= its own, summaries.
CAUSAL, WINDOWED, GROUPED, FAR = (tl.constexpr(mode) for mode in range(4))


# ------------------------------------------------------------------------------ bounds, shared by all kernels


@triton.jit
def key_low(i, MODE: tl.constexpr, UNIT: tl.constexpr):
    """First key that query i reads."""
    if MODE == WINDOWED:
        return tl.maximum(i // UNIT - 1, 0) * UNIT
    else:
        return i * 0


@triton.jit
def key_high(i, total, MODE: tl.constexpr, UNIT: tl.constexpr):
    """End of the keys that query i reads."""
    if MODE == GROUPED:
        return tl.minimum((i // UNIT + 1) * UNIT, total)
    else:
        return i + 1


@triton.jit
def band_low(i, MODE: tl.constexpr, UNIT: tl.constexpr, BAND: tl.constexpr):
    """First key that has a reciprocal term with query i; the band ends with the keys."""
    if MODE == GROUPED:
        return tl.maximum(i // UNIT - 1, 0) * UNIT
    else:
        return tl.maximum(i - BAND + 1, 0)


@triton.jit
def far_count(i, total, UNIT: tl.constexpr, GROUPS: tl.constexpr):
    """How many groups token i may read."""
    return tl.minimum(tl.maximum(i // UNIT - 1, 0) * GROUPS, total)


@triton.jit
def load_tile(base, row, limit, col, STRIDE: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr):
    """Rows row < limit (all, without MASK) of a matrix, columns col < WIDTH; zero elsewhere."""
    at = base + row[:, None] * STRIDE + col[None, :]
    PADDED: tl.constexpr = col.shape[0] != WIDTH
    if MASK:
        if PADDED:
            return tl.load(at, mask=(row < limit)[:, None] & (col < WIDTH)[None, :], other=0.0)
        else:
            return tl.load(at, mask=(row < limit)[:, None], other=0.0)
    else:
        if PADDED:
            return tl.load(at, mask=(col < WIDTH)[None, :], other=0.0)
        else:
            return tl.load(at)


@triton.jit
def bit_word(bits_ptr, token, live, first, length, key, BN: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Words that hold the opened bits of keys first .. first+BN-1, one word a token and key."""
    bits_ptr += (first // 32) * (length + tl.full([], 0, tl.int64))
    word = tl.load(bits_ptr + token, mask=live, other=0)
    if KEYS_FIRST:
        word = word[None, :]
        part = (key // 32)[:, None]
    else:
        word = word[:, None]
        part = (key // 32)[None, :]
    for k in tl.static_range(1, BN // 32):
        bits_ptr += length
        more = tl.load(bits_ptr + token, mask=live, other=0)
        if KEYS_FIRST:
            word = tl.where(part == k, more[None, :], word)
        else:
            word = tl.where(part == k, more[:, None], word)
    return word


# ------------------------------------------------------------------------------------------- opened bits


@triton.jit(do_not_specialize=["length", "words"])
def _bits_kernel(
    open_ptr,
    bits_ptr,
    length,
    words,
    K: tl.constexpr,
    KB: tl.constexpr,
    BT: tl.constexpr,
    WORDS: tl.constexpr,
):
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    live = token < length
    batch = tl.program_id(2).to(tl.int64)
    open_ptr += batch * length * K
    bits_ptr += batch * words * length
    k = tl.arange(0, KB)
    first = tl.program_id(1) * WORDS
    for word in range(first, tl.minimum(first + WORDS, words)):
        value = tl.zeros([BT], tl.int32)
        for start in range(0, K, KB):
            at = open_ptr + token.to(tl.int64)[:, None] * K + (start + k)[None, :]
            group = tl.load(at, mask=live[:, None] & (start + k < K)[None, :], other=-1).to(tl.int32)
            bit = tl.full([BT, KB], 1, tl.int32) << (group & 31)
            # A token opens a group at most once, so the sum of its bits is their union.
            value += tl.sum(tl.where((group >> 5) == word, bit, 0), 1)
        tl.store(bits_ptr + word * (length + tl.full([], 0, tl.int64)) + token, value, mask=live)


def opened_bits(open_BTK: Tensor, groups: int) -> Tensor:
    """Bit m % 32 of word (b, m // 32, t): whether token t opened group m. int32, words to a multiple of 4."""
    batch, length, count = open_BTK.shape
    words = triton.cdiv(groups, 128) * 4
    bits = torch.empty(batch, words, length, dtype=torch.int32, device=open_BTK.device)
    block, span = 128, 16
    grid = (triton.cdiv(length, block), triton.cdiv(words, span), batch)
    columns = min(32, triton.next_power_of_2(count))
    _bits_kernel[grid](
        open_BTK.contiguous(), bits, length, words, K=count, KB=columns, BT=block, WORDS=span, num_warps=4
    )
    return bits


# ----------------------------------------------------------------------------------------------- forward


@triton.jit
def _absorb(s, m, norm, acc, value, SCALED: tl.constexpr, GUARD: tl.constexpr):
    """One tile of scores into the running softmax; m is in base 2, s too where SCALED."""
    if SCALED:
        higher = tl.maximum(m, tl.max(s, 1))
    else:
        higher = tl.maximum(m, tl.max(s, 1) * LOG2E)
    base = higher
    if GUARD:  # a row that has read nothing yet
        base = tl.where(higher == -float("inf"), 0.0, higher)
    if SCALED:
        p = tl.exp2(s - base[:, None])
    else:
        p = tl.exp2(s * LOG2E - base[:, None])
    old = tl.exp2(m - base)
    norm = norm * old + tl.sum(p, 1)
    # A product of its own: ptxas serialises every wgmma of a loop whose last one is in flight past its end.
    # (fma, because the compiler folds a plain sum back into the product.)
    part = tl.dot(p.to(value.dtype), value, input_precision="ieee")
    acc = tl.fma(acc, tl.broadcast_to(old[:, None], acc.shape), part)
    return higher, norm, acc


@triton.jit(do_not_specialize=["length", "total", "words"])
def _forward_kernel(
    q_ptr,
    latent_ptr,
    group_ptr,
    log_size_ptr,
    far_bias_ptr,
    bits_ptr,
    alpha_ptr,
    sink_ptr,
    opened_ptr,
    opened_lse_ptr,
    out_ptr,
    lse_ptr,
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
    # Tiles of the end of the sequence read most: they start first. Heads of a tile run side by side.
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
    latent_ptr += batch * length * L
    q_head = q_ptr + (batch * length * H + head) * L
    row_step = tl.full([], H * L, tl.int64)
    q_rows = q_ptr + (start_row * H + head) * L
    q_c = load_tile(q_rows, x, rows, c, H * L, C, True)
    if P > 0:
        q_r = load_tile(q_rows + C, x, rows, r, H * L, P, True)
    m = tl.full([BM], -float("inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BC], tl.float32)

    if GROUPS > 0:
        group_ptr += batch * total * L
        log_size_ptr += batch * total
        bits_ptr += batch * words * length
        bias = tl.load(far_bias_ptr + head).to(tl.float32)
        count = far_count(i, total, UNIT, GROUPS)
        whole = far_count(first, total, UNIT, GROUPS) // BN * BN
        for start in range(0, whole, BN):
            at = group_ptr + start * L
            g_c = load_tile(at, n, 0, c, L, C, False)
            s = tl.dot(q_c, tl.trans(g_c), input_precision="ieee")
            if P > 0:
                g_r = load_tile(at + C, n, 0, r, L, P, False)
                s = tl.dot(q_r, tl.trans(g_r), s, input_precision="ieee")
            size = tl.load(log_size_ptr + start + n).to(tl.float32)
            s = s * LOG2E + ((size + bias) * LOG2E)[None, :]
            if OPENED:
                word = bit_word(bits_ptr, i, i < length, start, length, n, BN, False)
                s = tl.where((word & (1 << (n % 32))[None, :]) != 0, -float("inf"), s)
            m, norm, acc = _absorb(s, m, norm, acc, g_c, True, True)
        for start in range(whole, far_count(last, total, UNIT, GROUPS), BN):
            at = group_ptr + start * L
            g_c = load_tile(at, n, total - start, c, L, C, True)
            s = tl.dot(q_c, tl.trans(g_c), input_precision="ieee")
            if P > 0:
                g_r = load_tile(at + C, n, total - start, r, L, P, True)
                s = tl.dot(q_r, tl.trans(g_r), s, input_precision="ieee")
            size = tl.load(log_size_ptr + start + n, mask=start + n < total, other=0.0).to(tl.float32)
            s = s * LOG2E + ((size + bias) * LOG2E)[None, :]
            hidden = (start + n)[None, :] >= count[:, None]
            if OPENED:
                word = bit_word(bits_ptr, i, i < length, start, length, n, BN, False)
                hidden = hidden | ((word & (1 << (n % 32))[None, :]) != 0)
            s = tl.where(hidden, -float("inf"), s)
            m, norm, acc = _absorb(s, m, norm, acc, g_c, True, True)

    if MODE == GROUPED:
        log_size_ptr += batch * length
    low = key_low(first, MODE, UNIT)
    end = key_high(first, length, MODE, UNIT)
    if RECIPROCAL:
        end = tl.minimum(end, band_low(first, MODE, UNIT, BAND))
    if key_low(last, MODE, UNIT) != low:  # the tile straddles windows: every key tile is masked
        end = low
    whole = low + tl.maximum(end - low, 0) // BN * BN
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
        m, norm, acc = _absorb(s, m, norm, acc, k_c, False, MODE == GROUPED)

    if RECIPROCAL:
        own = load_tile(latent_ptr + first * L, x, rows, c, L, C, True)
        alpha = tl.load(alpha_ptr + head).to(tl.float32)
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
        s = tl.where(seen, s, -float("inf"))
        m, norm, acc = _absorb(s, m, norm, acc, k_c, False, True)

    # What was read elsewhere joins the softmax: opened members, then the sink, whose value is zero.
    rest = tl.full([BM], -float("inf"), tl.float32)
    if OPENED:
        line = (start_row + x) * H + head
        rest = tl.load(opened_lse_ptr + line, mask=x < rows, other=-float("inf")) * LOG2E
    other = rest
    if SINK:
        sink = tl.load(sink_ptr + head).to(tl.float32) * LOG2E
        other = tl.maximum(other, sink)
    higher = tl.maximum(m, other)
    base = tl.where(higher == -float("inf"), 0.0, higher)
    old = tl.exp2(m - base)
    norm = norm * old
    acc = acc * old[:, None]
    if OPENED:
        share = tl.exp2(rest - base)
        norm += share
        opened = load_tile(opened_ptr + (start_row * H + head) * C, x, rows, c, H * C, C, True)
        acc += opened.to(tl.float32) * share[:, None]
    if SINK:
        norm += tl.exp2(sink - base)
    some = norm > 0
    norm = tl.where(some, norm, 1.0)
    out = acc / norm[:, None]
    lse = tl.where(some, (base + tl.log2(norm)) / LOG2E, -float("inf"))
    target = out_ptr + (start_row * H + head) * C + x[:, None] * (H * C) + c[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=(x < rows)[:, None] & (c < C)[None, :])
    tl.store(lse_ptr + (start_row + x) * H + head, lse, mask=x < rows)


def widths(width: int, content: int) -> dict:
    """Content and rotary widths and their padded tiles."""
    rotary = width - content
    return dict(
        C=content,
        P=rotary,
        BC=max(16, triton.next_power_of_2(content)),
        BP=max(16, triton.next_power_of_2(max(rotary, 1))),
    )


def _tiles(dtype: torch.dtype, content: int, alone: bool) -> dict:
    """Tile and schedule: timed for content <= 64 (docs/log.md), elsewhere what fits; alone: no far part."""
    if dtype == torch.float32:  # no tensor cores: wide tiles only make ptxas spill, and slow
        block = 32 if content <= 64 else 16
        return dict(BM=block, BN=32, num_warps=4, num_stages=1)
    if content <= 64:
        return dict(BM=64, BN=32 if alone else 64, num_warps=4, num_stages=4 if alone else 3)
    if content <= 128:
        return dict(BM=128, BN=64, num_warps=8, num_stages=3)
    return dict(BM=128, BN=32, num_warps=8, num_stages=2)


def flash_forward(
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
    opened: tuple[Tensor, Tensor] | None = None,
    tiles: dict | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, C) in the dtype of q and log-sum-exp (B, T, H) in float32; contiguous inputs.

    unit     tokens of a window (WINDOWED), groups of a window (GROUPED), anything for CAUSAL
    groups   G; 0 where there is no far part (`group_BML`, `log_size_BM`, `far_bias_H`)
    opened   output and log-sum-exp of the opened part; `bits`: its `opened_bits`, where there is a far part
    """
    batch, length, heads, width = q_BTHL.shape
    assert latent_BTL.dtype == q_BTHL.dtype and latent_BTL.shape == (batch, length, width)
    assert group_BML is None or (bits is None) == (opened is None)
    out = q_BTHL.new_empty(batch, length, heads, content)
    lse = q_BTHL.new_empty(batch, length, heads, dtype=torch.float32)
    tiles = tiles or _tiles(q_BTHL.dtype, content, mode == WINDOWED.value and group_BML is None)
    grid = (triton.cdiv(length, tiles["BM"]) * heads, batch)
    none = q_BTHL  # never read

    def given(x):
        return none if x is None else x

    _forward_kernel[grid](
        q_BTHL,
        latent_BTL,
        given(group_BML),
        given(log_size_BM),
        given(far_bias_H),
        given(bits),
        given(alpha_H),
        given(sink_H),
        *((none, none) if opened is None else opened),
        out,
        lse,
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
        OPENED=opened is not None,
        **tiles,
    )
    return out, lse
