"""`refine` on a CUDA device: error against float64 at most twice that of plain PyTorch in float32."""

from __future__ import annotations

import pytest
import torch
from scenes import clusters, relative_error

from coga.kernels import dispatch
from coga.kernels import refine as plain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Sums of tensor cores are cut to float32, not rounded. Emulated on a CPU: errors of 0.5 to 3 times those of
# plain float32 (2e-7 after a step, up to 4e-6 after three with beta 32, which magnifies both).
FLOOR = 2e-6


def on_gpu(*shape):
    return clusters(*shape, seed=shape[3], device="cuda")


@pytest.mark.parametrize("beta", [8.0, 32.0])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize(
    ("width", "groups", "content"),
    [
        *((512, groups, content) for groups in (8, 16, 32) for content in (64, 128)),
        (512, 64, 64),
        (512, 64, 128),
        (200, 3, 24),
        (16, 1, 16),
        (1000, 64, 32),
    ],
)
def test_error_at_most_twice_plain(width, groups, content, steps, beta):
    unit, prototype = on_gpu(2, 8, width, groups, content)
    exact = plain.refine(unit.double(), prototype.double(), beta, steps)
    found, again = (dispatch.refine(unit, prototype, beta, steps, backend="triton") for _ in range(2))
    assert torch.equal(found, again)
    assert found.isfinite().all()
    ours, theirs = (relative_error(x, exact) for x in (found, plain.refine(unit, prototype, beta, steps)))
    assert ours <= 2 * theirs + FLOOR, (ours, theirs)


@pytest.mark.parametrize("width", [128, 200, 512])
def test_windows_do_not_meet(width):
    """Another window, NaN included, changes no bit; nor does how many windows there are."""
    unit, prototype = on_gpu(2, 3, width, 16, 64)
    base = dispatch.refine(unit, prototype, 32.0, 3, backend="triton")
    for value in (1e3, float("nan")):
        other = unit.clone()
        other[0, 1, 1:] = value
        found = dispatch.refine(other, prototype, 32.0, 3, backend="triton")
        same = torch.ones(2, 3, dtype=torch.bool, device="cuda")
        same[0, 1] = False
        assert torch.equal(found[same], base[same])
        assert not torch.equal(found[0, 1], base[0, 1])
    alone = dispatch.refine(unit[1:, 2:], prototype, 32.0, 3, backend="triton")
    assert torch.equal(alone, base[1:, 2:])


def test_a_total_of_zero_stays_zero():
    _, prototype = on_gpu(1, 1, 16, 8, 64)
    zero = torch.zeros(1, 2, 512, 64, device="cuda")
    found = dispatch.refine(zero, prototype, 8.0, 3, backend="triton")
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("per_window", [False, True])
def test_opcheck(per_window):
    unit, prototype = on_gpu(2, 4, 512, 16, 64)
    prototype = prototype.expand(2, 4, -1, -1) if per_window else prototype
    torch.library.opcheck(torch.ops.coga.refine.default, (unit, prototype, 8.0, 3, "triton"))
