"""Inputs and plain twins that the interpreter's checks and the GPU tests of a kernel share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def value_scene(
    heads, content, width, length, batch=1, gated=True, dtype=torch.float32, device="cpu"
) -> list:
    """mixed, up, gate (or None) and the gradient of y."""
    torch.manual_seed(heads)
    mixed = torch.randn(batch, length, heads, content, device=device)
    up = torch.randn(heads, content, width, device=device) / content**0.5
    gate, dy = (2 * torch.randn(batch, length, heads * width, device=device) for _ in range(2))
    return [x if x is None else x.to(dtype) for x in (mixed, up, gate if gated else None, dy)]


def plain_values(mixed: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
    y = torch.einsum("bthc,hce->bthe", mixed, up).flatten(2)
    return y if gate is None else y * torch.sigmoid(gate)


def run_values(body, mixed, up, gate, dy) -> list[Tensor]:
    """y, then the gradients of mixed, up and, where there is one, the gate."""
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in (mixed, up, gate)]
    y = body(*inputs)
    found = [y.detach(), *torch.autograd.grad(y, [x for x in inputs if x is not None], dy)]
    assert all(x.dtype == mixed.dtype for x in found)
    return found


def clusters(batch, windows, width, groups, content, seed=0, device="cpu") -> tuple[Tensor, Tensor]:
    """Contents of a few clusters with one token of zeros, and prototypes of which one is far from all."""
    on = dict(generator=torch.Generator(device).manual_seed(seed), device=device)
    count = 24 if device == "cuda" else 5
    centre = torch.randn(count, content, **on)
    label = torch.randint(count, (batch, windows, width), **on)
    x = centre[label] + 0.5 * torch.randn(batch, windows, width, content, **on)
    x[..., 0] = 1.0
    x[:, :, width // 2] = 0
    prototype = torch.randn(groups, content, **on)
    prototype[-1] = 0
    prototype[-1, 0] = -3
    return normalize(x, dim=-1, eps=0.1), prototype


def relative_error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())
