"""Soft k-means against `coga.kernels.refine` in float64, in the interpreter, by `test_triton_refine.py`."""

from __future__ import annotations

import pytest
import torch
from scenes import clusters, relative_error

from coga.grouping.gumbel import soft_assignment
from coga.kernels import dispatch
from coga.kernels import refine as plain
from coga.kernels.triton_refine import MOST_GROUPS, WIDEST, refine

ULPS = 4 * 2.0**-23
SHAPES = [  # batch, windows, tokens, groups, width
    (1, 2, 48, 1, 16),
    (2, 1, 16, 3, 16),
    (1, 2, 200, 3, 24),
    (2, 2, 48, 8, 24),
    (1, 2, 128, 8, 64),
    (1, 1, 200, 16, 64),
    (2, 1, 128, 32, 24),
    (1, 1, 200, 64, 64),
    (1, 1, 48, 16, 100),
]


@pytest.mark.parametrize("beta", [8.0, 32.0])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_at_most_twice_plain(shape, steps, beta):
    unit, prototype = clusters(*shape)
    exact = plain.refine(unit.double(), prototype.double(), beta, steps)
    found = refine(unit, prototype, beta, steps)
    assert found.shape == exact.shape and found.dtype == torch.float32
    assert (
        relative_error(found, exact)
        <= 2 * relative_error(plain.refine(unit, prototype, beta, steps), exact) + ULPS
    )


@pytest.mark.parametrize("tile", [16, 64])
def test_prototypes_of_each_window_and_other_tiles(tile):
    unit, _ = clusters(2, 2, 72, 4, 24)
    prototype = torch.randn(2, 2, 4, 24, generator=torch.Generator().manual_seed(1))
    exact = plain.refine(unit.double(), prototype.double(), 8.0, 2)
    plain_error = relative_error(plain.refine(unit, prototype, 8.0, 2), exact)
    assert relative_error(refine(unit, prototype, 8.0, 2, tile=tile), exact) <= 2 * plain_error + ULPS
    mixed = unit.transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
    assert torch.equal(refine(mixed, prototype, 8.0, 2), refine(unit, prototype, 8.0, 2))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of NaN
@pytest.mark.parametrize("width", [16, 48, 200])
def test_windows_do_not_meet(width):
    """Another window, NaN included, changes no bit; nor does how many windows there are."""
    unit, prototype = clusters(2, 3, width, 4, 16)
    base = refine(unit, prototype, 8.0, 3)
    for value in (None, 1e3, float("nan")):
        other = unit.clone()
        other[0, 1] = torch.randn(width, 16) if value is None else value
        found = refine(other, prototype, 8.0, 3)
        same = torch.ones(2, 3, dtype=torch.bool)
        same[0, 1] = False
        assert torch.equal(found[same], base[same])
        assert not torch.equal(found[0, 1], base[0, 1])
    assert torch.equal(refine(unit[1:, 2:], prototype, 8.0, 3), base[1:, 2:])


def test_a_total_of_zero_stays_zero():
    """Zero contents, and a group whose weights underflow: exactly zero, as the plain twin gives."""
    prototype = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    zero = refine(torch.zeros(1, 2, 24, 16), prototype, 8.0, 2)
    assert torch.equal(zero, torch.zeros_like(zero))
    unit = torch.zeros(1, 1, 24, 16)
    unit[..., 0] = 1
    prototype = torch.zeros(2, 16)
    prototype[0, 0], prototype[1, 0] = 1, -1
    for steps in (1, 3):
        found, wanted = (f(unit, prototype, 200.0, steps) for f in (refine, plain.refine))
        assert torch.equal(found, wanted)
    once = refine(unit, prototype, 200.0, 1)
    assert torch.equal(once[0, 0, 1], torch.zeros(16)) and once[0, 0, 0, 0] == 1


@pytest.mark.parametrize(
    ("groups", "content", "dtype"),
    [(3, 16, torch.float64), (MOST_GROUPS + 1, 16, torch.float32), (2, WIDEST + 1, torch.float32)],
)
def test_without_a_kernel_the_reference_runs(groups, content, dtype):
    unit, prototype = (x.to(dtype) for x in clusters(1, 2, 24, groups, content))
    found = dispatch.refine(unit, prototype, 8.0, 2, backend="triton")
    assert torch.equal(found, plain.refine(unit, prototype, 8.0, 2))


def test_nothing_to_refine():
    prototype = torch.randn(3, 16)
    assert refine(torch.zeros(1, 0, 24, 16), prototype, 8.0, 2).shape == (1, 0, 3, 16)
    assert torch.equal(refine(torch.zeros(1, 2, 0, 16), prototype, 8.0, 2), torch.zeros(1, 2, 3, 16))


def test_the_soft_assignment_through_the_kernel():
    """Logits and gradients of a whole soft assignment are near those of the reference."""
    unit, prototype = (x.requires_grad_() for x in clusters(2, 2, 48, 8, 24))
    grads = []
    for backend in ("triton", "reference"):
        logits, centroid = soft_assignment(unit, prototype, 8.0, 4, backend=backend)
        total = logits.square().mean() + centroid.sum()
        grads.append([logits.detach(), *torch.autograd.grad(total, (unit, prototype))])
    for ours, plain_ in zip(*grads, strict=True):
        assert relative_error(ours, plain_.double()) < 1e-4


def test_opcheck():
    unit, prototype = clusters(1, 2, 24, 3, 16)
    for given in (prototype, prototype.expand(1, 2, -1, -1)):
        torch.library.opcheck(torch.ops.coga.refine.default, (unit, given, 8.0, 2, "triton"))
