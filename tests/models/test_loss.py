"""The loss is plain cross-entropy, in one piece, through torch's chunked form, and through the loop."""

from __future__ import annotations

import pytest
import torch
from support import F64, Largest, assert_close
from torch.nn.functional import cross_entropy

from coga.models import loss as loss_module
from coga.models.loss import IGNORE, linear_cross_entropy


def inputs(ignored: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 11, 5, dtype=F64, requires_grad=True)
    weight = torch.randn(7, 5, dtype=F64, requires_grad=True)
    target = torch.randint(0, 7, (2, 11))
    target.view(-1)[:ignored] = IGNORE
    return x, weight, target


@pytest.mark.parametrize("ignored", [0, 5, 21])
@pytest.mark.parametrize("rows", [100, 4, 1])
@pytest.mark.parametrize("torch_form", [True, False])
def test_loss_and_gradients_are_those_of_plain_cross_entropy(ignored, rows, torch_form, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", rows * 7)
    if not torch_form:
        monkeypatch.setattr(loss_module, "_torch_has_it", lambda x, weight: False)
    x, weight, target = inputs(ignored)
    want = cross_entropy((x @ weight.T).flatten(0, 1), target.flatten(), ignore_index=IGNORE)
    got = linear_cross_entropy(x, weight, target)
    assert_close(got, want)
    expected = torch.autograd.grad(want, (x, weight))
    for found, grad in zip(torch.autograd.grad(got, (x, weight)), expected, strict=True):
        assert_close(found, grad)


@pytest.mark.parametrize("rows", [100, 4])
def test_without_targets_the_loss_is_zero_and_has_a_zero_gradient(rows, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", rows * 7)
    x, weight, target = inputs(22)
    loss = linear_cross_entropy(x, weight, target)
    loss.backward()
    assert loss == 0 and not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("torch_form", [True, False])
def test_a_chunk_of_logits_is_the_most_that_is_held(torch_form, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 64 * 101)
    if not torch_form:
        monkeypatch.setattr(loss_module, "_torch_has_it", lambda x, weight: False)
    x, weight = torch.randn(1, 2048, 5, requires_grad=True), torch.randn(101, 5, requires_grad=True)
    with Largest() as seen:
        linear_cross_entropy(x, weight, torch.zeros(1, 2048, dtype=torch.int64)).backward()
    assert seen.elements <= 2048 * 6
