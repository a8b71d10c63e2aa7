"""Opened groups, selection and assignment on a CUDA device, against PyTorch.

The kernel's error against float64 is at most twice the error of plain PyTorch in the same dtype. In float32
the parts of the attention merge through a log-sum-exp of magnitude 4 to 16, whose own last place is 1e-6:
that is the floor of the comparison.
"""

from __future__ import annotations

import pytest
import torch

from coga.kernels import capacity, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FLOOR = {torch.bfloat16: 0.0, torch.float16: 0.0, torch.float32: 1e-6}
LOGIT, VALUE = 0.3, 0.7  # a constant stands for the other parts of the softmax

# batch, length, heads, content, rotary, groups, slots, opened, all groups full
SHAPES = {
    "main": (2, 300, 12, 64, 32, 40, 32, 16, True),
    "capacity-1.5": (2, 300, 12, 64, 32, 40, 48, 16, False),
    "one-head-all-opened": (1, 111, 1, 128, 32, 20, 8, 20, False),
    "32-heads-one-opened": (1, 63, 32, 64, 64, 20, 64, 1, False),
    "wide": (1, 111, 16, 256, 32, 30, 16, 8, False),
    "no-rotary": (2, 65, 3, 32, 0, 12, 12, 12, False),
    "many-slots": (1, 65, 8, 128, 16, 9, 96, 5, False),
}


