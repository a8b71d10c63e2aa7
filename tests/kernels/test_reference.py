"""The plain attention against double loops and identities (oracles 3, 4, 7), its backward, its memory.

Legend: B rows, T tokens, H heads, C content width, P rotary width, L = C + P, W window, R group size,
G = W/R.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support import F64, Largest, assert_close

from coga.grouping import make_grouping, pool
from coga.kernels import dispatch, reference
from coga.types import Far, Grouping

B, H, C, P, W, R = 2, 3, 6, 4, 16, 4
L, G = C + P, W // R
T = 3 * W + 5


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64)


def random_grouping(windows: int, groups: int = G, empty: bool = False) -> Grouping:
    """Groups of unequal size; with `empty`, the last group of each window has no member."""
    index = torch.randint(0, groups - empty, (B, windows, W))
    return make_grouping(index, groups)


def make_far(
    latent, q, grouping: Grouping, opened: int, bias=None, read: int = 2 * G, shift: float = 0.0
) -> Far:
    """Groups of the first windows as the model makes them, unrefined."""
    end = grouping.index_BNW.shape[1] * W
    group = pool(latent[:, :end], grouping)[:, :read]
    size = grouping.size_BM[:, :read]
    groups = grouping.weight_BNWG.shape[-1]
    open_groups = None
    if opened:
        log_size = size.to(F64).log()
        open_groups = dispatch.select(q.mean(2), group, log_size, count=opened, window=W, groups=groups)
    return Far(
        group_BML=group,
        log_size_BM=size.to(F64).log(),
        far_bias_H=torch.zeros(H, dtype=F64) if bias is None else bias,
        slot_BSL=dispatch.permute(latent[:, :end], grouping.order_BS) if opened else None,
        offset_BM=grouping.offset_BM[:, :read],
        size_BM=size,
        open_BTK=open_groups,
        groups=groups,
        slots=int(size.max()),
        open_shift=torch.tensor(shift, dtype=F64) if shift else None,
    )


def double_loop(q, latent, *, content, window, band, alpha, sink, far=None):
    """The four parts of the module docstring, one query, head and key at a time."""
    out = torch.zeros(*q.shape[:3], content, dtype=F64)
    lse = torch.zeros(q.shape[:3], dtype=F64)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            lowest = 0 if window is None else max(0, i // window - 1) * window
            for h in range(q.shape[2]):
                score, value = [], []
                for j in range(lowest, i + 1):
                    s = float(q[b, i, h] @ latent[b, j])
                    if i - j < band:
                        s += float(alpha[h] * (q[b, j, h, :content] @ latent[b, i, :content]))
                    score.append(s)
                    value.append(latent[b, j, :content])
                if far is not None:
                    opened = [] if far.open_BTK is None else far.open_BTK[b, i].tolist()
                    for m in range(max(0, i // window - 1) * far.groups):
                        size, start = int(far.size_BM[b, m]), int(far.offset_BM[b, m])
                        if m in opened:
                            for slot in range(start, start + size):
                                s = float(q[b, i, h] @ far.slot_BSL[b, slot])
                                score.append(s + (0.0 if far.open_shift is None else float(far.open_shift)))
                                value.append(far.slot_BSL[b, slot, :content])
                        elif size and far.group_BML is not None:
                            s = float(q[b, i, h] @ far.group_BML[b, m] + far.far_bias_H[h])
                            score.append(s + math.log(size))
                            value.append(far.group_BML[b, m, :content])
                if sink is not None:
                    score.append(float(sink[h]))
                    value.append(torch.zeros(content, dtype=F64))
                scores = torch.tensor(score, dtype=F64)
                lse[b, i, h] = scores.logsumexp(0)
                out[b, i, h] = scores.softmax(0) @ torch.stack(value)
    return out, lse


@pytest.mark.parametrize("band", [0, 1, 7, W])
@pytest.mark.parametrize("window", [None, W])
def test_reciprocal_attention_is_a_double_loop(window, band):
    q, latent = normal(B, T, H, L), normal(B, T, L)
    alpha, sink = normal(H), normal(H)
    got = reference.attend(
        q, latent, content=C, window=window, band=band, alpha_H=alpha if band else None, sink_H=sink
    )
    want = double_loop(q, latent, content=C, window=window, band=band, alpha=alpha, sink=sink)
    assert_close(got[0], want[0])
    assert_close(got[1], want[1])


def test_the_reciprocal_term_reads_the_earlier_query_and_the_later_latent():
    """r[i, j] = q_j . c_i: the other way round, or with alpha 0, the output is another one."""
    q, latent, alpha = normal(B, 9, H, L), normal(B, 9, L), torch.tensor([0.0, 0.5, -1.0], dtype=F64)
    plain, _ = reference.attend(q, latent, content=C, band=9)
    got, _ = reference.attend(q, latent, content=C, band=9, alpha_H=alpha)
    score = torch.einsum("bihl,bjl->bhij", q, latent)
    term = torch.einsum("bjhc,bic->bhij", q[..., :C], latent[..., :C]) * alpha[:, None, None]
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    prob = (score + term).masked_fill(later, -torch.inf).softmax(-1)
    assert_close(got, torch.einsum("bhij,bjc->bihc", prob, latent[..., :C]))
    assert_close(got[:, :, 0], plain[:, :, 0])
    assert (got - plain)[:, 1:, 1:].abs().amin((0, 1)).max() > 1e-6


@pytest.mark.parametrize("opened", [0, 1, 3, 2 * G])
@pytest.mark.parametrize("empty", [False, True])
def test_all_four_parts_are_a_double_loop(opened, empty, monkeypatch):
    q, latent = normal(B, T, H, L), normal(B, T, L)
    alpha, sink, bias = normal(H), normal(H), normal(H)
    far = make_far(latent, q, random_grouping(3, empty=empty), opened, bias, shift=-0.7 if empty else 0.0)
    far = replace(far, group_BML=far.group_BML + 0.3 * normal(*far.group_BML.shape))  # as if refined
    options = dict(content=C, window=W, band=7)
    for one in (far, replace(far, group_BML=None, log_size_BM=None, far_bias_H=None)):
        want = double_loop(q, latent, alpha=alpha, sink=sink, far=one, **options)
        for chunk in (256, 24, 5):  # chunks inside windows, across windows, small
            monkeypatch.setattr(reference, "CHUNK", chunk)
            got = reference.attend(q, latent, alpha_H=alpha, sink_H=sink, far=one, **options)
            assert_close(got[0], want[0])
            assert_close(got[1], want[1])


def test_group_attention_is_a_double_loop(monkeypatch):
    windows = 4
    total = windows * G
    q, latent, alpha = normal(B, total, H, L), normal(B, total, L), normal(H)
    size = torch.randint(0, 5, (B, total))
    size[:, 1] = 3  # some group of the first window is not empty
    log_size = size.to(F64).log()
    out, lse = torch.zeros(B, total, H, C, dtype=F64), torch.zeros(B, total, H, dtype=F64)
    for b in range(B):
        for i in range(total):
            for h in range(H):
                score, value = [], []
                for j in range((i // G + 1) * G):
                    s = float(q[b, i, h] @ latent[b, j]) + float(log_size[b, j])
                    if i // G - j // G in (0, 1):  # inside a window also with groups after i
                        s += float(alpha[h] * (q[b, j, h, :C] @ latent[b, i, :C]))
                    score.append(s)
                    value.append(latent[b, j, :C])
                scores = torch.tensor(score, dtype=F64)
                lse[b, i, h] = scores.logsumexp(0)
                out[b, i, h] = scores.softmax(0) @ torch.stack(value)
    window = torch.arange(total) // G
    for chunk in (256, 5):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        options = dict(content=C, groups=G, alpha_H=alpha)
        got = reference.group_attend(q, window, latent, log_size, **options)
        assert_close(got[0], out)
        assert_close(got[1], lse)


# ------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("opened", [0, 2])
def test_groups_of_equal_members_are_dense_attention(opened):
    """Oracle 3: a group of |g| equal tokens counts as they do, thanks to log|g|."""
    grouping = random_grouping(3)
    q, latent, alpha, sink = normal(B, T, H, L), normal(B, T, L), normal(H), normal(H)
    # The tokens of a group take the latent of its first member.
    value = normal(B, 3 * G, L)
    token_group = (grouping.index_BNW + torch.arange(3)[:, None] * G).flatten(1)
    latent[:, : 3 * W] = value.gather(1, token_group[..., None].expand(-1, -1, L))
    options = dict(content=C, band=7, alpha_H=alpha, sink_H=sink)
    far = make_far(latent, q, grouping, opened)
    got = reference.attend(q, latent, window=W, far=far, **options)
    want = reference.attend(q, latent, window=None, **options)
    assert_close(got[0], want[0])
    assert_close(got[1], want[1])
    # It is no identity of members that differ, nor without log|g|.
    flat = replace(far, log_size_BM=torch.zeros_like(far.log_size_BM))
    assert (reference.attend(q, latent, window=W, far=flat, **options)[0] - want[0]).abs().max() > 1e-3


@pytest.mark.parametrize("opened", [0, 3])
def test_permuting_the_groups_of_an_assignment_changes_nothing(opened):
    """Oracle 4: pooling, group attention, selection, opening, attention."""
    q, latent, alpha, bias = normal(B, T, H, L), normal(B, T, L), normal(H), normal(H)
    index = torch.randint(0, G, (B, 3, W))
    rename = torch.stack([torch.randperm(G) for _ in range(3)])  # a permutation a window
    renamed = torch.stack([rename[n][index[:, n]] for n in range(3)], 1)
    assert (renamed != index).any()
    outs = []
    for groups in (make_grouping(index, G), make_grouping(renamed, G)):
        far = make_far(latent, q, groups, opened, bias)
        state = pool(q[:, : 3 * W].flatten(2), groups).unflatten(-1, (H, L))
        raw, size = pool(latent[:, : 3 * W], groups), groups.size_BM.to(F64).log()
        mixed, _ = dispatch.group_attend(state, raw, size, content=C, groups=G, alpha_H=alpha)
        refined = raw[:, : 2 * G] + torch.nn.functional.pad(mixed.mean(2)[:, : 2 * G], (0, P))
        far = replace(far, group_BML=refined)
        outs.append(reference.attend(q, latent, content=C, window=W, band=7, alpha_H=alpha, far=far)[0])
    assert_close(outs[0], outs[1])


# -------------------------------------------------------------------------------------- select, round


def test_selection_by_members_is_by_the_best_of_them():
    """Against a loop over tokens, groups and members; unequal groups, an empty one."""
    torch.manual_seed(0)
    window, groups, length, width = 6, 3, 27, 5
    size = torch.tensor([[2, 2, 2, 6, 0, 0, 1, 4, 1, 3, 1, 2], [1, 1, 4, 2, 3, 1, 0, 6, 0, 2, 2, 2]])
    offset = size.cumsum(1) - size
    q, slot = torch.randn(2, length, width).double(), torch.randn(2, 24, width).double()
    found = dispatch.select_members(q, slot, offset, size, count=2, window=window, groups=groups, slots=6)
    for b in range(2):
        for t in range(length):
            visible = max(0, t // window - 1) * groups
            best = []
            for m in range(visible):
                members = slot[b, offset[b, m] : offset[b, m] + size[b, m]]
                if len(members):
                    best.append((-float((members @ q[b, t]).max()), m))
            want = sorted(m for _, m in sorted(best)[:2])
            assert found[b, t].tolist() == want + [-1] * (2 - len(want))


@pytest.mark.parametrize("by", ["summary", "members"])
def test_autocast_changes_no_selection(by):
    """Half precision scores would move one token in thirty, and decoding away from the Triton kernels."""
    torch.manual_seed(0)
    window, groups, length, width = 32, 4, 256, 24
    q, slot = torch.randn(1, length, width) * 2, torch.randn(1, length, width)
    size = torch.full((1, length // window * groups), window // groups)
    group, options = slot[:, :: window // groups], dict(count=4, window=window, groups=groups)

    def choice():
        if by == "summary":
            return dispatch.select(q, group, size.float().log(), **options)
        return dispatch.select_members(q, slot, size.cumsum(1) - size, size, slots=8, **options)

    plain = choice()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(choice(), plain)


def test_selection_is_the_rounded_best_with_ties_to_the_lower_group():
    q, group = normal(B, T, L), normal(B, 2 * G, L)
    group[:, 5] = group[:, 2]
    size = torch.full((B, 2 * G), 4)
    size[:, 2] = size[:, 5] = 4
    size[:, 7] = 0
    log_size, step = size.to(F64).log(), reference.rounding_step(F64)
    got = dispatch.select(q, group, log_size, count=3, window=W, groups=G)
    for b in range(B):
        for i in range(T):
            score = {}
            for m in range(max(0, i // W - 1) * G):
                if size[b, m]:
                    exact = float(q[b, i] @ group[b, m]) + math.log(int(size[b, m]))
                    score[m] = round(exact / step)
            best = sorted(sorted(score, key=lambda m: (-score[m], m))[:3])
            assert got[b, i].tolist() == best + [-1] * (3 - len(best))
    both = (got == 2).any(-1) | ~(got == 5).any(-1)
    assert both.all()  # 5 equals 2, so it is never opened without it


def test_one_ulp_moves_no_choice():
    """Scores that differ by far less than the rounding step are equal: the lower index wins, both ways."""
    for dtype in (torch.float32, F64):
        q = torch.ones(1, 2 * W + 1, 1, dtype=dtype)
        tiny = torch.finfo(dtype).eps * 4
        for sign in (-1, 1):
            group = torch.tensor([[[1.0], [1.0 + sign * tiny], [0.5], [0.2]]], dtype=dtype)
            got = dispatch.select(q, group, torch.zeros(1, 4, dtype=dtype), count=1, window=W, groups=4)
            assert got[0, -1].tolist() == [0]


# --------------------------------------------------------------------------------------------- memory


def largest(length: int, window: int | None, opened: int) -> int:
    q, latent = torch.randn(1, length, H, L), torch.randn(1, length, L)
    far = None
    if window:
        windows = length // W
        index = (torch.arange(W) // R).expand(1, windows, -1)
        grouping, read = make_grouping(index, G), max(0, (length - 1) // W - 1) * G
        far = make_far(latent, q, grouping, opened, torch.zeros(H), read)
        far = replace(far, log_size_BM=far.log_size_BM.float())
    options = dict(content=C, window=window, band=7, alpha_H=torch.ones(H), sink_H=torch.ones(H), far=far)
    with Largest() as seen:
        out, lse = reference.attend(q, latent, **options)
        reference.attend_backward(torch.ones_like(out), out, lse, q, latent, **options)
    return seen.elements


@pytest.mark.parametrize(("window", "opened"), [(None, 0), (W, 0), (W, 4)])
def test_the_largest_tensor_grows_linearly(window, opened, monkeypatch):
    """Never T x T, nor the opened members of all tokens: twice the length, at most twice the largest."""
    monkeypatch.setattr(reference, "CHUNK", 32)
    short, long = largest(512, window, opened), largest(1024, window, opened)
    assert long <= 2.05 * short
    assert long < 1024 * 1024 / 4
    if opened:
        assert long < 1024 * opened * R * L / 2


def test_the_memory_check_can_fail(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 10**6)
    assert largest(1024, None, 0) > 2.05 * largest(512, None, 0)


# ----------------------------------------------------------------------------------- nothing to read


def test_a_row_with_nothing_to_read_gives_zero_and_no_nan():
    """A query whose keys are all absent (before the row's start): zero output, lse -inf, zero gradients."""
    q, key = normal(1, 2, H, L).requires_grad_(), normal(1, 3, L)
    out, lse = reference.attend_chunk(
        q, torch.tensor([0, 1]), key, torch.tensor([-1, -2, 1]), content=C, window=W
    )
    assert (out[:, 0] == 0).all() and lse[:, 0].isneginf().all()
    assert_close(out[0, 1], key[0, 2, :C].expand(H, C))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    """The output is the float32 result of the same rounded inputs, rounded once."""
    q, latent = normal(B, T, H, L).to(dtype), normal(B, T, L).to(dtype)
    got, lse = reference.attend(q, latent, content=C, window=W)
    want, want_lse = reference.attend(q.float(), latent.float(), content=C, window=W)
    assert got.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(got, want.to(dtype)) and torch.equal(lse, want_lse)
