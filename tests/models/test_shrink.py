"""Narrower latents: exact where they lose nothing, better than cutting channels off where they do."""

from __future__ import annotations

import pytest
import torch
from support import F64, LONGEST, W, assert_close, real_bytes, small_config, small_model
from torch.nn.functional import normalize

from coga.grouping import GumbelGrouping
from coga.models import CoGAGPT
from coga.models.attention import CoGAAttention
from coga.models.shrink import shrink_latents

PLAIN = dict(refine_groups=False, reciprocal_groups=False)


@torch.no_grad()
def planted(rank: int, noise: float = 0.0, **changes):
    """A model whose latents and queries lie in `rank` directions of its content, but for noise."""
    model = small_model(**PLAIN, **changes)
    draw = torch.Generator().manual_seed(3)
    for module in model.modules():
        if not isinstance(module, CoGAAttention):
            continue
        own = module.projections
        inside = torch.linalg.qr(torch.randn(own.content, rank, generator=draw, dtype=F64))[0]
        within = inside @ inside.T + noise * torch.eye(own.content, dtype=F64)
        own.latent.weight[: own.content] = within @ own.latent.weight[: own.content]
        heads = own.query.weight.view(own.heads, own.width, -1)
        heads[:, : own.content] = within @ heads[:, : own.content]
        if isinstance(module.grouping, GumbelGrouping):
            for name in ("prototypes_GC", "slow_GC"):
                x = getattr(module.grouping, name)
                x.copy_(normalize(x @ within, dim=-1))
    return model


@pytest.mark.parametrize("layers", ["full", "near 4 8", "near mha 4"])
@pytest.mark.parametrize("selection", ["summary", "members"])
def test_nothing_is_lost_where_latents_fit(layers, selection):
    """Without a rotary part, whose weight beside the content no gain can keep."""
    how = dict(rope_dim=0, norm_eps=1e-30, latent_dim=6, selection=selection)
    model = planted(4, layers=layers, **how).train()
    with torch.no_grad():
        model.step_count.fill_(7)
    text = real_bytes(2, LONGEST)
    narrow = shrink_latents(model, 4, text)
    assert narrow.training and narrow.config == model.config.replace(latent_dim=4)
    assert int(narrow.step_count) == 7
    model.eval(), narrow.eval()
    for seed in (0, 1):
        other = real_bytes(2, LONGEST, seed)
        assert_close(narrow(other).logits, model(other).logits)
    stepped, _ = narrow.step(text, narrow.new_state(2))
    assert_close(stepped.logits, model(text).logits)


def cut(model, width):
    """The first channels of every latent, as they are."""
    with pytest.warns(UserWarning, match="freshly initialised"):
        found = model.with_layers(model.config.layers, latent_dim=width)
    with torch.no_grad():
        for new, old in zip(found.modules(), model.modules(), strict=True):
            if isinstance(new, CoGAAttention):
                a, b = new.projections, old.projections
                keep = [*range(a.content), *range(b.content, b.width)]
                a.latent.weight.copy_(b.latent.weight[keep])
                a.query.weight.copy_(b.query.weight.unflatten(0, (b.heads, -1))[:, keep].flatten(0, 1))
                a.up_HCE.copy_(b.up_HCE[:, : a.content] * (b.content / a.content) ** 0.5)
                a.gain_H.copy_(b.gain_H)
    return found


def test_little_is_lost_where_little_lies_outside():
    model = planted(4, noise=0.1, layers="full")
    text, other = real_bytes(4, LONGEST), real_bytes(4, LONGEST, 1)
    wanted = model(other).logits
    error = {}
    for name, found in (("shrunk", shrink_latents(model, 4, text)), ("cut", cut(model, 4))):
        error[name] = ((found(other).logits - wanted).norm() / wanted.norm()).item()
    assert error["shrunk"] < 0.1 and error["shrunk"] < 0.4 * error["cut"], error


def test_widths_of_single_layers():
    model = planted(4, layers="near 4 full")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    narrow = shrink_latents(model, (6, 4, 2), real_bytes(2, LONGEST))
    assert [block.attention.projections.content for block in narrow.blocks] == [6, 4, 2]
    same = dict(narrow.state_dict())
    assert all(torch.equal(same[n], x) for n, x in before.items() if n.startswith("blocks.0."))
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert not any(one._forward_pre_hooks for one in narrow.modules())
    loss = narrow.train()(real_bytes(2, LONGEST), targets=real_bytes(2, LONGEST)).loss
    loss.backward()
    assert all(p.grad is not None for n, p in narrow.named_parameters() if "up_HCE" in n)
    for name, p in narrow.named_parameters():
        if p.shape != before[name].shape:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    model = planted(4, layers="near 4 8", latent_dim=6).to(dtype)
    narrow = shrink_latents(model, 4, real_bytes(2, LONGEST))
    assert {p.dtype for p in narrow.parameters()} == {dtype}
    assert narrow(real_bytes(1, LONGEST)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "width", "rule"),
    [
        (PLAIN, 7, "latent_dim=7: must be at most 6, that of layer 0"),
        (PLAIN, (6, 6, 8), r"latent_dim=\(6, 6, 8\): must be at most 6, that of layer 2"),
        (PLAIN, 0, "latent_dim"),
        ({}, 4, "refine_groups=True: must be off"),
    ],
)
def test_what_cannot_be_shrunk(changes, width, rule):
    with pytest.raises(ValueError, match=rule):
        shrink_latents(CoGAGPT(small_config(**changes)), width, real_bytes(1, 3 * W))
