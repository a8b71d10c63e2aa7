"""Selection against `coga.kernels.reference`, run in the Triton interpreter by `test_triton_select.py`."""

from __future__ import annotations

import pytest
import torch

from coga.kernels import reference
from coga.kernels.triton_select import select
from coga.kernels.triton_select_members import select_members

SHAPES = {
    "plain": dict(batch=2, length=37, width=32, window=4, groups=2, count=4),
    "odd-width-odd-count": dict(batch=1, length=50, width=24, window=4, groups=4, count=5),
    "two-tiles": dict(batch=1, length=45, width=96, window=2, groups=4, count=3),
    "one": dict(batch=2, length=21, width=16, window=3, groups=1, count=1),
    "all": dict(batch=2, length=21, width=16, window=3, groups=2, count=99),
    "shorter-than-two-windows": dict(batch=1, length=7, width=16, window=4, groups=2, count=1),
}


def case(batch, length, width, window, groups, count, *, equal=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    total = length // window * groups
    q = torch.randn(batch, length, width, generator=g)
    group = torch.randn(batch, total, width, generator=g) / width**0.5
    if equal:  # many equal scores: ties go to the lower group
        group = group[:, :1].expand(-1, total, -1).contiguous()
    size = torch.randint(0, 4, (batch, total), generator=g)
    options = dict(count=count, window=window, groups=groups, step=reference.rounding_step(torch.float32))
    return (q, torch.arange(length), group, size.float().log()), options


@pytest.mark.parametrize("equal", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("name", SHAPES)
def test_same_choice(name, equal):
    inputs, options = case(**SHAPES[name], equal=equal)
    if equal:
        inputs = (inputs[0], inputs[1], inputs[2], torch.where(inputs[3].isinf(), inputs[3], 0.0))
    expected = reference.select(*inputs, **options)
    chosen = select(*inputs, **options, tokens=16, tile=16)
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, expected)


def test_half_precision_keys():
    inputs, options = case(**SHAPES["plain"])
    q, position, group, log_size = inputs
    options["step"] = reference.rounding_step(torch.float16)
    inputs = q.half(), position, group.half(), log_size
    expected = reference.select(*inputs, **options)
    assert torch.equal(select(*inputs, **options, tokens=16, tile=16), expected)


MEMBERS = {
    "full-groups": dict(batch=2, length=50, width=32, window=8, groups=2, count=3),
    "small-full-groups": dict(batch=2, length=75, width=24, window=8, groups=4, count=4),
    "single-tokens": dict(batch=1, length=21, width=16, window=4, groups=4, count=2),
    "large-full-groups": dict(batch=1, length=420, width=96, window=80, groups=1, count=1),
    "side-by-side": dict(batch=2, length=150, width=24, window=32, groups=4, count=3),
    "side-by-side-odd": dict(batch=1, length=250, width=32, window=48, groups=3, count=2),
    "in-parts": dict(batch=1, length=330, width=16, window=64, groups=1, count=2),
    "unequal": dict(batch=2, length=75, width=32, window=16, groups=4, count=3, unequal=True),
    "unequal-large": dict(batch=1, length=420, width=16, window=80, groups=2, count=3, unequal=True),
    "two-tiles": dict(batch=1, length=81, width=16, window=4, groups=2, count=5, unequal=True),
    "all": dict(batch=2, length=21, width=16, window=4, groups=2, count=99),
    "shorter-than-two-windows": dict(batch=1, length=7, width=16, window=4, groups=2, count=1),
}


def members_case(batch, length, width, window, groups, count, *, unequal=False, equal=False):
    g = torch.Generator().manual_seed(3)
    windows = length // window
    q = torch.randn(batch, length, width, generator=g)
    slot = torch.randn(batch, windows * window, width, generator=g) / width**0.5
    if equal:
        slot = slot[:, :1].expand_as(slot).contiguous()
    size = torch.full((batch, windows, groups), window // groups)
    if unequal:  # the first of a window takes from the last, which may be empty
        moved = torch.randint(0, window // groups + 1, (batch, windows), generator=g)
        size[..., 0] += moved
        size[..., -1] -= moved
    size = size.flatten(1)
    options = dict(count=count, window=window, groups=groups, slots=int(size.max()))
    options["step"] = reference.rounding_step(torch.float32)
    return (q, torch.arange(length), slot, size.cumsum(1) - size, size), options


@pytest.mark.parametrize("equal", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("name", MEMBERS)
def test_same_choice_by_members(name, equal):
    inputs, options = members_case(**MEMBERS[name], equal=equal)
    expected = reference.select_members(*inputs, **options)
    chosen = select_members(*inputs, **options, tokens=16, tile=16)
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, expected)
