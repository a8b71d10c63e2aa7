"""Oracle 10: diagnostics of attention on matrices whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from coga.grouping.base import make_grouping, pool
from coga.kernels.reference import attention_parts, gather_members
from coga.models.diagnostics import (
    attention_entropy,
    linear_error,
    rank_errors,
    reciprocity,
    spread_group_mass,
    token_mass,
)
from coga.types import Far

F64 = torch.float64


def causal_uniform(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=F64).tril() / torch.arange(1, length + 1, dtype=F64)[:, None]


def test_entropy_of_uniform_attention_is_one_and_undefined_for_one_token():
    value = attention_entropy(causal_uniform(9), torch.arange(1, 10))
    assert value[0].isnan()
    torch.testing.assert_close(value[1:], torch.ones(8, dtype=F64))


def test_entropy_of_one_hot_attention_is_zero():
    value = attention_entropy(torch.eye(9, dtype=F64), torch.arange(1, 10))
    assert value[0].isnan()
    assert (value[1:] == 0).all()


@pytest.mark.parametrize("visible", [2, 3, 7, 64])
def test_entropy_of_attention_on_two_tokens(visible):
    prob = torch.zeros(1, visible, dtype=F64)
    prob[0, :2] = 0.5
    value = attention_entropy(prob, torch.tensor([visible]))
    assert value.item() == pytest.approx(math.log(2) / math.log(visible))


def test_entropy_ignores_the_share_of_a_sink_and_broadcasts_over_heads():
    prob = causal_uniform(5)[None].repeat(3, 1, 1) * torch.tensor([1.0, 0.5, 0.01], dtype=F64)[:, None, None]
    value = attention_entropy(prob, torch.arange(1, 6))
    assert value.shape == (3, 5)
    torch.testing.assert_close(value[:, 1:], torch.ones(3, 4, dtype=F64))
    assert attention_entropy(torch.zeros(1, 4), torch.tensor([4])).item() == 0


def test_spread_of_known_masses_with_an_empty_group_and_unequal_sizes():
    index = torch.tensor([[[0, 2, 2, 0], [1, 1, 1, 2]]])  # two windows of four tokens, three groups
    groups = make_grouping(index, 3)
    mass = torch.tensor([0.2, 0.0, 0.4, 0.0, 0.3, 0.1], dtype=F64)[None, None, None]
    got = spread_group_mass(mass, groups.order_BS, groups.offset_BM, groups.size_BM, 10)
    want = torch.tensor([0.1, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0], dtype=F64)
    torch.testing.assert_close(got[0, 0, 0], want)
    first = spread_group_mass(mass[..., :3], groups.order_BS, groups.offset_BM, groups.size_BM, 10)
    torch.testing.assert_close(first[0, 0, 0], torch.cat([want[:4], torch.zeros(6, dtype=F64)]))


def test_uniform_summaries_have_the_entropy_of_uniform_dense_attention():
    index = torch.randint(3, (2, 4, 6), generator=torch.Generator().manual_seed(0))
    groups = make_grouping(index, 3)
    mass = (groups.size_BM.to(F64) / 24)[:, None, None]
    got = spread_group_mass(mass, groups.order_BS, groups.offset_BM, groups.size_BM, 24)
    torch.testing.assert_close(got, torch.full((2, 1, 1, 24), 1 / 24, dtype=F64))
    torch.testing.assert_close(attention_entropy(got, torch.tensor(24)), torch.ones(2, 1, 1, dtype=F64))


def grouped_and_dense(equal_members: bool, opened: int | None):
    """Mass over tokens of grouped attention and of dense attention over the same latents."""
    g = torch.Generator().manual_seed(1)
    window, count, heads, content, rotary, length = 6, 3, 2, 5, 4, 27
    index = torch.randint(count, (2, length // window, window), generator=g)
    groups = make_grouping(index, count, torch.nn.functional.one_hot(index, count).to(F64))
    latent = torch.randn(2, length, content + rotary, dtype=F64, generator=g)
    if equal_members:
        closed = index.shape[1] * window
        centre = torch.randn(2, groups.size_BM.shape[1], content + rotary, dtype=F64, generator=g)
        place = (torch.arange(index.shape[1])[:, None] * count + index).flatten(1)[..., None]
        latent[:, :closed] = centre.gather(1, place.expand(-1, -1, content + rotary))
    closed = latent[:, : groups.order_BS.shape[1]]
    position = torch.arange(19, 24)  # all in window 3
    visible = (int(position[0]) // window - 1) * count
    far = Far(
        group_BML=pool(closed, groups)[:, :visible],
        log_size_BM=groups.size_BM[:, :visible].to(F64).log(),
        far_bias_H=torch.zeros(heads, dtype=F64),
        slot_BSL=closed.gather(1, groups.order_BS[..., None].expand_as(closed)),
        offset_BM=groups.offset_BM,
        size_BM=groups.size_BM,
        open_BTK=None,
        groups=count,
        slots=window,
    )
    members = None
    if opened is not None:
        ids = torch.arange(visible).roll(2)[:opened].sort().values
        ids = torch.cat([ids, ids.new_full((1,), -1)])
        far = Far(**{**vars(far), "open_BTK": ids.expand(2, len(position), -1)})
        members = gather_members(far, far.open_BTK)
    q = torch.randn(2, len(position), heads, content + rotary, dtype=F64, generator=g)
    sink = torch.tensor([0.3, -1.0], dtype=F64)
    low = 2 * window  # window 3 reads windows 2 and 3 exactly
    near = torch.arange(low, length)
    options = dict(content=content, window=window, sink_H=sink)
    parts = attention_parts(q, position, latent[:, low:], near, far=far, members=members, **options)
    every = torch.arange(length)
    dense = attention_parts(q, position, latent, every, content=content, window=None, sink_H=sink)
    return token_mass(parts, near, length, far, groups.order_BS), token_mass(dense, every, length, None, None)


@pytest.mark.parametrize("opened", [None, 2, 6], ids=["summaries", "some opened", "all opened"])
def test_mass_of_equal_members_is_that_of_dense_attention(opened):
    grouped, dense = grouped_and_dense(equal_members=True, opened=opened)
    torch.testing.assert_close(grouped, dense, rtol=1e-12, atol=1e-14)


def test_mass_with_all_groups_opened_is_dense_and_with_none_it_is_not():
    grouped, dense = grouped_and_dense(equal_members=False, opened=6)
    torch.testing.assert_close(grouped, dense, rtol=1e-12, atol=1e-14)
    grouped, dense = grouped_and_dense(equal_members=False, opened=None)
    assert (grouped - dense).abs().max() > 1e-3


def test_reciprocity_of_symmetric_antisymmetric_and_constant_scores():
    s = torch.randn(3, 12, 12, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reciprocity(s + s.mT, 5), torch.ones(3, dtype=F64))
    torch.testing.assert_close(
        reciprocity(2 * (s + s.mT).tril() + (s + s.mT).triu(), 5), torch.ones(3, dtype=F64)
    )
    torch.testing.assert_close(reciprocity(s - s.mT, 5), -torch.ones(3, dtype=F64))
    assert reciprocity(torch.ones(4, 4, dtype=F64), 3).isnan()
    assert reciprocity(s, 1).isnan().all()  # the diagonal alone says nothing


def test_reciprocity_reads_the_band_only_and_ignores_the_diagonal():
    s = torch.randn(12, 12, dtype=F64, generator=torch.Generator().manual_seed(0))
    s = s + s.T
    lag = torch.arange(12)[:, None] - torch.arange(12)
    broken = torch.where((lag >= 3) | (lag == 0), 100.0, s)
    assert reciprocity(broken, 3).item() == pytest.approx(1)
    assert reciprocity(broken, 4).item() < 0.9


def test_reciprocity_is_the_correlation_of_pairs_by_double_loop():
    s = torch.randn(9, 9, dtype=F64, generator=torch.Generator().manual_seed(3))
    pairs = [(s[i, j], s[j, i]) for i in range(9) for j in range(i) if i - j < 4]
    want = torch.corrcoef(torch.tensor(pairs, dtype=F64).T)[0, 1]
    torch.testing.assert_close(reciprocity(s, 4), want)


def test_rank_errors_vanish_at_the_rank_of_the_target_and_follow_its_spectrum():
    g = torch.Generator().manual_seed(0)
    hidden = torch.linalg.qr(torch.randn(40, 6, dtype=F64, generator=g)).Q
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=g)).Q for n in (6, 7))
    spectrum = torch.tensor([4.0, 2.0, 1.0], dtype=F64)
    target = hidden @ left[:, :3] * spectrum @ right[:3]
    got = rank_errors(hidden, target, [0, 1, 2, 3, 6])
    assert got == pytest.approx([1, math.sqrt(5 / 21), math.sqrt(1 / 21), 0, 0], abs=1e-7)
    outside = torch.linalg.qr(torch.cat([hidden, torch.randn(40, 1, dtype=F64, generator=g)], 1)).Q[:, 6:]
    noisy = target + outside @ torch.full((1, 7), 2 / math.sqrt(7), dtype=F64)  # norm 2, out of reach
    assert rank_errors(hidden, noisy, [3])[0] == pytest.approx(2 / math.sqrt(21 + 4))


def test_linear_error_of_latents():
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 30, 4, dtype=F64, generator=g)
    assert linear_error(latent, latent @ torch.randn(4, 9, dtype=F64, generator=g)) < 1e-12
    assert linear_error(latent[..., [0, 0]], latent[..., [0]]) < 1e-12  # a deficient latent is no failure
    assert linear_error(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [-1.0]])) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: reciprocity(torch.zeros(3, 4), 2), "score_HTT"),
        (lambda: rank_errors(torch.ones(3, 2), torch.ones(3, 2), [-1]), "ranks"),
        (lambda: linear_error(torch.ones(0, 2), torch.ones(0, 2)), "latent_XC"),
    ],
)
def test_bad_input_names_the_field(call, field):
    with pytest.raises(ValueError, match=field):
        call()
