"""Opened groups against `coga.kernels.reference`, in the Triton interpreter (`test_triton_opened.py`)."""

from __future__ import annotations

import pytest
import torch

from coga.kernels import reference
from coga.kernels.triton_inverted import invert, shape_options, slot_gradient
from coga.kernels.triton_opened import launch_options, opened_backward, opened_forward, scaled_lse
from coga.types import Far


def case(
    batch, length, heads, content, rotary, groups, slots, count, *, dtype=torch.float32, full=False, seed=0
):
    """Random opened groups: sizes 0..slots (or all full), ascending ids, some tokens with few or none."""
    g = torch.Generator().manual_seed(seed)
    width = content + rotary
    size = (
        torch.full((batch, groups), slots)
        if full
        else torch.randint(0, slots + 1, (batch, groups), generator=g)
    )
    total = int(size.sum(1).max()) + 3
    offset = size.cumsum(1) - size
    q = (torch.randn(batch, length, heads, width, generator=g) / width**0.25).to(dtype)
    slot = (torch.randn(batch, total, width, generator=g) / width**0.25).to(dtype)
    keep = torch.randint(0, count + 1, (batch, length), generator=g)
    keep[:, ::3] = count
    keep[:, 1] = 0
    chosen = torch.rand(batch, length, groups, generator=g).argsort(-1)[..., :count].sort(-1).values
    ids = torch.where(torch.arange(count) < keep[..., None], chosen, groups)
    ids = ids.sort(-1).values
    return q, slot, offset, size, torch.where(ids == groups, -1, ids)


def expected(q, slot, offset, size, open_BTK, content, slots):
    """Output and log-sum-exp of the opened part alone, from the members that the reference gathers."""
    far = Far(
        group_BML=slot[:, :0],
        log_size_BM=size.float().log(),
        far_bias_H=q.new_zeros(q.shape[2]),
        offset_BM=offset,
        size_BM=size,
        slot_BSL=slot,
        open_BTK=open_BTK,
        groups=1,
        slots=slots,
    )
    member, mask = reference.gather_members(far, open_BTK)
    score = (q @ member.transpose(-1, -2)).masked_fill(~mask[:, :, None], -torch.inf)
    lse = score.logsumexp(-1)
    prob = torch.exp(score - torch.where(lse.isinf(), 0.0, lse)[..., None])
    return prob @ member[..., :content], lse


SHAPES = {
    "wide": dict(batch=1, length=5, heads=2, content=64, rotary=16, groups=4, slots=16, count=2),
    "plain": dict(batch=2, length=5, heads=3, content=16, rotary=16, groups=6, slots=16, count=3),
    "slots-above-tile": dict(batch=1, length=7, heads=1, content=32, rotary=16, groups=5, slots=48, count=2),
    "packed-small-groups": dict(
        batch=2, length=6, heads=12, content=16, rotary=16, groups=9, slots=6, count=5
    ),
    "one-group-in-three-tiles": dict(
        batch=2, length=5, heads=2, content=16, rotary=16, groups=4, slots=48, count=1
    ),
    "half-full": dict(batch=1, length=7, heads=3, content=32, rotary=16, groups=5, slots=96, count=5),
    "no-rotary": dict(batch=1, length=5, heads=8, content=32, rotary=0, groups=4, slots=32, count=4),
    "odd-widths": dict(batch=1, length=4, heads=17, content=24, rotary=8, groups=4, slots=8, count=1),
    "full-groups": dict(
        batch=1, length=9, heads=4, content=16, rotary=16, groups=4, slots=32, count=2, full=True
    ),
    "more-than-tile-of-slots": dict(
        batch=1, length=4, heads=2, content=16, rotary=0, groups=3, slots=80, count=3
    ),
}


