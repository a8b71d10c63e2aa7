"""Prototypes and the heads of the selection, found in one pass."""

from __future__ import annotations

import pytest
import torch
from support import W, real_bytes, small_config, small_model

from coga.models import CoGAGPT, fit_groups
from coga.models.index_fit import fit_index
from coga.models.prototypes import fit_prototypes

LAYERS = "near 4 8"


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_first_layer_with_groups_gets_what_each_fit_alone_gives_it():
    """Nothing before it is fitted; a later layer reads what the earlier ones return, fitted."""
    text = real_bytes(2, 8 * W)
    ours, theirs = small_model(layers=LAYERS).train(), small_model(layers=LAYERS)
    before = state(ours)
    fit_groups(ours, text)
    assert ours.training
    fit_index(theirs, text)
    weights = theirs.blocks[1].attention.index_H.clone()
    fit_prototypes(theirs, text)
    first, other = ours.blocks[1].attention, theirs.blocks[1].attention
    assert torch.equal(first.index_H, weights)
    assert torch.equal(first.grouping.prototypes_GC, other.grouping.prototypes_GC)
    changed = {name for name, value in ours.state_dict().items() if not torch.equal(value, before[name])}
    fitted = ("index_H", "grouping.prototypes_GC", "grouping.slow_GC")
    assert changed == {f"blocks.{i}.attention.{name}" for i in (1, 2) for name in fitted}
    assert not torch.equal(ours.blocks[2].attention.index_H, theirs.blocks[2].attention.index_H)


def test_a_later_layer_is_fitted_on_what_fitted_ones_return():
    """Fitted once more, the last layer has nothing to change: all before it are as they were."""
    text = real_bytes(2, 8 * W)
    model = small_model(layers=LAYERS)
    fit_groups(model, text)
    again = small_model(layers=LAYERS)
    again.load_state_dict(state(model))
    fit_prototypes(again, text)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_exception_leaves_no_hook_and_no_mode_behind():
    model = small_model(layers=LAYERS).train()
    text = real_bytes(1, 4 * W)
    text[0, -1] = model.config.vocab_size
    with pytest.raises((ValueError, IndexError)):
        fit_groups(model, text)
    assert model.training
    assert not any(one._forward_pre_hooks for one in model.modules())


def test_the_seed_is_that_of_k_means():
    text = real_bytes(2, 8 * W)
    found = []
    for seed in (0, 0, 1):
        model = small_model(layers=LAYERS)
        fit_groups(model, text, seed)
        found.append(model.blocks[1].attention.grouping.prototypes_GC)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("fit", [fit_groups, fit_index, fit_prototypes])
def test_a_single_row_without_its_axis_is_refused(fit):
    with pytest.raises(ValueError, match=r"tokens_BT=\(64,\): must be \(rows, tokens\)"):
        fit(small_model(layers=LAYERS), real_bytes(1, 4 * W)[0])


@pytest.mark.parametrize("length", [W - 1, 2 * W])
def test_a_text_that_is_too_short_is_refused_and_changes_nothing(length):
    model = small_model(layers=LAYERS)
    before = state(model)
    with pytest.raises(ValueError, match=r"tokens_BT=.*two windows of 16"):
        fit_groups(model, real_bytes(1, length))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(one._forward_pre_hooks for one in model.modules())


@pytest.mark.parametrize(
    "changes",
    [dict(layers="near"), dict(layers="mha"), dict(layers="4", grouping="kmeans", index_weight=0.0)],
)
def test_a_model_with_nothing_to_fit_is_left_alone(changes):
    model = CoGAGPT(small_config(**changes))
    before = state(model)
    fit_groups(model, real_bytes(1, 4 * W))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
