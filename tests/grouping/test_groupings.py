"""What each grouping does to its windows: sizes, ties, independence, gradients, noise.

Legend: B rows, N windows, W tokens in a window, C content width, G groups in a window.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import F64, GROUPINGS, W, assert_close, small_config
from torch.nn.functional import normalize

from coga.grouping import GroupingContext, build_grouping
from coga.grouping.gumbel import temperature
from coga.grouping.noise import gumbel, uniform

B, N, C, G = 2, 3, 6, 4


def context(batch: int = B, first: int = 0, windows: int = N, **changes) -> GroupingContext:
    window = torch.arange(first, first + windows).expand(batch, -1)
    options = dict(window_BN=window, valid_BN=torch.ones_like(window, dtype=torch.bool))
    return GroupingContext(**{**options, **changes})


def build(name: str, **changes):
    config = small_config(layers="4", grouping=name, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(1)  # the same prototypes each time
        return build_grouping(config, config.layer(0)).double()


def content(seed: int = 0, equal: bool = False) -> torch.Tensor:
    x = torch.randn(B, N, W, C, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return x[:, :, :1].expand(-1, -1, W, -1).contiguous() if equal else x


@pytest.mark.parametrize("name", GROUPINGS)
@pytest.mark.parametrize("factor", [1.0, 1.3, 4.0])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("equal", [True, False])
def test_groups_hold_no_more_than_their_slots(name, factor, train, equal):
    module = build(name, capacity_factor=factor)
    found = module(content(equal=equal), context(training=train))
    even = name in ("contiguous", "random")
    slots = 4 if even else math.ceil(factor * 4 - 1e-9)
    assert module.slots == slots
    assert found.size_BM.max() <= slots and (found.size_BM.view(B, N, G).sum(-1) == W).all()
    if factor == 1 or even:
        assert (found.size_BM == 4).all()
    assert found.index_BNW.min() >= 0 and found.index_BNW.max() < G
    hard = torch.nn.functional.one_hot(found.index_BNW, G).to(found.weight_BNWG)
    assert torch.equal(found.weight_BNWG, hard)  # one-hot to the bit
    order = found.order_BS.view(B, N, W).sort(-1).values
    assert torch.equal(order, torch.arange(N * W).view(N, W).expand(B, -1, -1))


@pytest.mark.parametrize("name", GROUPINGS)
def test_a_window_is_grouped_alone(name):
    """The same groups alone, at its place, whatever the other windows and the number of windows are."""
    module = build(name)
    x = content()
    for train in (True, False):
        whole = module(x, context(training=train)).index_BNW
        for n in range(N):
            alone = module(x[:, n : n + 1], context(first=n, windows=1, training=train)).index_BNW
            assert torch.equal(alone[:, 0], whole[:, n])
        other = content(9)
        other[:, 1] = x[:, 1]
        assert torch.equal(module(other, context(training=train)).index_BNW[:, 1], whole[:, 1])


@pytest.mark.parametrize("name", ["gumbel", "kmeans"])
def test_one_ulp_moves_no_token(name):
    """Content from a short alphabet, disturbed by a few ulps: the same groups."""
    module = build(name, capacity_factor=1.5)
    alphabet = torch.randn(5, C, dtype=F64)
    x = alphabet[torch.randint(0, 5, (B, N, W))]
    again = x * (1 + 4e-16 * torch.randn(x.shape, dtype=F64))
    assert (again != x).any()
    assert torch.equal(module(x, context()).index_BNW, module(again, context()).index_BNW)


def test_contiguous_groups_are_blocks_and_random_groups_are_no_blocks():
    block = torch.arange(W) // 4
    assert (build("contiguous")(content(), context()).index_BNW == block).all()
    module = build("random")
    found = module(content(), context()).index_BNW
    assert torch.equal(found, module(content(5), context(training=True, noise_step=9)).index_BNW)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0, 0], found[0, 1])
    assert not torch.equal(found, build("random", seed=1)(content(), context()).index_BNW)


def test_kmeans_finds_separate_clusters():
    centre = torch.eye(C, dtype=F64)[:G]
    label = torch.arange(W) % G  # the first four tokens of the stride 4 are all of cluster 0: a hard start
    label = label[torch.randperm(W, generator=torch.Generator().manual_seed(4))]
    label[::4] = torch.arange(G)
    x = (centre[label] + 0.05 * torch.randn(W, C, dtype=F64)).expand(B, N, -1, -1)
    found = build("kmeans", capacity_factor=4.0)(x, context()).index_BNW
    assert torch.equal(found, label.expand(B, N, -1))


def test_without_noise_or_capacity_gumbel_takes_the_nearest_prototype():
    module = build("gumbel", capacity_factor=4.0, refine_steps=0, slow_prototypes=False)
    x = content()
    want = (normalize(x, dim=-1) @ module.prototypes_GC.T).argmax(-1)
    assert torch.equal(module(x, context()).index_BNW, want)


def test_slow_prototypes_choose_and_hysteresis_keeps_their_choice():
    x = content()

    def choice(**changes):
        module = build("gumbel", capacity_factor=4.0, refine_steps=0, **changes)
        with torch.no_grad():
            module.slow_GC.copy_(module.prototypes_GC.flip(0))
        return module(x, context()).index_BNW

    live = choice(slow_prototypes=False)
    slow = choice(hysteresis=0.0)
    assert torch.equal(slow, G - 1 - live)
    assert torch.equal(choice(hysteresis=1e3), slow)  # no margin is that wide
    assert torch.equal(choice(hysteresis=1e-9), live)
    between = choice(hysteresis=4.0)
    assert not torch.equal(between, live) and not torch.equal(between, slow)


def test_the_gradient_is_that_of_the_soft_assignment():
    """Straight-through: d(sum v * weight) = d(sum v * softmax(logits / tau + noise)), over all groups."""
    module = build("gumbel", refine_gradient="all")
    x, value = content().requires_grad_(), torch.randn(B, N, W, G, dtype=F64)
    ctx = context(training=True, noise_step=3)
    got = torch.autograd.grad((module(x, ctx).weight_BNWG * value).sum(), (x, module.prototypes_GC))
    live, _ = module.logits(normalize(x, dim=-1), module.prototypes_GC)
    noise = module.config.noise * module._noise(ctx, B, N, W).to(F64)
    soft = (live / module.config.tau_start + noise).softmax(-1)
    want = torch.autograd.grad((soft * value).sum(), (x, module.prototypes_GC))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
        assert b.norm() > 1e-3


@pytest.mark.parametrize("name", GROUPINGS)
@pytest.mark.parametrize("zero", [True, False])
def test_degenerate_content_gives_finite_results(name, zero):
    """All tokens equal, all latents zero: finite weights, losses and gradients."""
    x = (content(equal=True) * (0 if zero else 1)).requires_grad_()
    module = build(name)
    found = module(x, context(training=True))
    assert found.weight_BNWG.isfinite().all()
    if found.stats is not None:
        (found.weight_BNWG.square().sum() + found.stats.coherence_loss).backward()
        assert x.grad.isfinite().all() and module.prototypes_GC.grad.isfinite().all()


def test_temperature_is_geometric_and_then_constant():
    assert temperature(0, 1.0, 0.25, 10) == 1
    assert temperature(5, 1.0, 0.25, 10) == pytest.approx(0.5)
    assert temperature(10, 1.0, 0.25, 10) == pytest.approx(0.25)
    assert temperature(99, 1.0, 0.25, 10) == pytest.approx(0.25)
    assert temperature(3, 1.0, 0.25, 0) == 0.25
    for step in (0, 4, 20):
        tensor = temperature(torch.tensor(step), 1.0, 0.25, 10)
        assert float(tensor) == pytest.approx(temperature(step, 1.0, 0.25, 10))


# ----------------------------------------------------------------------------------------------- noise


def draw(**changes) -> torch.Tensor:
    words = dict(seed=0, step=0, layer=0, row_B=torch.arange(3), position_BS=torch.arange(50).expand(3, -1))
    return gumbel(**{**words, **changes}, groups=8)


def test_noise_is_a_function_of_its_words_alone():
    base = draw()
    assert torch.equal(base, draw()) and torch.equal(base, draw(step=torch.tensor(0)))
    torch.manual_seed(123)
    assert torch.equal(base, draw())
    assert torch.equal(base[:, :20], draw(position_BS=torch.arange(20).expand(3, -1)))
    assert torch.equal(base[:, 20:], draw(position_BS=torch.arange(20, 50).expand(3, -1)))
    assert torch.equal(base[1:2], draw(row_B=torch.tensor([1]), position_BS=torch.arange(50)[None]))
    for word in ("seed", "step", "layer"):
        assert not (draw(**{word: 1}) == base).any(-1).all(-1).any(), word
    assert not torch.equal(base[0], base[1]) and not torch.equal(base[:, 0], base[:, 1])
    assert not torch.equal(base[..., 0], base[..., 1])


def test_noise_has_the_moments_of_a_gumbel_variable():
    """Mean 0.5772, variance pi^2/6, and P(g < 0) = 1/e, over 2^19 draws; neighbours do not correlate."""
    noise = gumbel(0, 3, 1, torch.arange(4), torch.arange(2**14).expand(4, -1), 8).double()
    assert noise.dtype == F64 and noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert float((noise < 0).double().mean()) == pytest.approx(math.exp(-1), abs=0.003)
    centred = (noise - noise.mean()) / noise.std()
    for axis in range(3):
        length = noise.shape[axis]
        pair = centred.narrow(axis, 0, length - 1) * centred.narrow(axis, 1, length - 1)
        assert abs(float(pair.mean())) < 0.01


def test_noise_is_finite_at_the_ends_of_the_uniform_numbers(monkeypatch):
    for bits in (0, 0xFFFFFFFF):
        monkeypatch.setattr("coga.grouping.noise.combine", lambda *w, device, b=bits: torch.tensor([b]))
        u = uniform(1, device=torch.device("cpu"))
        assert 0 < float(u) < 1 and (-torch.log(-torch.log(u))).isfinite().all()


def test_noise_moves_assignments_and_its_scale_matters():
    x = content()

    def chosen(step: int, **changes):
        return build("gumbel", **changes)(x, context(training=True, noise_step=step)).index_BNW

    assert not torch.equal(chosen(0), chosen(1))
    assert torch.equal(chosen(0, noise=0.0), chosen(1, noise=0.0))
    assert not torch.equal(chosen(0, noise=0.0), chosen(0))
