"""The one place that chooses a backend: custom ops `coga::...` with reference and Triton bodies.

Models call `attend`, `group_attend`, `select`, `select_members`, `refine`, `assign` and `permute` here and
never ask which hardware they are on. Each op has a fake, and autograd where it has a gradient (choosing
and `refine` have none), so `torch.compile(fullgraph=True)` and `opcheck` pass. On a CPU, or with
backend="reference", the body is plain PyTorch (`coga.kernels.reference`, `capacity`, `refine`); on CUDA it is
Triton. What has a Triton body only is in `coga.kernels.fused`.

Legend: B batch, T tokens, H heads, C content width, L = C + P, M groups, G groups in a window, K opened.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from coga.kernels import capacity, reference
from coga.kernels import refine as plain_refine
from coga.types import Far

__all__ = [
    "assign",
    "attend",
    "group_attend",
    "permute",
    "refine",
    "resolve_backend",
    "select",
    "select_members",
]


# Asked once, at import: a graph that torch.compile traces may hold no question to the operating system.
_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve_backend(backend: str, device: torch.device) -> str:
    """ "reference" or "triton" for a request and a device; ValueError where triton cannot run."""
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend={backend!r}: must be one of auto, reference, triton")
    possible = _TRITON and (device.type == "cuda" or _INTERPRETING)
    if backend == "triton" and not possible:
        raise ValueError(f"backend='triton': needs a CUDA device and the triton package, got device {device}")
    if backend == "auto":
        return "triton" if possible and device.type == "cuda" else "reference"
    return backend


def _bodies(backend: str, device: torch.device):
    """Module that holds the op bodies. Imported late: triton is absent outside Linux."""
    if resolve_backend(backend, device) == "reference":
        return reference
    from coga.kernels import triton_ops

    return triton_ops


def _far(group, log_size, far_bias, slot, offset, size, open_groups, shift, groups, slots) -> Far | None:
    if size is None:
        return None
    return Far(
        group_BML=group,
        log_size_BM=log_size,
        far_bias_H=far_bias,
        slot_BSL=slot,
        offset_BM=offset,
        size_BM=size,
        open_BTK=open_groups,
        groups=groups,
        slots=slots,
        open_shift=shift,
    )


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------------------------- attend

NAMES = ("q", "latent", "alpha", "sink", "group", "far_bias", "slot")  # inputs that have a gradient


@torch.library.custom_op("coga::attend", mutates_args=())
def _attend(
    q: Tensor,
    latent: Tensor,
    alpha: Tensor | None,
    sink: Tensor | None,
    group: Tensor | None,
    far_bias: Tensor | None,
    slot: Tensor | None,
    log_size: Tensor | None,
    offset: Tensor | None,
    size: Tensor | None,
    open_groups: Tensor | None,
    shift: Tensor | None,
    content: int,
    window: int,
    band: int,
    groups: int,
    slots: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    far = _far(group, log_size, far_bias, slot, offset, size, open_groups, shift, groups, slots)
    out, lse = _bodies(backend, q.device).attend(
        q,
        latent,
        content=content,
        window=window or None,
        band=band,
        alpha_H=alpha,
        sink_H=sink,
        far=far,
    )
    return out.contiguous(), lse.contiguous()


@_attend.register_fake
def _(q, latent, alpha, sink, group, far_bias, slot, log_size, offset, size, opened, shift, content, *rest):
    rows = q.shape[:3]
    return q.new_empty(*rows, content), q.new_empty(rows, dtype=_wide_dtype(q.dtype))


@torch.library.custom_op("coga::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    latent: Tensor,
    alpha: Tensor | None,
    sink: Tensor | None,
    group: Tensor | None,
    far_bias: Tensor | None,
    slot: Tensor | None,
    log_size: Tensor | None,
    offset: Tensor | None,
    size: Tensor | None,
    open_groups: Tensor | None,
    shift: Tensor | None,
    content: int,
    window: int,
    band: int,
    groups: int,
    slots: int,
    backend: str,
) -> list[Tensor]:
    far = _far(group, log_size, far_bias, slot, offset, size, open_groups, shift, groups, slots)
    options = dict(content=content, window=window or None, band=band, alpha_H=alpha, sink_H=sink, far=far)
    grads = _bodies(backend, q.device).attend_backward(grad, out, lse, q, latent, **options)
    inputs = dict(zip(NAMES, (q, latent, alpha, sink, group, far_bias, slot), strict=True))
    return [
        grads[name].to(x.dtype).contiguous() if name in grads else torch.zeros_like(x)
        for name, x in inputs.items()
        if x is not None
    ]


@_attend_backward.register_fake
def _(grad, out, lse, q, latent, alpha, sink, group, far_bias, slot, *rest):
    inputs = (q, latent, alpha, sink, group, far_bias, slot)
    return [x.new_empty(x.shape) for x in inputs if x is not None]


def _attend_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *inputs[:12])
    ctx.rest = inputs[12:]


def _attend_autograd(ctx, grad, _grad_lse):
    out, lse, *saved = ctx.saved_tensors
    grads = iter(_attend_backward(grad.contiguous(), out, lse, *saved, *ctx.rest))
    found = [None if x is None else next(grads) for x in saved[: len(NAMES)]]
    return (*found, *[None] * (5 + len(ctx.rest)))


_attend.register_autograd(_attend_autograd, setup_context=_attend_setup)


def attend(
    q_BTHL: Tensor,
    latent_BTL: Tensor,
    *,
    content: int,
    window: int | None = None,
    band: int = 0,
    alpha_H: Tensor | None = None,
    sink_H: Tensor | None = None,
    far: Far | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`reference.attend` with a backend and a memory-bounded backward; the log-sum-exp has no gradient."""
    resolve_backend(backend, q_BTHL.device)
    if band == 0:
        alpha_H = None
    parts: tuple = (None,) * 8
    groups = slots = 0
    if far is not None and far.total:
        groups, slots = far.groups, far.slots
        parts = (
            far.group_BML,
            far.far_bias_H,
            far.slot_BSL,
            far.log_size_BM,
            far.offset_BM,
            far.size_BM,
            far.open_BTK,
            None if far.open_shift is None else far.open_shift.detach(),
        )
    return _attend(
        q_BTHL, latent_BTL, alpha_H, sink_H, *parts, content, window or 0, band, groups, slots, backend
    )


