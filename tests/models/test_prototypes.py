"""Prototypes found in a text: they are where content is, and nothing else of the model changes."""

from __future__ import annotations

import pytest
import torch
from support import W, real_bytes, small_config
from torch.nn.functional import normalize

from coga.grouping.gumbel import CONTENT_EPS
from coga.models import CoGAGPT
from coga.models.prototypes import fit_prototypes


def grouped(model: CoGAGPT) -> dict[int, torch.nn.Module]:
    return {i: b.attention.grouping for i, b in enumerate(model.blocks) if b.attention.layer.kind == "group"}


def fit_of(model: CoGAGPT, text: torch.Tensor) -> list[float]:
    """Mean cosine of unit content to its nearest prototype, by layer, as the layers see it."""
    found = []

    def look(module, inputs):
        unit = normalize(inputs[0].float(), dim=-1, eps=CONTENT_EPS).detach()
        found.append(float((unit @ module.prototypes_GC.detach().T).amax(-1).mean()))

    hooks = [one.register_forward_pre_hook(look) for one in grouped(model).values()]
    model.eval()(text)
    for hook in hooks:
        hook.remove()
    return found


def test_planted_clusters_are_found():
    model = CoGAGPT(small_config())
    planted = {}

    def plant(module, inputs):
        (batch, windows, width, channels) = inputs[0].shape
        directions = torch.linalg.qr(torch.randn(channels, module.groups))[0].T
        planted[module] = directions
        noise = 0.02 * torch.randn(inputs[0].shape)
        return directions[torch.arange(width) % module.groups].expand(
            batch, windows, -1, -1
        ) + noise, *inputs[1:]

    torch.manual_seed(0)
    hooks = [one.register_forward_pre_hook(plant) for one in grouped(model).values()]
    for one in grouped(model).values():
        one.use_G.mul_(0.5)  # as if it had been in use
    assert fit_prototypes(model, real_bytes(1, 3 * W)) == len(hooks) > 0
    for module, directions in planted.items():
        assert torch.equal(module.prototypes_GC, module.slow_GC)
        cosine = directions @ module.prototypes_GC.T
        assert cosine.amax(-1).min() > 0.99
        assert sorted(cosine.argmax(-1).tolist()) == list(range(module.groups))
        assert torch.allclose(module.use_G, torch.tensor(1 / module.groups))


def test_they_fit_the_text_better_than_random_ones_and_the_rest_stays():
    model = CoGAGPT(small_config()).train()
    text = real_bytes(2, 3 * W)
    other = CoGAGPT(small_config())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit_prototypes(model, text)
    assert model.training
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    wanted = {
        f"blocks.{i}.attention.grouping.{n}" for i in grouped(model) for n in ("prototypes_GC", "slow_GC")
    }
    assert changed == wanted
    assert all(ours > theirs + 0.05 for ours, theirs in zip(fit_of(model, text), fit_of(other, text)))
    fit_prototypes(other, text)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_text_without_a_whole_window_is_refused_and_changes_nothing():
    model = CoGAGPT(small_config())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"tokens_BT=.*whole window of 16"):
        fit_prototypes(model, real_bytes(1, W - 1))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(one._forward_pre_hooks for one in grouped(model).values())


@pytest.mark.parametrize("layers", ["near", "full", "mha"])
def test_a_model_without_groups_has_nothing_to_fit(layers):
    assert fit_prototypes(CoGAGPT(small_config(layers=layers)), real_bytes(1, W)) == 0
