"""Selection against `coga.kernels.reference`, run in the Triton interpreter by `test_triton_select.py`."""

from __future__ import annotations

import pytest
import torch

from coga.kernels import reference
from coga.kernels.triton_parts import cut
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


def test_tokens_beyond_the_text_ask_for_nothing():
    """A block of 128 tokens of which 52 are there: what the others would see is not even read."""
    inputs, options = members_case(**MEMBERS["side-by-side-odd"] | {"length": 180})
    expected = reference.select_members(*inputs, **options)
    assert torch.equal(select_members(*inputs, **options, tokens=128, tile=16), expected)


UNEVEN = {  # sizes of the groups of a window, by turns
    "R-8-capacity-1.5": dict(sizes=[[12, 4, 9, 7], [8, 8, 12, 4]], spare=0),
    "R-16-capacity-2": dict(sizes=[[32, 0], [5, 27]]),
    "R-32-capacity-2": dict(sizes=[[64, 0], [31, 33], [1, 63]], unread=1),
    "R-64-capacity-1.5": dict(sizes=[[96, 32], [50, 78]], windows=3, batch=1),
    "one-group-that-is-a-window": dict(sizes=[[80]], count=1, batch=1),
    "empty-groups": dict(sizes=[[0, 0, 16, 0], [0, 16, 0, 0], [16, 0, 0, 0], [0, 0, 0, 16]], windows=7),
    "a-block-of-many-groups": dict(sizes=[[1, 2, 1, 0, 1, 3, 1, 1, 2, 4], [1] * 9 + [7]]),
    "few-large-many-tiny-groups": dict(sizes=[[11, 1, 1, 1, 1, 1]], windows=6, unread=2),
    "three-groups-in-a-window": dict(sizes=[[7, 1, 10], [0, 18, 0], [6, 5, 7]], windows=7, spare=0),
    "seventeen-groups-in-a-window": dict(sizes=[[2] * 8 + [0] * 8 + [5], [1] * 16 + [5]]),
    "all-in-a-block": dict(sizes=[[3, 1, 0, 4], [2, 2, 2, 2]], count=2, unread=1),
    "a-prefix-of-large-groups": dict(sizes=[[64, 0], [31, 33]], windows=4, unread=2),
    "several-tiles": dict(sizes=[[3, 1, 0, 4], [2, 2, 2, 2]], windows=14, count=5, batch=1),
}


def uneven_case(sizes, windows=4, count=3, batch=2, width=24, unread=0, spare=5):
    """Windows that take the sizes by turns, then some of which no group is known, and some places of NaN."""
    g = torch.Generator().manual_seed(5)
    window, groups = sum(sizes[0]), len(sizes[0])
    turn = torch.arange(batch)[:, None] + torch.arange(windows)
    size = torch.tensor(sizes)[turn % len(sizes)].flatten(1)
    length = (windows + 1) * window + 3
    q = torch.randn(batch, length, width, generator=g)
    slot = torch.randn(batch, windows * window + spare, width, generator=g) / width**0.5
    slot[:, windows * window :] = torch.nan
    offset = size.cumsum(1) - size
    options = dict(count=count, window=window, groups=groups, slots=int(size.max()))
    options["step"] = reference.rounding_step(torch.float32)
    known = (windows - unread) * groups
    return (q, torch.arange(length), slot, offset[:, :known], size[:, :known]), options


def reference_choice(q, position, slot, offset, size, **options):
    return reference.select_members(q, position, slot.nan_to_num(), offset, size, **options)


@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize("name", UNEVEN)
def test_same_choice_from_parts_of_unequal_groups(name, tile):
    inputs, options = uneven_case(**UNEVEN[name])
    chosen = select_members(*inputs, **options, tokens=64, tile=tile)
    assert torch.equal(chosen, reference_choice(*inputs, **options))
    assert (chosen >= 0).any()


def test_half_precision_keys_of_unequal_groups():
    (q, position, slot, offset, size), options = uneven_case(**UNEVEN["R-8-capacity-1.5"])
    options["step"] = reference.rounding_step(torch.float16)
    inputs = q.half(), position, slot.half(), offset, size
    chosen = select_members(*inputs, **options, tokens=64, tile=16)
    assert torch.equal(chosen, reference_choice(*inputs, **options))


def test_ties_of_unequal_groups_go_to_the_lower_group():
    (q, position, slot, offset, size), options = uneven_case(**UNEVEN["empty-groups"], spare=0)
    inputs = q, position, slot[:, :1].expand_as(slot), offset, size
    chosen = select_members(*inputs, **options, tokens=64, tile=16)
    assert torch.equal(chosen, reference_choice(*inputs, **options))


@pytest.mark.parametrize("part", [16, 32])
@pytest.mark.parametrize("name", UNEVEN)
def test_parts_hold_the_members_of_one_group_each(name, part):
    (_, _, slot, offset, size), _ = uneven_case(**UNEVEN[name])
    parts = cut(slot, offset.contiguous(), size.contiguous(), part, spare=2)
    for b in range(len(slot)):
        assert parts.end_BM[b, -1] + 2 <= parts.owner_BP.shape[1]
        latent = parts.latent_BSL[b].unflatten(0, (-1, part))
        begin = 0
        for m, end in enumerate(parts.end_BM[b].tolist()):
            assert (parts.owner_BP[b, begin:end] == m).all()
            member = slot[b, offset[b, m] : offset[b, m] + size[b, m]]
            last = member[-1:].expand((end - begin) * part - len(member), -1) if end > begin else member
            assert torch.equal(latent[begin:end].flatten(0, 1), torch.cat([member, last]))
            begin = end
        assert not latent[begin:].any()  # what a product may read beyond the last part


def test_what_is_read_beyond_the_last_part_belongs_to_no_group(monkeypatch):
    """All scores are negative, and memory that is not set says group 0: with zeros it would win."""
    (q, position, slot, offset, size), options = uneven_case(
        sizes=[[3, 1, 5], [2, 2, 5]], count=1, width=16, unread=1
    )
    inputs = q.abs(), position, -slot.abs(), offset, size
    expected = reference_choice(*inputs, **options)
    assert (expected > 0).any()
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **more: empty(*shape, **more).zero_())
    assert torch.equal(select_members(*inputs, **options, tokens=64, tile=16, part=16), expected)


def test_a_product_may_begin_with_the_last_part_of_all():
    """Nine parts, two a product, fill what there is room for: the tenth must be one to spare."""
    inputs, options = uneven_case(sizes=[[17, 1]], windows=3, spare=0)
    chosen = select_members(*inputs, **options, tokens=64, tile=16, part=16)
    assert torch.equal(chosen, reference_choice(*inputs, **options))


def test_full_groups_that_end_with_the_members_are_not_read_beyond_them():
    """Nine groups, two a product, and no member of a tenth: they are copied to where there is room."""
    (q, position, slot, offset, size), options = members_case(**MEMBERS["side-by-side-odd"] | {"length": 200})
    inputs = q, position, slot[:, : 9 * 16], offset[:, :9], size[:, :9]
    expected = reference.select_members(*inputs, **options)
    assert torch.equal(select_members(*inputs, **options, tokens=16, tile=16), expected)