# --------------------------------------------------------------------------------------- group attend


@torch.library.custom_op("coga::group_attend", mutates_args=())
def _group_attend(
    q: Tensor, latent: Tensor, log_size: Tensor, alpha: Tensor | None, content: int, groups: int, backend: str
) -> tuple[Tensor, Tensor]:
    window = torch.arange(q.shape[1], device=q.device) // groups
    out, lse = _bodies(backend, q.device).group_attend(
        q, window, latent, log_size, content=content, groups=groups, alpha_H=alpha
    )
    return out.contiguous(), lse.contiguous()


@_group_attend.register_fake
def _(q, latent, log_size, alpha, content, groups, backend):
    rows = q.shape[:3]
    return q.new_empty(*rows, content), q.new_empty(rows, dtype=_wide_dtype(q.dtype))


@torch.library.custom_op("coga::group_attend_backward", mutates_args=())
def _group_attend_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    latent: Tensor,
    log_size: Tensor,
    alpha: Tensor | None,
    content: int,
    groups: int,
    backend: str,
) -> list[Tensor]:
    found = _bodies(backend, q.device).group_attend_backward(
        grad, out, lse, q, latent, log_size, content=content, groups=groups, alpha_H=alpha
    )
    inputs = {"q": q, "latent": latent, "alpha": alpha}
    return [found[n].to(x.dtype).contiguous() for n, x in inputs.items() if x is not None]


@_group_attend_backward.register_fake
def _(grad, out, lse, q, latent, log_size, alpha, *rest):
    return [x.new_empty(x.shape) for x in (q, latent, alpha) if x is not None]


def _group_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *inputs[:4])
    ctx.rest = inputs[4:]


def _group_autograd(ctx, grad, _grad_lse):
    out, lse, q, latent, log_size, alpha = ctx.saved_tensors
    grads = _group_attend_backward(grad.contiguous(), out, lse, q, latent, log_size, alpha, *ctx.rest)
    return grads[0], grads[1], None, grads[2] if alpha is not None else None, None, None, None


_group_attend.register_autograd(_group_autograd, setup_context=_group_setup)


