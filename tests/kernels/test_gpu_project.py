"""`project` on a CUDA device against the plain projections: error at most twice that of plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch

from coga import CoGAConfig
from coga.models.index import index_query
from coga.models.latent import LatentProjections
from coga.models.rotary import rotary_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FLOOR = {torch.bfloat16: 2**-10, torch.float16: 2**-13, torch.float32: 1e-6}
SHAPES = {
    "gpt2": dict(heads=12, content=64, rotary=32, length=1025, batch=2),
    "one-token": dict(heads=1, content=32, rotary=0, length=1, batch=64),
    "small": dict(heads=3, content=32, rotary=16, length=63),
    "wide": dict(heads=16, content=256, rotary=64, length=111),
    "many-heads": dict(heads=32, content=128, rotary=64, length=65),
}


def outputs(
    module: LatentProjections, x: torch.Tensor, grads: list, backend: str, weights: torch.Tensor | None
) -> list[torch.Tensor]:
    """q, latent, index query and the gradients of x, gain and weights, in float64."""
    x = x.detach().clone().requires_grad_()
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    position = torch.arange(x.shape[1], device="cuda")
    q, latent, index = module.enter(x, rotary_table(position, module.rotary, 1e4, kind), backend, weights)
    index = index_query(q, weights) if index is None else index
    wanted = (x, module.gain_H, module.query.weight, module.latent.weight)
    found = torch.autograd.grad((q, latent), wanted, [g.to(q.dtype) for g in grads])
    return [t.detach().double() for t in (q, latent, index, *found)]


@pytest.mark.parametrize("dtype", list(FLOOR), ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_error_at_most_twice_plain(name, dtype, weighted):
    shape = SHAPES[name]
    heads, content, rotary = shape["heads"], shape["content"], shape["rotary"]
    config = CoGAConfig(
        n_layer=1, n_head=heads, d_model=16 * heads, latent_dim=content, rope_dim=rotary, window=16, band=4,
        layers="near",
    )  # fmt: skip
    torch.manual_seed(0)
    module = LatentProjections(config, config.layer(0))
    torch.nn.init.normal_(module.gain_H)
    module = module.cuda().to(dtype)
    x = torch.randn(shape.get("batch", 1), shape["length"], 16 * heads, device="cuda", dtype=dtype)
    exact = copy.deepcopy(module).double()
    width = content + rotary
    grads = [torch.randn(*x.shape[:2], *rest, device="cuda") for rest in ((heads, width), (width,))]
    grads = [g.to(dtype) for g in grads]
    weights = torch.randn(heads, device="cuda") if weighted else None
    truth = outputs(exact, x.double(), grads, "reference", weights)
    ours, plain = (outputs(module, x, grads, backend, weights) for backend in ("triton", "reference"))
    for a, b, c in zip(ours, plain, truth, strict=True):
        norm = c.norm().clamp_min(1e-30)
        assert (a - c).norm() / norm <= 2 * (b - c).norm() / norm + FLOOR[dtype]
