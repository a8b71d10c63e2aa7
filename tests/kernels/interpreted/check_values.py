"""`gated_values` against plain PyTorch, in the Triton interpreter (`test_triton_values.py`).

Without bfloat16, whose products the interpreter does not know: `test_gpu_values.py` has it.
"""

from __future__ import annotations

import pytest
import torch
from scenes import plain_values, run_values, value_scene

from coga import CoGAConfig
from coga.kernels import fused, triton_values
from coga.models.latent import LatentProjections

FLOOR = {torch.float16: 2**-13, torch.float32: 1e-6}
SHAPES = {
    "plain": dict(heads=3, content=64, width=64, length=65, batch=2),
    "heads-of-gpt2": dict(heads=12, content=64, width=64, length=63),
    "one-of-each": dict(heads=1, content=16, width=16, length=1),
    "odd-widths": dict(heads=3, content=24, width=20, length=63, batch=2),
    "narrow": dict(heads=1, content=16, width=64, length=65),
    "wide": dict(heads=2, content=128, width=30, length=7),
}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory holds NaN until it is written."""
    empty = torch.Tensor.new_empty

    def poisoned(*arguments, **options):
        found = empty(*arguments, **options)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.parametrize("dtype", list(FLOOR), ids=["fp16", "fp32"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_error_at_most_twice_plain(name, gated, dtype):
    inputs = value_scene(**SHAPES[name], gated=gated, dtype=dtype)
    assert fused.fuses_values("triton", *inputs[:3])
    truth = run_values(plain_values, *(None if x is None else x.double() for x in inputs))
    results = (run_values(body, *inputs) for body in (fused.gated_values, plain_values))
    for ours, theirs, exact in zip(*results, truth, strict=True):
        assert ours.shape == exact.shape
        norm = exact.norm()
        error, allowed = ((x.double() - exact).norm() / norm for x in (ours, theirs))
        assert error <= 2 * allowed + FLOOR[dtype]


def test_gates_that_are_shut_or_open():
    """Where sigmoid rounds to 0 or 1."""
    mixed, up, gate, dy = value_scene(heads=2, content=16, width=16, length=5)
    gate = torch.where(gate > 0, 80.0, -80.0)
    for ours, exact in zip(*(run_values(f, mixed, up, gate, dy) for f in (fused.gated_values, plain_values))):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 9])
def test_any_number_of_splits(splits):
    """Also more than there are tiles. A row is the same whoever computes it."""
    mixed, up, gate, dy = value_scene(heads=3, content=24, width=20, length=71, batch=2)
    tiles = dict(BM=16, num_warps=4, num_stages=1) if splits < 9 else dict(BM=32, num_warps=4, num_stages=1)
    whole = triton_values.gated_values_backward(dy, mixed, up, gate, tiles=dict(BM=16), splits=1)
    cut = triton_values.gated_values_backward(dy, mixed, up, gate, tiles=tiles, splits=splits)
    expected = run_values(plain_values, mixed, up, gate, dy)[1:]
    for ours, one, exact in zip(cut, whole, expected, strict=True):
        assert (ours - exact).norm() <= 2e-6 * exact.norm()
        assert (ours - one).norm() <= 2e-6 * exact.norm()
    y = triton_values.gated_values(mixed, up, gate, tiles=tiles)
    assert torch.equal(y[:, :3], fused.gated_values(mixed[:, :3], up, gate[:, :3]))


@pytest.mark.parametrize("heads", [1, 12, 1000])
@pytest.mark.parametrize("tile", [16, 32, 64, 128])
@pytest.mark.parametrize("count", [1, 65, 2**16, 2**18 + 1, 2**24 + 3])
def test_no_sum_is_too_long(count, tile, heads):
    splits = triton_values._splits(count, heads, tile)
    blocks = -(-count // tile)
    assert 1 <= splits <= blocks
    assert -(-blocks // splits) * tile <= triton_values.MOST_ROWS
    assert splits * heads <= max(heads, triton_values.PROGRAMS) or splits <= -(
        -count // triton_values.MOST_ROWS
    )


@pytest.mark.parametrize("gated", [False, True])
def test_way_back_out(gated):
    """Of a module, with the gradients of all its weights."""
    config = CoGAConfig(
        n_layer=1, n_head=3, d_model=60, latent_dim=24, rope_dim=8, window=16, band=4, layers="near",
        output_gate=gated,
    )  # fmt: skip
    torch.manual_seed(0)
    module = LatentProjections(config, config.layer(0))
    for weight in (module.up_HCE, module.out.weight, *([module.gate.weight] if gated else [])):
        torch.nn.init.normal_(weight, std=0.2)
    mixed = torch.randn(2, 21, 3, 24, requires_grad=True)
    x, dy = torch.randn(2, 21, 60, requires_grad=gated), torch.randn(2, 21, 60)
    wanted = [mixed, module.up_HCE, module.out.weight, *([x, module.gate.weight] if gated else [])]
    results = []
    for backend in ("triton", "reference"):
        y = module.output(mixed, x, backend)
        results.append([y, *torch.autograd.grad(y, wanted, dy)])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= 2e-6 * exact.norm()


def test_what_has_no_kernel():
    mixed, up, gate, _ = value_scene(heads=2, content=16, width=16, length=5)
    fuses = fused.fuses_values
    assert fuses("triton", mixed, up, gate) and fuses("triton", mixed, up, None)
    assert not fuses("reference", mixed, up, gate) and not fuses("auto", mixed, up, gate)
    assert not fuses("triton", mixed.double(), up.double(), gate.double())
    assert not fuses("triton", mixed, up, gate.bfloat16()) and not fuses("triton", mixed.half(), up, None)
    assert not fuses("triton", mixed[:, :0], up, gate[:, :0])
    for kind, most in ((torch.float32, 64), (torch.bfloat16, 128)):
        for more in (False, True):
            wide = value_scene(heads=1, content=most, width=most + more, length=1, dtype=kind)
            assert fuses("triton", *wide[:3]) != more


@pytest.mark.parametrize("layout", ["padded", "transposed", "expanded"])
def test_rows_of_any_layout(layout):
    """Same bits, gradients included."""
    mixed, up, gate, dy = value_scene(heads=3, content=16, width=20, length=7, batch=2)
    if layout == "expanded":
        mixed, gate, dy = (x[:, :1].expand_as(x) for x in (mixed, gate, dy))

    def odd(x):
        """The same numbers, laid out otherwise."""
        if layout == "expanded":
            return x
        if layout == "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        return torch.nn.functional.pad(x, (0, 4))[..., : x.shape[-1]]

    given = [odd(x) for x in (mixed, up, gate, dy)]
    assert not any(x.is_contiguous() for x in (given[0], given[2], given[3]))
    results = []
    for *inputs, grad in ((mixed.contiguous(), up, gate.contiguous(), dy.contiguous()), given):
        inputs = [x.detach().requires_grad_() for x in inputs]
        y = fused.gated_values(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated):
    inputs = value_scene(heads=3, content=16, width=20, length=7, batch=2, gated=gated)[:3]
    for x in inputs:
        if x is not None:
            x.requires_grad_()
    torch.library.opcheck(torch.ops.coga.gated_values, tuple(inputs))
