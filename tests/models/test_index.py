"""The selection's index query: its loss against plain loops, its weights found in a text."""

from __future__ import annotations

import pytest
import torch
from support import F64, LONGEST, W, assert_close, other_layers, real_bytes, small_config, small_model

from coga.models import CoGAGPT
from coga.models.attention import CoGAAttention
from coga.models.index import index_loss, index_query
from coga.models.index_fit import fit_index

HEADS, WIDTH, LENGTH = 3, 5, 61


def scene():
    draw = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(2, LENGTH, HEADS, WIDTH, generator=draw, dtype=F64)
    latent = torch.randn(2, LENGTH, WIDTH, generator=draw, dtype=F64)
    sink, weights = (torch.randn(HEADS, generator=draw, dtype=F64) for _ in range(2))
    return q, latent, sink, weights.requires_grad_()


def plain_loss(q, latent, sink, weights, ends):
    """From the equation, token by token; `ends`: real tokens of each row."""
    wrong, total = torch.zeros((), dtype=F64), torch.zeros((), dtype=F64)
    for b, end in enumerate(ends):
        for t in range(2 * W, end):
            logits = torch.stack([latent[b, : t + 1] @ q[b, t, h] for h in range(HEADS)])
            if sink is not None:
                logits = torch.cat([logits, sink[:, None]], 1)
            far = (t // W - 1) * W
            target = (logits.softmax(-1)[:, :far] ** 3).sum(0)
            index = sum(weights[h] * q[b, t, h] for h in range(HEADS))
            log_p = (latent[b, :far] @ index).log_softmax(-1)
            wrong = wrong + (target * ((target / target.sum()).log() - log_p)).sum()
            total = total + target.sum()
    return wrong / total


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("ends", [(LENGTH, LENGTH), (LENGTH, 40), (20, 50)])
def test_the_loss_and_its_gradient_equal_plain_loops(sink, ends):
    q, latent, sinks, weights = scene()
    given = sinks if sink else None
    expected = plain_loss(q, latent, given, weights, ends)
    lengths = None if min(ends) == LENGTH else torch.tensor(ends)
    ours = index_loss(q, latent, weights, sink_H=given, window=W, length_B=lengths)
    assert_close(ours, expected)
    for a, b in zip(*(torch.autograd.grad(loss, weights) for loss in (ours, expected)), strict=True):
        assert b.abs().min() > 1e-3
        assert_close(a, b)


def test_a_row_without_far_tokens_costs_nothing():
    q, latent, sinks, weights = scene()
    lengths = torch.full((2,), 2 * W)
    loss = index_loss(q, latent, weights, sink_H=sinks, window=W, length_B=lengths)
    (gradient,) = torch.autograd.grad(loss, weights)
    assert loss == 0 and not gradient.any()


def test_many_tokens_are_asked_evenly_and_only_some():
    """A token that is not asked does not count, wherever it is; those that are lie from 2W to the end."""
    length = 2 * W + 64 * 7
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(1, length, HEADS, WIDTH, generator=draw, dtype=F64)
    latent = torch.randn(1, length, WIDTH, generator=draw, dtype=F64)
    weights = torch.rand(HEADS, generator=draw, dtype=F64)
    moved = torch.zeros(length, dtype=torch.bool)
    q.requires_grad_()

    def loss(changed):
        return index_loss(changed, latent, weights, sink_H=None, window=W, length_B=None)

    with torch.no_grad():
        before = loss(q)
        for t in range(length):
            other = q.detach().clone()
            other[:, t] += 1
            moved[t] = not torch.equal(loss(other), before)
    asked = moved.nonzero()[:, 0]
    assert len(asked) == 64 and asked[0] >= 2 * W
    assert set(asked.diff().tolist()) == {7}
    assert not loss(q).requires_grad  # the weights here need none, and nothing else gets one


def test_only_the_weights_learn_from_it():
    model = small_model(train=True, layers="4", index_weight=0.5)
    out = model(real_bytes(2, LONGEST), targets=real_bytes(2, LONGEST))
    out.aux["index"].backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {f"blocks.{i}.attention.index_H" for i in range(3)}


def test_weights_choose_the_head():
    q, *_ = scene()
    one = torch.tensor([0.0, 1.0, 0.0], dtype=F64)
    assert torch.equal(index_query(q, one), q[:, :, 1])
    assert_close(index_query(q, torch.full((HEADS,), 1 / HEADS, dtype=F64)), index_query(q, None))


@pytest.mark.parametrize("selection", ["members", "summary"])
def test_the_model_opens_what_the_weights_say(selection):
    """With other weights other groups are opened, in training and in decoding."""
    model = small_model(layers="4", n_layer=1, selection=selection)
    text = real_bytes(1, LONGEST)
    found = {}
    for head in range(HEADS):
        with torch.no_grad():
            model.blocks[0].attention.index_H.copy_(torch.eye(HEADS, dtype=F64)[head])
            whole = model(text).logits
            stepped, _ = model.step(text, model.new_state(1))
        assert_close(stepped.logits, whole)
        found[head] = whole
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_without_a_weight_of_the_loss_all_heads_count_alike():
    with_index, without = small_model(layers="4"), small_model(layers="4", index_weight=0.0)
    assert not any(name.endswith("index_H") for name in without.state_dict())
    with torch.no_grad():
        for block in with_index.blocks:
            block.attention.index_H.fill_(1 / HEADS)
    same = {k: v for k, v in with_index.state_dict().items() if not k.endswith("index_H")}
    without.load_state_dict(same)
    text = real_bytes(2, LONGEST)
    assert_close(with_index(text).logits, without(text).logits)
    assert "index" not in without.train()(text, targets=text).aux


def test_layers_that_open_nothing_have_no_weights():
    model = CoGAGPT(small_config(layers="4 near 8", open_groups=(0, 1, 1)))
    assert [block.attention.index_H is None for block in model.blocks] == [True, True, False]


def test_the_head_that_looks_for_one_token_is_found(monkeypatch):
    """One head looks for a single far token, the others for none: the fit finds it."""
    model = small_model(layers="4", n_layer=1, train=True)
    (attention,) = [m for m in model.modules() if isinstance(m, CoGAAttention)]
    width = attention.projections.width

    def enter(x_BTD, table, backend, index_H=None):
        draw = torch.Generator().manual_seed(1)
        latent = torch.randn(*x_BTD.shape[:2], width, generator=draw, dtype=F64)
        q = 0.3 * torch.randn(*x_BTD.shape[:2], HEADS, width, generator=draw, dtype=F64)
        wanted = torch.randint(0, W, x_BTD.shape[:2], generator=draw)
        q[:, :, 1] = 2 * latent.gather(1, wanted[..., None].expand(-1, -1, width))
        return q, latent, None

    monkeypatch.setattr(attention.projections, "enter", enter)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert fit_index(model, real_bytes(2, 20 * W)) == 1 and model.training
    weights = attention.index_H
    assert weights[1] > 4 * weights[[0, 2]].abs().max()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"blocks.0.attention.index_H"}


