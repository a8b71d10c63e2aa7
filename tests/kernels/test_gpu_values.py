"""`gated_values` on a CUDA device against plain PyTorch: error at most twice that of plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from scenes import plain_values, run_values, value_scene

from coga import CoGAConfig
from coga.kernels import fused, triton_values
from coga.models.latent import LatentProjections

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FLOOR = {torch.bfloat16: 2**-10, torch.float16: 2**-13, torch.float32: 1e-6}
SHAPES = {
    "gpt2": dict(heads=12, content=64, width=64, length=4097, batch=2),
    "one-token": dict(heads=1, content=32, width=64, length=1, batch=64),
    "small": dict(heads=3, content=16, width=16, length=63),
    "odd-widths": dict(heads=3, content=24, width=20, length=65, batch=2),
    "narrow": dict(heads=12, content=16, width=64, length=1025),
    "narrow-heads": dict(heads=16, content=64, width=48, length=1025),
    "wide": dict(heads=16, content=128, width=64, length=111),
    "widest": dict(heads=2, content=128, width=128, length=1000),
    "wide-latent": dict(heads=4, content=256, width=64, length=333),
}


@pytest.mark.parametrize("dtype", list(FLOOR), ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_error_at_most_twice_plain(name, gated, dtype):
    inputs = value_scene(**SHAPES[name], gated=gated, dtype=dtype, device="cuda")
    if not fused.fuses_values("auto", *inputs[:3]):
        assert dtype == torch.float32 and name.startswith("wide")
        return
    truth = run_values(plain_values, *(None if x is None else x.double() for x in inputs))
    results = (run_values(body, *inputs) for body in (fused.gated_values, plain_values))
    for ours, theirs, exact in zip(*results, truth, strict=True):
        norm = exact.norm().clamp_min(1e-30)
        error, allowed = ((x.double() - exact).norm() / norm for x in (ours, theirs))
        assert error <= 2 * allowed + FLOOR[dtype]


@pytest.mark.parametrize("dtype", list(FLOOR), ids=["bf16", "fp16", "fp32"])
def test_same_bits_twice(dtype):
    """And a row has the bits that it has alone."""
    inputs = value_scene(**SHAPES["gpt2"], dtype=dtype, device="cuda")
    first, second = (run_values(fused.gated_values, *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    mixed, up, gate, dy = inputs
    y, dmixed, _, dgate = run_values(fused.gated_values, mixed[1:, 77:78], up, gate[1:, 77:78], dy[1:, 77:78])
    for one, whole in zip((y, dmixed, dgate), (first[0], first[1], first[3]), strict=True):
        assert torch.equal(one, whole[1:, 77:78])


def test_beyond_31_bits():
    """Rows times width above 2^31, and a sum over 2.9 million rows that is not cut short."""
    tokens = 2**31 // 768 + 100_000
    if torch.cuda.mem_get_info()[0] < 45e9:
        pytest.skip("needs 45 GB")
    torch.manual_seed(0)
    mixed = torch.randn(1, 1024, 12, 64, device="cuda", dtype=torch.bfloat16).abs()
    mixed = mixed.repeat(1, -(-tokens // 1024), 1, 1)[:, :tokens]
    up = torch.randn(12, 64, 64, device="cuda", dtype=torch.bfloat16) / 8
    gate, dy = mixed.flatten(2).roll(1, 1), mixed.flatten(2)
    end = slice(tokens - 300, None)
    y = triton_values.gated_values(mixed, up, gate)
    assert torch.equal(y[:, end], triton_values.gated_values(mixed[:, end], up, gate[:, end]))
    del y
    dmixed, dup, dgate = triton_values.gated_values_backward(dy, mixed, up, gate)
    parts = [x[:, end].contiguous() for x in (dy, mixed, gate)]
    found = triton_values.gated_values_backward(parts[0], parts[1], up, parts[2])
    assert torch.equal(found[0], dmixed[:, end]) and torch.equal(found[2], dgate[:, end])
    del dmixed, dgate
    exact = torch.zeros_like(dup, dtype=torch.float64)
    for a, b, g in zip(*(x[0].split(2**16) for x in (mixed, dy, gate)), strict=True):
        dv = (b.float() * torch.sigmoid(g.float())).bfloat16().double().unflatten(-1, (12, 64))
        exact += torch.einsum("thc,the->hce", a.double(), dv)
    assert ((dup - exact).abs() <= 1e-3 * exact.abs()).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_way_back_out(gated, autocast):
    """Of a module, compiled in one graph, against the same without Triton."""
    config = CoGAConfig(
        n_layer=1, n_head=12, d_model=768, latent_dim=64, rope_dim=32, window=16, band=4, layers="near",
        output_gate=gated,
    )  # fmt: skip
    torch.manual_seed(0)
    module = LatentProjections(config, config.layer(0)).cuda()
    weights = [module.up_HCE, module.out.weight, *([module.gate.weight] if gated else [])]
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.05)
    kind = torch.bfloat16 if autocast else torch.float32
    mixed = torch.randn(2, 1001, 12, 64, device="cuda", dtype=kind, requires_grad=True)
    x, dy = (torch.randn(2, 1001, 768, device="cuda") for _ in range(2))
    x.requires_grad_(gated)
    compiled = torch.compile(module.output, fullgraph=True)
    results = []
    for body, backend in ((module.output, "reference"), (module.output, "auto"), (compiled, "auto")):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            y = body(mixed, x, backend)
        results.append(
            [y, *torch.autograd.grad(y, [mixed, *weights, *([x] if gated else [])], dy.to(y.dtype))]
        )
    exact, *others = results
    for found in others:
        for ours, one in zip(found, exact, strict=True):
            assert ours.dtype == one.dtype
            assert (ours - one).norm() <= (2**-6 if autocast else 1e-5) * one.norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated):
    inputs = value_scene(**SHAPES["odd-widths"], gated=gated, dtype=torch.bfloat16, device="cuda")[:3]
    inputs = tuple(x if x is None else x.requires_grad_() for x in inputs)
    torch.library.opcheck(torch.ops.coga.gated_values, inputs)