def case(batch, length, heads, content, rotary, groups, slots, count, full, dtype, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    on = dict(generator=g, device="cuda")
    width = content + rotary
    size = torch.randint(slots if full else 0, slots + 1, (batch, groups), **on)
    offset = size.cumsum(1) - size
    q, slot = (
        (torch.randn(*shape, width, **on) * 1.5 / width**0.25).to(dtype)
        for shape in ((batch, length, heads), (batch, max(1, int(size.sum(1).max()))))
    )
    chosen = torch.rand(batch, length, groups, **on).argsort(-1)[..., :count].sort(-1).values
    keep = torch.randint(0, count + 1, (batch, length), **on)
    keep[:, ::2] = count
    keep[:, 1] = 0
    chosen = torch.where(torch.arange(count, device="cuda") < keep[..., None], chosen, -1)
    return q, slot, offset, size, chosen


def plain(q, slot, offset, size, chosen, content, slots):
    """Output of the whole softmax and log-sum-exp of the opened part, in the dtype of q."""
    flat = chosen.clamp_min(0).flatten(1)
    start, members = (x.gather(1, flat).view(chosen.shape)[..., None] for x in (offset, size))
    place = torch.arange(slots, device="cuda")
    mask = (place < members) & (chosen >= 0)[..., None]
    index = torch.where(mask, start + place, 0).flatten(1)
    member = slot.gather(1, index[..., None].expand(-1, -1, slot.shape[-1]))
    member = member.view(*chosen.shape[:2], -1, slot.shape[-1])
    score = (q @ member.transpose(-1, -2)).masked_fill(~mask.flatten(2)[:, :, None], -torch.inf)
    prob = torch.cat([score, torch.full_like(score[..., :1], LOGIT)], -1).softmax(-1)
    return prob[..., :-1] @ member[..., :content] + prob[..., -1:] * VALUE, score.logsumexp(-1)


def error(x, exact) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", SHAPES)
def test_error_is_at_most_twice_that_of_pytorch(name, dtype):
    from coga.kernels.triton_opened import opened_backward, opened_forward

    shape = SHAPES[name]
    content, slots = shape[3], shape[6]
    inputs = case(*shape, dtype)
    rest = inputs[2:]
    grad = torch.randn(*inputs[0].shape[:3], content, device="cuda").to(dtype)
    exact = [x.double().requires_grad_() for x in inputs[:2]]
    same = [x.clone().requires_grad_() for x in inputs[:2]]
    out_exact, lse_exact = plain(*exact, *rest, content, slots)
    out_same, _ = plain(*same, *rest, content, slots)
    out_exact.backward(grad.double())
    out_same.backward(grad)

    torch.use_deterministic_algorithms(True)  # also fills fresh allocations with NaN
    try:
        out, lse = opened_forward(*inputs, content=content, slots=slots)
        final = torch.logaddexp(lse, torch.full_like(lse, LOGIT))
        share = torch.exp(lse - final)[..., None]
        merged = (out.float() * share + torch.exp(LOGIT - final)[..., None] * VALUE).to(dtype)
        delta = (merged.float() * grad.float()).sum(-1)
        backward = [
            opened_backward(grad, final, delta, *inputs, content=content, slots=slots) for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(lse.isinf(), lse_exact.isinf())
    assert (out[lse.isinf()] == 0).all()
    for first, second in zip(*backward, strict=True):
        assert torch.equal(first, second)
    found = (merged, *(x.to(dtype) for x in backward[0]))
    wanted = (out_exact, *(x.grad for x in exact))
    other = (out_same, *(x.grad for x in same))
    for label, x, right, pytorch in zip(("out", "q", "slot"), found, wanted, other, strict=True):
        assert error(x, right) <= 2 * error(pytorch, right) + FLOOR[dtype], label


@pytest.mark.parametrize(
    ("groups", "capacity", "count"), [(16, 1, 4), (8, 1, 3), (4, 1, 2), (64, 1, 16), (16, 2, 5)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
def test_selection_by_members_differs_only_below_the_rounding_step(dtype, groups, capacity, count):
    from coga.kernels.triton_select_members import select_members

    length, window, width = 3 * 512 + 5 + 2048, 512, 96
    g = torch.Generator("cuda").manual_seed(count)
    windows = length // window
    q = torch.randn(2, length, width, generator=g, device="cuda").to(dtype)
    slot = torch.randn(2, windows * window, width, generator=g, device="cuda").to(dtype)
    size = torch.full((2, windows, groups), window // groups, device="cuda")
    if capacity > 1:
        size[..., 0] += window // groups // 2
        size[..., 1] -= window // groups // 2
    size = size.flatten(1)
    offset, step = size.cumsum(1) - size, reference.rounding_step(dtype)
    options = dict(count=count, window=window, groups=groups, slots=int(size.max()), step=step)
    inputs = (q, torch.arange(length, device="cuda"), slot, offset, size)
    chosen, wanted = select_members(*inputs, **options), reference.select_members(*inputs, **options)
    assert torch.equal(chosen >= 0, wanted >= 0)
    owner = torch.repeat_interleave(torch.arange(windows * groups, device="cuda"), size[0])
    member = q.double() @ slot.double().transpose(1, 2)
    score = member.new_full((2, length, windows * groups), -torch.inf)
    score = score.scatter_reduce(2, owner.expand_as(member), member, "amax")
    ours, theirs = (
        score.gather(2, x.clamp_min(0)).masked_fill(x < 0, 0).sort(-1).values for x in (chosen, wanted)
    )
    assert (ours - theirs).abs().max() <= step * 1.01
    assert (chosen != wanted).any(-1).float().mean() < 0.01


@pytest.mark.parametrize("width", [160, 288, 384, 576])
def test_selection_by_members_runs_at_any_width(width):
    from coga.kernels.triton_select_members import select_members

    q = torch.randn(1, 2048, width, device="cuda", dtype=torch.bfloat16)
    size = torch.full((1, 64), 32, device="cuda")
    options = dict(count=4, window=512, groups=16, slots=32, step=reference.rounding_step(torch.bfloat16))
    inputs = (q, torch.arange(2048, device="cuda"), q, size.cumsum(1) - size, size)
    chosen, wanted = select_members(*inputs, **options), reference.select_members(*inputs, **options)
    assert torch.equal(chosen >= 0, wanted >= 0)
    assert (chosen != wanted).any(-1).float().mean() < 0.01


@pytest.mark.parametrize("count", [1, 5, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
def test_selection_differs_only_below_the_rounding_step(dtype, count):
    from coga.kernels.triton_select import select

    length, window, groups, width = 3 * 512 + 5 + 4096, 512, 16, 96
    g = torch.Generator("cuda").manual_seed(count)
    total = length // window * groups
    q = torch.randn(2, length, width, generator=g, device="cuda").to(dtype) * 0.5
    group = torch.randn(2, total, width, generator=g, device="cuda").to(dtype)
    size = torch.randint(0, 40, (2, total), generator=g, device="cuda")
    step = reference.rounding_step(dtype)
    options = dict(count=count, window=window, groups=groups, step=step)
    inputs = (q, torch.arange(length, device="cuda"), group, size.float().log())
    chosen, wanted = select(*inputs, **options), reference.select(*inputs, **options)
    assert torch.equal(chosen >= 0, wanted >= 0)
    score = q.double() @ group.double().transpose(1, 2) + size.double().log()[:, None]
    ours, theirs = (
        score.gather(2, x.clamp_min(0)).masked_fill(x < 0, 0).sort(-1).values for x in (chosen, wanted)
    )
    assert (ours - theirs).abs().max() <= step * 1.01
    assert (chosen != wanted).any(-1).float().mean() < 0.01


@pytest.mark.parametrize(
    ("windows", "width", "groups", "slots"),
    [
        (8, 512, 16, 32),
        (8, 512, 16, 48),
        (4, 1024, 32, 32),
        (8, 128, 4, 32),
        (4, 512, 64, 8),
        (2, 1024, 128, 8),
    ],
)
@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
def test_assignment_is_the_reference_exactly(windows, width, groups, slots, ties):
    from coga.kernels.triton_assign import assign

    score = torch.randn(windows, width, groups, device="cuda")
    if ties:
        score = (score * 2).round() / 4
    step = reference.rounding_step(torch.float32)
    assert torch.equal(assign(score, slots, step), capacity.assign(score, slots, step))
