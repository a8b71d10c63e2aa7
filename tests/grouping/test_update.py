"""The step after the optimizer: unit prototypes, their slow average, revival, and freezing."""

from __future__ import annotations

import pytest
import torch
from support import LONGEST, W, assert_close, real_bytes, small_model
from torch.nn.functional import normalize

from coga.models import CoGAGPT


def model_and_step(**changes):
    model = small_model(3, layers="4", n_layer=1, train=True, **changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)

    def step(number: int = 0):
        data = real_bytes(2, LONGEST + 1, number)
        out = model(data[:, :-1], targets=data[:, 1:], noise_step=number)
        optimizer.zero_grad()
        out.total_loss.backward()
        optimizer.step()
        return out

    return model, model.blocks[0].attention.grouping, step


def test_prototypes_move_stay_unit_and_the_slow_ones_follow():
    model, grouping, step = model_and_step(slow_decay=0.75, revive=0.0)
    for number in range(3):
        before, slow = grouping.prototypes_GC.clone(), grouping.slow_GC.clone()
        out = step(number)
        assert torch.equal(grouping.slow_GC, slow)
        moved = normalize(grouping.prototypes_GC, dim=-1).detach()
        model.update_groups(out)
        assert (grouping.prototypes_GC - before).norm() > 1e-3
        assert_close(grouping.prototypes_GC, moved)
        assert_close(grouping.prototypes_GC.norm(dim=-1), torch.ones(4, dtype=moved.dtype))
        assert_close(grouping.slow_GC, 0.75 * slow + 0.25 * moved)
        assert model.step_count == number + 1


def test_use_is_measured_before_capacity_and_sums_to_one():
    _, _, step = model_and_step()
    stats = step().stats[0]
    assert_close(stats.usage_G.sum(), torch.ones((), dtype=stats.usage_G.dtype))
    assert not stats.usage_G.requires_grad and stats.usage_G.std() > 0.01  # capacity would make it even


def test_a_dead_prototype_is_revived_at_a_token_and_only_that_one():
    model, grouping, step = model_and_step(revive=0.1)
    out = step()
    with torch.no_grad():
        grouping.use_G.copy_(torch.tensor([0.3, 0.0, 0.4, 0.3]))
    live = normalize(grouping.prototypes_GC, dim=-1).detach().clone()
    model.update_groups(out)
    found = grouping.prototypes_GC.detach()
    candidate = out.stats[0].candidate_GC
    assert_close(candidate.norm(dim=-1), torch.ones(4, dtype=found.dtype))
    dead = (0.99 * torch.tensor([0.3, 0.0, 0.4, 0.3]) + 0.01 * out.stats[0].usage_G) < 0.1 / 4
    assert dead.tolist() == [False, True, False, False]
    assert_close(found[1], candidate[1])
    assert_close(grouping.slow_GC[1], candidate[1])
    assert_close(found[[0, 2, 3]], live[[0, 2, 3]])
    assert grouping.use_G[1] == 0.25


def test_revival_off_leaves_dead_prototypes_alone():
    model, grouping, step = model_and_step(revive=0.0)
    out = step()
    with torch.no_grad():
        grouping.use_G.zero_()
    live = normalize(grouping.prototypes_GC, dim=-1).detach().clone()
    model.update_groups(out)
    assert_close(grouping.prototypes_GC.detach(), live)


def test_candidates_come_from_real_tokens_only():
    """Windows with padding in them serve no prototype and count in no use."""
    model, _, _ = model_and_step()
    real = real_bytes(2, LONGEST)
    mask = torch.ones_like(real)
    mask[1, W + 3 :] = 0  # one closed window of the second row is real
    found = []
    for filler in (1, 2):
        tokens = torch.where(mask.bool(), real, filler)
        stats = model(tokens, attention_mask=mask, targets=tokens).stats[0]
        found.append((stats.usage_G, stats.candidate_GC, stats.coherence_loss))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("frozen_at", [0, 2])
def test_late_freezing(frozen_at, tmp_path):
    """Prototypes move until the freeze step, then never again, in a loaded model too."""
    model, grouping, step = model_and_step(freeze_step=frozen_at, revive=0.9, slow_decay=0.5)
    for number in range(frozen_at + 1):
        model.update_groups(step(number))
    assert not grouping.prototypes_GC.requires_grad
    kept, slow = grouping.prototypes_GC.clone(), grouping.slow_GC.clone()
    for number in range(3):
        model.update_groups(step(number))
        assert torch.equal(grouping.prototypes_GC, kept) and torch.equal(grouping.slow_GC, slow)
    model.save_pretrained(tmp_path)
    again = CoGAGPT.from_pretrained(tmp_path).train()
    loaded = again.blocks[0].attention.grouping.prototypes_GC
    assert again.step_count == model.step_count and not loaded.requires_grad
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=0.05)
    data = real_bytes(2, LONGEST)
    out = again(data, targets=data)
    out.total_loss.backward()
    optimizer.step()
    again.update_groups(out)
    assert torch.equal(loaded, kept) and loaded.grad is None


def test_no_freezing_before_its_step():
    model, grouping, step = model_and_step(freeze_step=5)
    for number in range(3):
        before = grouping.prototypes_GC.clone()
        model.update_groups(step(number))
        assert grouping.prototypes_GC.requires_grad and not torch.equal(before, grouping.prototypes_GC)


@pytest.mark.parametrize("name", ["contiguous", "kmeans", "random"])
def test_groupings_without_parameters_take_the_step_too(name):
    model = small_model(grouping=name, train=True)
    data = real_bytes(1, LONGEST)
    model.update_groups(model(data, targets=data))
    assert model.step_count == 1


@pytest.mark.parametrize("through", ["last", "all"])
def test_groups_start_from_the_slow_prototypes_and_the_gradient_goes_to_the_learned_ones(through):
    """Loss and gradient are those of a model whose learned prototypes are the slow ones."""
    _, grouping, step = model_and_step(refine_gradient=through, coherence_weight=0.1)
    with torch.no_grad():
        grouping.slow_GC.copy_(grouping.slow_GC.flip(1))
    first, found = step().total_loss, grouping.prototypes_GC.grad
    _, other, step = model_and_step(refine_gradient=through, coherence_weight=0.1, slow_prototypes=False)
    with torch.no_grad():
        other.prototypes_GC.copy_(other.slow_GC.flip(1))
    second = step().total_loss
    assert found.norm() > 1e-8
    assert_close(first, second)
    assert_close(found, other.prototypes_GC.grad)
