"""`project` against the plain projections, in the Triton interpreter (`test_triton_project.py`)."""

from __future__ import annotations

import pytest
import torch

from coga import CoGAConfig
from coga.kernels import fused
from coga.models.index import index_query
from coga.models.latent import LatentProjections
from coga.models.rotary import rotary_table

SHAPES = {
    "plain": dict(heads=3, content=32, rotary=16, length=37, batch=2),
    "no-rotary": dict(heads=2, content=16, rotary=0, length=5),
    "odd-widths": dict(heads=5, content=24, rotary=6, length=41),
    "one-head": dict(heads=1, content=8, rotary=2, length=1),
    "wide": dict(heads=2, content=128, rotary=64, length=19),
    "a-table-a-row": dict(heads=3, content=16, rotary=8, length=9, batch=2, own_table=True),
}


def scene(heads, content, rotary, length, batch=1, own_table=False):
    config = CoGAConfig(
        n_layer=1, n_head=heads, d_model=8 * heads, latent_dim=content, rope_dim=rotary, window=16, band=4,
        layers="near",
    )  # fmt: skip
    torch.manual_seed(heads)
    module = LatentProjections(config, config.layer(0))
    torch.nn.init.normal_(module.gain_H)
    x = torch.randn(batch, length, 8 * heads)
    position = torch.arange(length) + 3
    if own_table:
        position = position + torch.arange(batch)[:, None] * 5
    return module, x, rotary_table(position, rotary, 1e4, torch.float32)


def run(module, x, table, backend, weights):
    """Outputs, then gradients of x, the gain and both projections."""
    x = x.clone().requires_grad_()
    q, latent, index = module.enter(x, table, backend, weights)
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(t.shape, generator=g) for t in (q, latent)]
    wanted = (x, module.gain_H, module.query.weight, module.latent.weight)
    if index is None:
        index = index_query(q.detach(), weights)
    assert not index.requires_grad
    return [q, latent, index, *torch.autograd.grad((q, latent), wanted, grads)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(name, weighted):
    module, x, table = scene(**SHAPES[name])
    weights = torch.randn(module.heads) if weighted else None
    for ours, plain in zip(
        *(run(module, x, table, b, weights) for b in ("triton", "reference")), strict=True
    ):
        assert ours.shape == plain.shape
        assert (ours - plain).norm() <= 2e-6 * plain.norm()


def test_queries_alone():
    """Without the columns of the latent, as groups have no use for one."""
    module, x, table = scene(heads=3, content=16, rotary=8, length=21)
    raw = module.query(x).detach().requires_grad_()
    q, latent, _ = fused.project(raw, table, module.gain_H, None, content=16, eps=module.eps)
    expected = module.queries(x, table)
    assert latent.numel() == 0 and (q - expected).norm() <= 2e-6 * expected.norm()
    grad = torch.randn_like(q)
    (dx,) = torch.autograd.grad(q, raw, grad)
    (expected,) = torch.autograd.grad(module.queries(x, table), module.query.weight, grad)
    assert ((dx.flatten(0, 1).T @ x.flatten(0, 1)) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("layout", ["padded", "no-common-stride", "transposed"])
def test_rows_of_any_layout(layout):
    """Inductor pads rows; whatever else comes is copied. Same bits, gradients included."""
    module, _, table = scene(heads=3, content=16, rotary=8, length=7)
    x = torch.randn(2, 7, 4 * 24)
    given = {
        "padded": torch.zeros(2, 7, 128)[..., :96],
        "no-common-stride": torch.zeros(2, 9, 128)[:, :7, :96],
        "transposed": torch.zeros(2, 96, 7).mT,
    }[layout].copy_(x)
    results, weights = [], torch.rand(3)
    for raw in (x, given):
        raw = raw.detach().requires_grad_()
        out = fused.project(raw, table, module.gain_H, weights, content=16, eps=module.eps)
        grads = torch.autograd.grad([*out[:2]], [raw, module.gain_H], [torch.ones_like(t) for t in out[:2]])
        results.append([*out, *grads])
    assert not given.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_opcheck():
    module, _, table = scene(heads=3, content=16, rotary=8, length=7)
    raw = torch.randn(2, 7, 4 * 24, requires_grad=True)
    for weights in (None, torch.rand(3)):
        numbers = (module.gain_H.detach(), weights, 16, 1e-6)
        torch.library.opcheck(torch.ops.coga.project, (raw, *table, *numbers))