def scattered(open_BTK):
    """The same ids with what is missing in between, not at the end."""
    return torch.cat([open_BTK[..., -1:], open_BTK[..., :-1]], -1)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(name, listed, monkeypatch):
    """`listed`: tiles run over a list of all members, for there is room for more. Memory holds NaN."""
    empty = torch.Tensor.new_empty

    def poisoned(*arguments, **options):
        found = empty(*arguments, **options)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    shape = SHAPES[name]
    content, slots = shape["content"], shape["slots"]
    q, slot, offset, size, open_BTK = case(**shape)
    if listed:
        open_BTK = scattered(open_BTK)
        width = shape["heads"], content, shape["rotary"], shape["count"]
        assert launch_options(shape_options(*width), slots, mean=slots // 2)["LISTED"]
    inputs = q, slot, offset, size, open_BTK
    room = dict(content=content, slots=slots, mean=slots // 2 if listed else None)
    out, lse = opened_forward(*inputs, **room)
    q_ref, slot_ref = (x.clone().requires_grad_() for x in (q, slot))
    out_ref, lse_ref = expected(q_ref, slot_ref, offset, size, open_BTK, content, slots)
    torch.testing.assert_close(out, out_ref, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, lse_ref, rtol=1e-5, atol=1e-5)
    # Another part of the softmax: the final log-sum-exp is larger than the part's own.
    final = torch.logaddexp(lse_ref.detach(), torch.full_like(lse, 0.3))
    final[0, 1] = -torch.inf  # this token opened nothing; let it have read nothing at all
    share = torch.exp(lse_ref - final)
    share = torch.where(final.isinf(), 0.0, share)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    merged = out_ref * share[..., None] + torch.exp(0.3 - final)[..., None].nan_to_num(0, 0, 0) * 0.7
    delta = (grad * merged).sum(-1).detach()
    far_out = torch.full_like(out_ref, 0.7)
    whole = torch.logaddexp(lse_ref, torch.full_like(lse, 0.3))
    mix = out_ref * torch.exp(lse_ref - whole)[..., None] + far_out * torch.exp(0.3 - whole)[..., None]
    mix[0, 1] = 0.0
    (mix * grad).sum().backward()
    dq, dslot = opened_backward(grad, final, delta, *inputs, **room)
    torch.testing.assert_close(dq, q_ref.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dslot, slot_ref.grad, rtol=1e-4, atol=1e-5)


def test_lists_hold_every_pair_once_and_in_order():
    _, _, _, _, open_BTK = case(batch=2, length=23, heads=1, content=16, rotary=0, groups=5, slots=4, count=3)
    index = invert(open_BTK, 5, segment=4)
    flat = open_BTK.flatten()
    for v in range(10):
        pairs = index.order_N[index.first_V[v] : index.first_V[v + 1]]
        token = pairs // 3
        assert (flat[pairs] == v % 5).all()
        assert (token // 23 == v // 5).all()
        assert (token.diff() > 0).all()
        assert (index.owner == v).sum() == -(-len(pairs) // 4)
    assert index.first_V[10] == (flat >= 0).sum()
    assert (index.owner[index.end_V[-1] :] == 10).all()


def test_segments_change_nothing_but_rounding():
    shape = dict(batch=2, length=21, heads=3, content=16, rotary=16, groups=4, slots=8, count=3)
    q, slot, offset, size, open_BTK = case(**shape)
    out, lse = opened_forward(q, slot, offset, size, open_BTK, content=16, slots=8)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    inputs = (grad, scaled_lse(lse), (grad * out).sum(-1), q, slot, offset, size, open_BTK)
    whole = slot_gradient(*inputs, content=16, slots=8)
    for segment in (1, 3, 7):
        index = invert(open_BTK, 4, segment=segment)
        cut = slot_gradient(*inputs, content=16, slots=8, index=index)
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)


def test_nothing_opened_anywhere():
    q, slot, offset, size, _ = case(
        batch=1, length=3, heads=2, content=16, rotary=0, groups=3, slots=4, count=2
    )
    for count in (0, 2):
        none = torch.full((1, 3, count), -1)
        out, lse = opened_forward(q, slot, offset, size, none, content=16, slots=4)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
        dq, dslot = opened_backward(out, lse, lse * 0 - 1, q, slot, offset, size, none, content=16, slots=4)
        assert (dq == 0).all()
        assert (dslot == 0).all()
