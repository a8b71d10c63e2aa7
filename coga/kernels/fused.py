"""Ops with a Triton body only: what enters attention and what leaves it, in one pass each.

The model asks `fuses_projections` and `fuses_values` first; where they say no (a CPU, the reference backend,
float64, widths without a kernel) it runs the plain lines beside the call (`coga.models.latent`).

Legend: B batch, T tokens, H heads, C content width, L = C + P, E = D/H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coga.kernels.dispatch import resolve_backend

__all__ = ["fuses_projections", "fuses_values", "gated_values", "project"]


# -------------------------------------------------------------------------------------------- project


# Any layout will do: told otherwise, Inductor copies x, whose rows it likes to pad.
_LAYOUT = (torch.Tag.flexible_layout,)


@torch.library.custom_op("coga::project", mutates_args=(), tags=_LAYOUT)
def _project(
    x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, index: Tensor | None, content: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from coga.kernels import triton_project

    cos, sin, gain = (t.contiguous() for t in (cos, sin, gain))
    index = None if index is None else index.contiguous()
    return triton_project.project(x, cos, sin, gain, index, content=content, eps=eps)


@_project.register_fake
def _(x, cos, sin, gain, index, content, eps):
    width = content + 2 * cos.shape[-1]
    extra = x.shape[-1] // width - len(gain)
    rows = x.shape[:2]
    return x.new_empty(*rows, len(gain), width), x.new_empty(*rows, extra * width), x.new_empty(*rows, width)


@torch.library.custom_op("coga::project_backward", mutates_args=(), tags=_LAYOUT)
def _project_backward(
    dq: Tensor,
    dlatent: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    content: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    from coga.kernels import triton_project

    dq, dlatent, cos, sin, gain = (t.contiguous() for t in (dq, dlatent, cos, sin, gain))
    dx, dgain = triton_project.project_backward(dq, dlatent, x, cos, sin, gain, content=content, eps=eps)
    return dx, dgain.to(gain.dtype)


@_project_backward.register_fake
def _(dq, dlatent, x, cos, sin, gain, content, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(gain)


def _project_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[5:]


def _project_autograd(ctx, dq, dlatent, _dindex):
    dx, dgain = _project_backward(dq, dlatent, *ctx.saved_tensors, *ctx.rest)
    return dx, None, None, dgain, None, None, None


_project.register_autograd(_project_autograd, setup_context=_project_setup)


def fuses_projections(backend: str, x: Tensor) -> bool:
    """Whether `project` has a kernel: Triton, and a dtype below float64."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    return x.dtype in kinds and x.numel() > 0 and resolve_backend(backend, x.device) == "triton"


def project(
    x_BTX: Tensor,
    table: tuple[Tensor, Tensor],
    gain_H: Tensor,
    index_H: Tensor | None,
    *,
    content: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`triton_project.project`, where `fuses_projections`; the index query has no gradient."""
    return _project(x_BTX, *table, gain_H, index_H, content, eps)


# --------------------------------------------------------------------------------------- gated values


@torch.library.custom_op("coga::gated_values", mutates_args=(), tags=_LAYOUT)
def _gated_values(mixed: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
    from coga.kernels import triton_values

    gate = None if gate is None else gate.contiguous()
    return triton_values.gated_values(mixed.contiguous(), up.contiguous(), gate)


@_gated_values.register_fake
def _(mixed, up, gate):
    return mixed.new_empty(*mixed.shape[:2], up.shape[0] * up.shape[2])


@torch.library.custom_op("coga::gated_values_backward", mutates_args=(), tags=_LAYOUT)
def _gated_values_backward(dy: Tensor, mixed: Tensor, up: Tensor, gate: Tensor | None) -> list[Tensor]:
    from coga.kernels import triton_values

    gate = None if gate is None else gate.contiguous()
    dy, mixed, up = (t.contiguous() for t in (dy, mixed, up))
    dmixed, dup, dgate = triton_values.gated_values_backward(dy, mixed, up, gate)
    return [dmixed, dup.to(up.dtype), *([] if dgate is None else [dgate])]


@_gated_values_backward.register_fake
def _(dy, mixed, up, gate):
    return [x.new_empty(x.shape) for x in (mixed, up, gate) if x is not None]


def _values_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _values_autograd(ctx, dy):
    dmixed, dup, *dgate = _gated_values_backward(dy, *ctx.saved_tensors)
    return dmixed, dup, dgate[0] if dgate else None


_gated_values.register_autograd(_values_autograd, setup_context=_values_setup)


def _padded(width: int) -> int:
    """The width of a tile."""
    return max(16, 1 << (width - 1).bit_length())


def fuses_values(backend: str, mixed_BTHC: Tensor, up_HCE: Tensor, gate_BTD: Tensor | None) -> bool:
    """Whether `gated_values` has a kernel: as for `project`, one dtype, and widths that fit in registers."""
    if any(x is not None and x.dtype != mixed_BTHC.dtype for x in (up_HCE, gate_BTD)):
        return False
    content, width = (_padded(x) for x in up_HCE.shape[1:])
    most = 64 * 64 if mixed_BTHC.dtype == torch.float32 else 128 * 128
    fits = content * width <= most and content <= 256 and width <= 128
    return fits and fuses_projections(backend, mixed_BTHC)


def gated_values(mixed_BTHC: Tensor, up_HCE: Tensor, gate_BTD: Tensor | None) -> Tensor:
    """`triton_values.gated_values`, where `fuses_values`: (B, T, D), sigmoid(gate) times mixed_h up_h."""
    return _gated_values(mixed_BTHC, up_HCE, gate_BTD)
