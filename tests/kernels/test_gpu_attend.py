"""Grouped attention on a GPU: Triton errs at most twice as much as plain PyTorch in the same dtype.

Plain PyTorch is `plain` below: one dense softmax over tokens, opened members and summaries, in the dtype of
the inputs, with gradients from autograd. Assignment and selection are given.
"""

from __future__ import annotations

import pytest
import torch

from coga.kernels import reference
from coga.types import Far

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Both may be exact (one token), so a rounding of the last place is allowed. In float32 the parts merge
# through a log-sum-exp of magnitude 4 to 16, whose own last place is 1e-6: the floor of the comparison.
FLOOR = {torch.bfloat16: 2**-10, torch.float16: 2**-13, torch.float32: 1e-6}
NAMES = ("q", "latent", "alpha", "sink", "group", "far_bias", "slot")


def scene(
    length,
    *,
    batch=1,
    heads=3,
    content=64,
    rotary=32,
    window=128,
    size=32,
    count=4,
    band=64,
    capacity=1.0,
    sink=True,
    shift=None,
    dtype=torch.bfloat16,
    seed=0,
):
    """Random inputs by name (those of `NAMES` need gradients) and the options that are not tensors."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to("cuda", dtype)

    width = content + rotary
    scale = width**-0.25
    x = {"q": draw(batch, length, heads, width, scale=scale)}
    x["latent"] = draw(batch, length, width, scale=scale)
    if band:
        x["alpha"] = draw(heads, scale=0.5).float()
    if sink:
        x["sink"] = draw(heads).float()
    fixed: dict = {}
    windows, groups = (length // window, window // size) if window else (0, 0)
    total = windows * groups
    if total:
        slots = -int(-size * capacity // 1)
        index = torch.arange(window) % groups
        if capacity > 1 and groups > 1:  # group 0 of each window is full, the last one short or empty
            index = torch.cat([torch.zeros(slots - size, dtype=torch.int64), index])[:window].sort().values
            index = torch.where(torch.bincount(index, minlength=groups)[index] > slots, groups - 1, index)
        order = torch.stack([index[torch.randperm(window, generator=g)] for _ in range(batch * windows)])
        flat = order.view(batch, windows, window) + torch.arange(windows)[:, None] * groups
        flat = flat.flatten(1)
        member = torch.zeros(batch, total, dtype=torch.int64).scatter_add_(1, flat, torch.ones_like(flat))
        slots = int(member.max())
        place = flat.argsort(dim=1, stable=True).cuda()
        fixed["slot_order"] = place
        x["group"] = draw(batch, total, width, scale=scale)
        x["far_bias"] = draw(heads).float()
        member = member.cuda()
        fixed |= dict(size=member, offset=member.cumsum(1) - member, log_size=member.float().log())
        fixed |= dict(groups=groups, slots=slots)
        if count:
            x["slot"] = x["latent"].gather(1, place[..., None].expand(-1, -1, width))
            visible = reference.visible_groups(torch.arange(length), window, groups)
            score = torch.rand(batch, length, total, generator=g)
            score = score.masked_fill(torch.arange(total) >= visible[:, None], -1)
            best, ids = score.topk(min(count, total), -1)
            ids = torch.where(best < 0, total, ids).sort(-1).values
            fixed["open"] = torch.where(ids == total, -1, ids).cuda()
            fixed["shift"] = None if shift is None else torch.tensor(shift, device="cuda")
    options = dict(content=content, window=window, band=band)
    return {name: value.detach().requires_grad_() for name, value in x.items()}, fixed, options


def far_of(x: dict, fixed: dict) -> Far | None:
    if "group" not in x:
        return None
    return Far(
        group_BML=x["group"],
        log_size_BM=fixed["log_size"],
        far_bias_H=x["far_bias"],
        offset_BM=fixed["offset"],
        size_BM=fixed["size"],
        slot_BSL=x.get("slot"),
        open_BTK=fixed.get("open"),
        groups=fixed["groups"],
        slots=fixed["slots"],
        open_shift=fixed.get("shift"),
    )


def plain(x: dict, fixed: dict, options: dict) -> torch.Tensor:
    """One dense softmax over near tokens, opened members, summaries and the sink, in the dtype of q."""
    q, latent, content, window = x["q"], x["latent"], options["content"], options["window"]
    dtype, length = q.dtype, q.shape[1]
    at = torch.arange(length, device=q.device)
    low = (at // window - 1).clamp_min(0) * window if window else at * 0
    seen = (at <= at[:, None]) & (at >= low[:, None])
    near = torch.einsum("bihl,bjl->bhij", q, latent)
    if "alpha" in x:
        term = torch.einsum("bjhc,bic->bhij", q[..., :content], latent[..., :content])
        inside = (at <= at[:, None]) & (at > at[:, None] - options["band"])
        near = near + torch.where(inside, term * x["alpha"].to(dtype)[:, None, None], 0)
    scores, values = [near.masked_fill(~seen, -torch.inf)], [latent]
    if "group" in x:
        total = x["group"].shape[1]
        summary = torch.einsum("bihl,bml->bhim", q, x["group"]) + fixed["log_size"].to(dtype)[:, None, None]
        summary = summary + x["far_bias"].to(dtype)[:, None, None]
        m = torch.arange(total, device=q.device)
        hidden = (m >= reference.visible_groups(at, window, fixed["groups"])[:, None]).expand(
            q.shape[0], -1, -1
        )
        if "slot" in x:
            opened = torch.zeros(*hidden.shape[:2], total + 1, dtype=torch.bool, device=q.device)
            opened.scatter_(2, torch.where(fixed["open"] < 0, total, fixed["open"]), True)
            opened = opened[..., :total]
            hidden = hidden | opened
            owner = torch.stack(
                [torch.repeat_interleave(m, s, output_size=x["slot"].shape[1]) for s in fixed["size"]]
            )
            reads = opened.gather(2, owner[:, None].expand(-1, length, -1))
            direct = torch.einsum("bihl,bsl->bhis", q, x["slot"])
            if fixed["shift"] is not None:
                direct = direct + fixed["shift"].to(dtype)
            scores.append(direct.masked_fill(~reads[:, None], -torch.inf))
            values.append(x["slot"])
        scores.append(summary.masked_fill(hidden[:, None], -torch.inf))
        values.append(x["group"])
    if "sink" in x:
        rows = scores[0].shape[:3]
        scores.append(x["sink"].to(dtype)[:, None, None].expand(*rows, 1))
        values.append(torch.zeros_like(latent[:, :1]))
    prob = torch.cat(scores, -1).softmax(-1)
    return torch.einsum("bhij,bjc->bihc", prob, torch.cat(values, 1)[..., :content])


def kernels(x: dict, fixed: dict, options: dict) -> torch.Tensor:
    """The Triton backend through the public op."""
    from coga.kernels import dispatch

    far = far_of(x, fixed)
    options = options | dict(alpha_H=x.get("alpha"), sink_H=x.get("sink"), far=far)
    return dispatch.attend(x["q"], x["latent"], **options, backend="triton")[0]


def results(run, x: dict, fixed: dict, options: dict, grad: torch.Tensor, dtype: torch.dtype) -> dict:
    """Output and gradients of one implementation, in float64."""
    wide = dtype == torch.float64
    x = {k: (v.detach().double() if wide else v.detach()).clone().requires_grad_() for k, v in x.items()}
    if wide:
        fixed = {k: v.double() if k == "log_size" else v for k, v in fixed.items()}
    out = run(x, fixed, options)
    found = torch.autograd.grad(out, list(x.values()), grad.to(out.dtype))
    return {"out": out.detach().double()} | {k: v.double() for k, v in zip(x, found)}


def ratios(length, dtype, **shape) -> dict[str, tuple[float, float]]:
    """For the output and each gradient: error of Triton and of plain PyTorch, relative to the norm."""
    x, fixed, options = scene(length, dtype=dtype, **shape)
    g = torch.Generator().manual_seed(1)
    rows = (*x["q"].shape[:3], options["content"])
    grad = torch.randn(rows, generator=g).to("cuda", dtype)
    truth = results(plain, x, fixed, options, grad, torch.float64)
    ours = results(kernels, x, fixed, options, grad, dtype)
    theirs = results(plain, x, fixed, options, grad, dtype)
    error = {}
    for name, value in truth.items():
        norm = value.norm().clamp_min(1e-30)
        error[name] = tuple(float((found[name] - value).norm() / norm) for found in (ours, theirs))
    return error


# Pairwise over heads, widths, group sizes, windows, opened groups, capacity and lengths.
SHAPES = {
    "plain": dict(length=1025, heads=12),
    "one-token": dict(length=1, batch=64),  # rows enough that luck evens out
    "63-one-head": dict(length=63, heads=1, content=32, rotary=0),
    "111-small-groups": dict(length=111, heads=8, content=32, rotary=16, window=16, size=8, count=1, band=16),
    "batch-wide": dict(length=389, batch=2, heads=16, content=128, rotary=64, count=16),
    "content-256": dict(length=645, heads=3, content=256, rotary=32, count=2),
    "heads-32-capacity": dict(length=517, heads=32, size=16, capacity=1.5, rotary=16),
    "window-512": dict(length=1541, heads=3, window=512, size=64, count=3),
    "groups-of-128": dict(length=1541, heads=12, window=512, size=128, count=2),
    "window-1024-all-opened": dict(length=3077, heads=1, window=1024, size=64, count=1000),
    "nothing-opened": dict(length=1025, heads=3, count=0, band=0, sink=False),
    "opened-shifted": dict(length=1025, heads=3, size=16, shift=-2.5),
    "full": dict(length=1025, heads=3, window=None, band=64),
    "band-is-window": dict(length=700, heads=3, band=128, content=32, rotary=64, size=8),
}


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
@pytest.mark.parametrize("name", SHAPES)
def test_error_at_most_twice_plain(name, dtype):
    for key, (ours, theirs) in ratios(**SHAPES[name], dtype=dtype).items():
        assert ours <= 2 * theirs + FLOOR[dtype], f"{key}: {ours:.2e}, plain {theirs:.2e}"


def test_same_bits_twice():
    x, fixed, options = scene(1025, heads=12)
    grad = torch.randn(1, 1025, 12, 64, device="cuda", dtype=torch.bfloat16)
    first, second = (results(kernels, x, fixed, options, grad, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_long_sequence_equals_reference():
    """32,768 tokens against the chunked reference in float32."""
    from coga.kernels import triton_ops

    x, fixed, options = scene(32768, heads=4, window=512, count=16)
    x = {k: v.detach() for k, v in x.items()}
    options = options | dict(alpha_H=x["alpha"], sink_H=x["sink"], far=far_of(x, fixed))
    out, lse = triton_ops.attend(x["q"], x["latent"], **options)
    wide = {k: v.float() for k, v in x.items()}
    options["far"] = far_of(wide, fixed)
    truth, lse_ref = reference.attend(wide["q"], wide["latent"], **options)
    assert (out - truth).norm() / truth.norm() < 4e-3
    torch.testing.assert_close(lse, lse_ref, rtol=0, atol=2e-3)