def test_a_fit_lowers_the_loss_on_another_text_and_is_repeatable():
    model = small_model(layers="near 4 8", train=True, noise=0.0)
    other = other_layers(model, "near 4 8")
    text = real_bytes(2, 8 * W, 1)
    assert fit_index(model, real_bytes(4, 8 * W)) == fit_index(other, real_bytes(4, 8 * W)) == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    fresh = small_model(layers="near 4 8", train=True, noise=0.0)
    assert model(text, targets=text).aux["index"] < fresh(text, targets=text).aux["index"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_finds_what_float32_does(dtype):
    """Adam in float16 would divide zero by zero, and autocast would round the loss's small parts to zero."""
    exact, half = small_model(layers="4").float(), small_model(layers="4").float()
    for _ in range(3):
        fit_index(exact, real_bytes(2, 8 * W))
        with torch.autocast("cpu", dtype):
            fit_index(half, real_bytes(2, 8 * W))
    for a, b in zip(exact.blocks, half.blocks, strict=True):
        torch.testing.assert_close(a.attention.index_H, b.attention.index_H, rtol=0.3, atol=0.3)
    whole = small_model(layers="4").to(dtype)
    for _ in range(3):
        fit_index(whole, real_bytes(2, 8 * W))
    assert all(block.attention.index_H.isfinite().all() for block in whole.blocks)


def test_autocast_leaves_the_gradient_as_it_is():
    """Scores so small beside the sink that their cubes are below the smallest number of float16."""
    q, latent, _, weights = scene()
    q, latent, sink = (0.1 * q).half(), latent.half(), torch.full((HEADS,), 12.0)
    slopes = []
    for on in (False, True):
        own = weights.detach().float().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=on):
            loss = index_loss(q, latent, own, sink_H=sink, window=W, length_B=None)
        slopes.append(torch.autograd.grad(loss, own)[0])
    assert slopes[0].abs().min() > 1e-4
    assert torch.equal(*slopes)


def test_a_text_without_far_tokens_is_refused_and_changes_nothing():
    model = small_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"tokens_BT=.*two windows of 16"):
        fit_index(model, real_bytes(1, 2 * W))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert fit_index(CoGAGPT(small_config(layers="near")), real_bytes(1, W)) == 0
