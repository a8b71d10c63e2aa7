"""Assignment against `coga.kernels.capacity`, run in the Triton interpreter by `test_triton_assign.py`."""

from __future__ import annotations

import pytest
import torch

from coga.kernels import capacity
from coga.kernels.triton_assign import assign

STEP = 2.0**-12
SHAPES = {
    "exact": dict(windows=3, width=32, groups=4, slots=8),
    "loose": dict(windows=2, width=24, groups=4, slots=9),
    "odd": dict(windows=2, width=21, groups=3, slots=7),
    "many-groups": dict(windows=1, width=40, groups=20, slots=2),
    "one-group": dict(windows=1, width=16, groups=1, slots=16),
}


@pytest.mark.parametrize("kind", ["random", "same-order", "ties", "negative"])
@pytest.mark.parametrize("name", SHAPES)
def test_same_groups(name, kind):
    shape = SHAPES[name]
    g = torch.Generator().manual_seed(len(name))
    score = torch.randn(shape["windows"], shape["width"], shape["groups"], generator=g)
    if kind == "same-order":  # every token prefers the groups in one order: as many rounds as groups
        score = score[..., :1] * 0.1 - torch.arange(shape["groups"]).float()
    elif kind == "ties":
        score = (score * 2).round() * 1e-5
    elif kind == "negative":
        score = score * 10 - 1000
    expected = capacity.assign(score, shape["slots"], STEP)
    chosen = assign(score, shape["slots"], STEP)
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, expected)
    assert all((chosen == k).sum(1).max() <= shape["slots"] for k in range(shape["groups"]))


def test_half_precision_scores():
    score = torch.randn(2, 32, 4, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(assign(score, 8, 2.0**-8), capacity.assign(score, 8, 2.0**-8))


def test_too_few_slots():
    with pytest.raises(ValueError, match="slots=3: 4 groups of 3 cannot hold 16 tokens"):
        assign(torch.randn(1, 16, 4), 3, STEP)