def group_attend(
    q_BMHL: Tensor,
    latent_BML: Tensor,
    log_size_BM: Tensor,
    *,
    content: int,
    groups: int,
    alpha_H: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`reference.group_attend` of all groups of a sequence, with a memory-bounded backward."""
    return _group_attend(q_BMHL, latent_BML, log_size_BM, alpha_H, content, groups, backend)


# --------------------------------------------------------------------------------------------- select


@torch.library.custom_op("coga::select", mutates_args=())
def _select(
    index_q: Tensor,
    group: Tensor,
    log_size: Tensor,
    count: int,
    window: int,
    groups: int,
    step: float,
    backend: str,
) -> Tensor:
    position = torch.arange(index_q.shape[1], device=index_q.device)
    return (
        _bodies(backend, index_q.device)
        .select(index_q, position, group, log_size, count=count, window=window, groups=groups, step=step)
        .contiguous()
    )


@_select.register_fake
def _(index_q, group, log_size, count, *rest):
    keep = min(count, group.shape[1])
    return index_q.new_empty(*index_q.shape[:2], keep, dtype=torch.int64)


def select(
    index_q_BTL: Tensor,
    group_BML: Tensor,
    log_size_BM: Tensor,
    *,
    count: int,
    window: int,
    groups: int,
    backend: str = "auto",
) -> Tensor:
    """`reference.select` for a whole sequence from position 0; no gradient."""
    step = reference.rounding_step(index_q_BTL.dtype)
    tensors = index_q_BTL.detach(), group_BML.detach(), log_size_BM
    return _select(*tensors, count, window, groups, step, backend)


@torch.library.custom_op("coga::select_members", mutates_args=())
def _select_members(
    index_q: Tensor,
    slot: Tensor,
    offset: Tensor,
    size: Tensor,
    count: int,
    window: int,
    groups: int,
    slots: int,
    step: float,
    backend: str,
) -> Tensor:
    position = torch.arange(index_q.shape[1], device=index_q.device)
    options = dict(count=count, window=window, groups=groups, slots=slots, step=step)
    body = _bodies(backend, index_q.device).select_members
    return body(index_q, position, slot, offset, size, **options).contiguous()


@_select_members.register_fake
def _(index_q, slot, offset, size, count, *rest):
    keep = min(count, offset.shape[1])
    return index_q.new_empty(*index_q.shape[:2], keep, dtype=torch.int64)


def select_members(
    index_q_BTL: Tensor,
    slot_BSL: Tensor,
    offset_BM: Tensor,
    size_BM: Tensor,
    *,
    count: int,
    window: int,
    groups: int,
    slots: int,
    backend: str = "auto",
) -> Tensor:
    """`reference.select_members` for a whole sequence from position 0; no gradient."""
    step = reference.rounding_step(index_q_BTL.dtype)
    slot = slot_BSL.detach().to(index_q_BTL.dtype)
    numbers = count, window, groups, slots, step
    return _select_members(index_q_BTL.detach(), slot, offset_BM, size_BM, *numbers, backend)


# --------------------------------------------------------------------------------------------- refine


@torch.library.custom_op("coga::refine", mutates_args=())
def _refine(unit: Tensor, prototype: Tensor, beta: float, steps: int, backend: str) -> Tensor:
    plain = resolve_backend(backend, unit.device) == "reference"
    body = plain_refine if plain else _bodies(backend, unit.device)
    return body.refine(unit, prototype, beta, steps).contiguous()


@_refine.register_fake
def _(unit, prototype, beta, steps, backend):
    return unit.new_empty(*unit.shape[:2], *prototype.shape[-2:])


def refine(unit_BNWC: Tensor, prototype: Tensor, beta: float, steps: int, *, backend: str = "auto") -> Tensor:
    """`coga.kernels.refine.refine`: centroids (B, N, G, C) after `steps` soft k-means steps; no gradient."""
    return _refine(unit_BNWC.detach(), prototype.detach(), beta, steps, backend)


# --------------------------------------------------------------------------------------------- assign


@torch.library.custom_op("coga::assign", mutates_args=())
def _assign(score: Tensor, slots: int, step: float, backend: str) -> Tensor:
    if resolve_backend(backend, score.device) == "reference":
        return capacity.assign(score, slots, step)
    return _bodies(backend, score.device).assign(score, slots, step)


@_assign.register_fake
def _(score, slots, step, backend):
    return score.new_empty(score.shape[:-1], dtype=torch.int64)


def assign(score_NWG: Tensor, slots: int, *, backend: str = "auto") -> Tensor:
    """`capacity.assign`: group (N, W) of each token, at most `slots` tokens a group; no gradient."""
    step = reference.rounding_step(score_NWG.dtype)
    return _assign(score_NWG.detach().contiguous(), slots, step, backend)


# -------------------------------------------------------------------------------------------- permute


class _Permute(torch.autograd.Function):
    """Reorder rows; the backward reads the inverse permutation, so nothing is summed in a race."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.gather(1, order[..., None].expand(*order.shape, x.shape[-1]))

    @staticmethod
    def backward(ctx, grad: Tensor):
        (order,) = ctx.saved_tensors
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        inverse = torch.zeros_like(order).scatter(1, order, place)
        return grad.gather(1, inverse[..., None].expand_as(grad)), None


def permute(x_BSL: Tensor, order_BS: Tensor) -> Tensor:
    """Rows of x in the given order; `order_BS` must be a permutation of each row's positions."""
    return _Permute.apply(x_BSL, order_BS)
