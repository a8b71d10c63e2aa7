"""The soft assignment against a loop over windows, steps and groups, in float64."""

from __future__ import annotations

import pytest
import torch
from support import F64, assert_close
from torch.nn.functional import normalize

from coga.grouping import gumbel
from coga.grouping.gumbel import soft_assignment
from coga.kernels import dispatch
from coga.kernels.refine import CENTROID_EPS

B, N, W, G, C, BETA = 2, 3, 10, 4, 5, 6.0


def by_hand(
    unit: torch.Tensor, prototype: torch.Tensor, steps: int, last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and centroids; `last`: the start of the last step is a constant that passes its gradient on."""
    logits, centroids = [], []
    for window in unit.flatten(0, 1):
        start = [p / p.norm() for p in prototype]
        centroid = start
        for step in range(steps):
            if last and 0 < step == steps - 1:
                centroid = [m.detach() + s - s.detach() for m, s in zip(centroid, start, strict=True)]
            weight = torch.stack([(BETA * (window * m).sum(-1)).exp() for m in centroid])
            weight = weight / weight.sum(0)
            total = [(w[:, None] * window).sum(0) for w in weight]
            centroid = [v / v.norm().clamp_min(CENTROID_EPS) for v in total]
        logits.append(torch.stack([BETA * window @ m for m in centroid], -1))
        centroids.append(torch.stack(centroid))
    return torch.stack(logits).view(B, N, W, G), torch.stack(centroids).view(B, N, G, C)


@pytest.mark.parametrize("through", ["last", "all"])
@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_values_and_gradients_of_a_plain_loop(steps, through):
    content, prototype = torch.randn(B, N, W, C, dtype=F64), torch.randn(G, C, dtype=F64)
    content[:, :, 0] = 0
    unit = normalize(content, dim=-1, eps=0.1).requires_grad_()
    prototype.requires_grad_()
    value = torch.randn(B, N, W, G, dtype=F64)
    found = []
    for logits, centroid in (
        soft_assignment(unit, prototype, BETA, steps, through),
        by_hand(unit, prototype, steps, through == "last"),
    ):
        total = (logits.softmax(-1) * value).sum() + centroid.square()[..., 0].sum()
        found.append((logits, centroid, *torch.autograd.grad(total, (unit, prototype))))
    for a, b in zip(*found, strict=True):
        assert_close(a, b)
        assert b.norm() > 1e-3


@pytest.mark.parametrize(("steps", "through", "calls"), [(4, "last", [3]), (1, "last", []), (4, "all", [])])
def test_the_steps_without_a_gradient_are_one_call(steps, through, calls, monkeypatch):
    seen, refine = [], gumbel.refine

    def watched(unit, prototype, beta, count, *, backend):
        seen.append((count, backend))
        return refine(unit, prototype, beta, count, backend=backend)

    monkeypatch.setattr(gumbel, "refine", watched)
    unit = normalize(torch.randn(B, N, W, C), dim=-1)
    soft_assignment(unit, torch.randn(G, C), BETA, steps, through, "reference")
    assert seen == [(count, "reference") for count in calls]


def test_refine_has_no_gradient_and_goes_on_where_it_ended():
    """From its centroids the steps that are left end where all steps end."""
    unit = normalize(torch.randn(B, N, W, C, dtype=F64), dim=-1).requires_grad_()
    prototype = torch.randn(G, C, dtype=F64, requires_grad=True)
    _, expected = by_hand(unit, prototype, 3, last=False)
    for steps in range(3):
        start = dispatch.refine(unit, prototype, BETA, steps)
        assert not start.requires_grad and start.shape == (B, N, G, C)
        assert_close(dispatch.refine(unit, start, BETA, 3 - steps), expected)
