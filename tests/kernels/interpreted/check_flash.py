"""Whole grouped attention in Triton against `coga.kernels.reference`, run by `test_triton_flash.py`.

The parts, their merging, the bounds of windows and bands, the opened bits and every gradient, in float32.
"""

from __future__ import annotations

import pytest
import torch

from coga.kernels import dispatch, reference, triton_flash_backward, triton_ops
from coga.kernels.triton_flash import opened_bits
from coga.kernels.triton_flash_backward import keys_gradient
from coga.types import Far


def case(
    batch=1,
    length=23,
    heads=2,
    content=16,
    rotary=16,
    window=8,
    groups=2,
    count=2,
    band=3,
    sink=True,
    empty=False,
    shift=None,
    summaries=True,
    seed=0,
):
    """Latents, groups of random members and random opened groups of a sequence of closed windows."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    width = content + rotary
    q, latent = draw(batch, length, heads, width) / width**0.25, draw(batch, length, width) / width**0.25
    options = dict(content=content, window=window, band=band)
    options |= dict(alpha_H=draw(heads) if band else None, sink_H=draw(heads) if sink else None)
    far = None
    windows = length // window if window else 0
    if groups and windows:
        total = windows * groups
        index = torch.randint(0, groups, (batch, windows, window), generator=g)
        if empty:
            index[:, 0] = 0
        flat = (index + torch.arange(windows)[:, None] * groups).flatten(1)
        size = torch.zeros(batch, total, dtype=torch.int64).scatter_add_(1, flat, torch.ones_like(flat))
        offset = size.cumsum(1) - size
        order = flat.argsort(dim=1, stable=True)
        slot = latent[:, : windows * window].gather(1, order[..., None].expand(-1, -1, width)).clone()
        visible = reference.visible_groups(torch.arange(length), window, groups)
        score = torch.rand(batch, length, total, generator=g)
        score = score.masked_fill(torch.arange(total) >= visible[:, None], -1)
        best, ids = score.topk(min(count, total), -1)
        ids = torch.where(best < 0, total, ids).sort(-1).values
        ids = torch.where(ids == total, -1, ids)
        far = Far(
            group_BML=draw(batch, total, width) / width**0.25 if summaries else None,
            log_size_BM=size.float().log() if summaries else None,
            far_bias_H=draw(heads) if summaries else None,
            offset_BM=offset,
            size_BM=size,
            slot_BSL=slot if count else None,
            open_BTK=ids if count else None,
            groups=groups,
            slots=window,
            open_shift=None if shift is None else torch.tensor(shift),
        )
    return q, latent, options | dict(far=far)


CASES = {
    "plain": dict(),
    "two-rows-three-heads": dict(batch=2, heads=3, length=37),
    "no-far": dict(groups=0, length=41),
    "far-unopened": dict(count=0, length=41),
    "all-opened": dict(count=12, length=41),
    "full-causal": dict(window=None, groups=0, length=70),
    "full-causal-wide-band": dict(window=None, groups=0, length=70, band=50),
    "no-band-no-sink": dict(band=0, sink=False, length=41),
    "one-token": dict(length=1),
    "one-head-no-rotary": dict(heads=1, rotary=0, length=34),
    "odd-widths": dict(content=24, rotary=8, length=27),
    "whole-tiles": dict(window=32, groups=4, length=130, band=7, count=3),
    "many-groups": dict(window=8, groups=4, length=100, heads=1, count=3),
    "empty-groups": dict(empty=True, length=41),
    "shifted": dict(shift=-1.5, length=41),
    "opened-alone": dict(summaries=False, length=41),
    "opened-alone-shifted-no-band": dict(summaries=False, band=0, shift=-0.5, length=100, window=8),
    "window-below-tile-band-whole": dict(window=16, band=16, length=75, groups=2),
    "three-heads-tile-of-tokens": dict(window=64, band=9, length=150, groups=4, heads=3),
}


@pytest.mark.parametrize("length", [1, 512, 32768, 131072])
@pytest.mark.parametrize("programs", [1, 64, 960, 30720])
@pytest.mark.parametrize("heads", [1, 12, 32])
def test_no_sum_takes_too_many_rows(length, programs, heads):
    parts = triton_flash_backward._parts(programs, length * heads, 128)
    assert parts >= 1 and length * heads <= parts * triton_flash_backward.MOST_ROWS
    assert parts == 1 or parts * 128 <= length * heads


@pytest.mark.parametrize("name", CASES)
def test_attend(name):
    q, latent, options = case(**CASES[name])
    out, lse = triton_ops.attend(q, latent, **options)
    out_ref, lse_ref = reference.attend(q, latent, **options)
    torch.testing.assert_close(out, out_ref, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, lse_ref, rtol=1e-5, atol=1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    found = triton_ops.attend_backward(grad, out_ref, lse_ref, q, latent, **options)
    wanted = reference.attend_backward(grad, out_ref, lse_ref, q, latent, **options)
    wanted = {key: x for key, x in wanted.items() if key in found or x.any()}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_public_op():
    """The custom op runs forward and backward on the Triton bodies; no output shares memory with another."""
    q, latent, options = case(length=20)
    far = options["far"]
    leaves = [q, latent, options["alpha_H"], options["sink_H"], far.group_BML, far.far_bias_H, far.slot_BSL]
    for leaf in leaves:
        leaf.requires_grad_()
    grads = []
    for backend in ("triton", "reference"):
        out, _ = dispatch.attend(q, latent, **options, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for found, wanted in zip(*grads):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    group, log_size, alpha = far.group_BML, far.log_size_BM, options["alpha_H"]
    grads = []
    for backend in ("triton", "reference"):
        inputs = (q[:, : group.shape[1]], group, log_size)
        out, _ = dispatch.group_attend(*inputs, content=16, groups=2, alpha_H=alpha, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), [q, group, alpha]))
    for found, wanted in zip(*grads):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


GROUP_CASES = {
    "plain": dict(total=12, groups=4),
    "many": dict(total=75, groups=5, heads=3),
    "no-band": dict(total=40, groups=2, band=False),
    "one-window": dict(total=8, groups=8),
    "tile-of-windows": dict(total=100, groups=2, heads=1),
}


@pytest.mark.parametrize("name", GROUP_CASES)
def test_group_attend(name):
    batch, content, rotary = 2, 16, 16
    shape = dict(heads=2, band=True) | GROUP_CASES[name]
    total, heads, groups = shape["total"], shape["heads"], shape["groups"]
    g = torch.Generator().manual_seed(1)
    width = content + rotary
    q = torch.randn(batch, total, heads, width, generator=g) / width**0.25
    latent = torch.randn(batch, total, width, generator=g) / width**0.25
    log_size = torch.randint(0, 5, (batch, total), generator=g).float().log()
    log_size[1, : min(groups, total // 2)] = -torch.inf  # these queries have nothing to read
    alpha = torch.randn(heads, generator=g) if shape["band"] else None
    window = torch.arange(total) // groups
    options = dict(content=content, groups=groups, alpha_H=alpha)
    out, lse = triton_ops.group_attend(q, window, latent, log_size, **options)
    out_ref, lse_ref = reference.group_attend(q, window, latent, log_size, **options)
    torch.testing.assert_close(out, out_ref, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, lse_ref, rtol=1e-5, atol=1e-5)
    grad = torch.randn(out.shape, generator=g)
    inputs = (grad, out_ref, lse_ref, q, latent, log_size)
    found = triton_ops.group_attend_backward(*inputs, **options)
    wanted = reference.group_attend_backward(*inputs, **options)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_rows_with_nothing_to_read():
    q, latent, options = case(length=20, sink=False)
    out, lse = triton_ops.attend(q, latent, **options)
    lse[0, 4] = -torch.inf  # as if token 4 had read nothing
    grads = triton_ops.attend_backward(torch.ones_like(out), out, lse, q, latent, **options)
    assert all(x.isfinite().all() for x in grads.values())


def test_opened_bits():
    ids = torch.tensor([[[0, 31, 32], [5, 130, -1], [-1, -1, -1]]])
    bits = opened_bits(ids, 140)
    assert bits.shape[1] % 4 == 0
    group = torch.arange(140)
    found = (bits[0, group // 32] >> (group % 32)[:, None]) & 1
    for token in range(3):
        assert found[:, token].nonzero().flatten().tolist() == [m for m in ids[0, token].tolist() if m >= 0]


@pytest.mark.parametrize("mode", ["near", "far"])
def test_parts_change_nothing_but_rounding(mode):
    q, latent, options = case(length=75, heads=3, window=16)
    far = options["far"]
    out, lse = triton_ops.attend(q, latent, **options)
    inputs = (out, lse, lse * 0 + 0.1, q)
    if mode == "near":
        key, rest = latent, dict(mode=1, unit=16, band=3, alpha_H=options["alpha_H"])
    else:
        key = far.group_BML
        rest = dict(
            mode=3, unit=16, log_size_BN=far.log_size_BM, far_bias_H=far.far_bias_H, groups=far.groups
        )
        rest["bits"] = opened_bits(far.open_BTK, key.shape[1])
    whole = keys_gradient(*inputs, key, content=16, parts=1, **rest)
    for parts in (2, 3, 5):
        cut = keys_gradient(*inputs, key, content=16, parts=parts, **rest)
        torch.testing.assert_close(cut[0], whole[0], rtol=1e-5, atol=1e-5)
        if mode == "near":
            torch.testing.assert_close(cut[1], whole[1], rtol=0, atol=0)
