"""The one place that chooses a backend: custom ops `coga::...` with reference and Triton bodies.

Models call `attend`, `group_attend`, `select`, `select_members`, `refine`, `assign`, `permute`, `project` and
`gated_values` here and never ask which hardware they are on. Each op has a fake, and autograd where it has a
gradient (`refine`, `select` and `assign` have none), so `torch.compile(fullgraph=True)` and `opcheck` pass.
On a CPU, or with backend="reference", the body is plain PyTorch (`coga.kernels.reference`, `capacity`,
`refine`); on CUDA it is Triton. `project` and `gated_values` have a Triton body only: the model asks
`fuses_projections` and `fuses_values` first, and otherwise runs the plain lines beside the call.

Legend: B batch, T tokens, H heads, C content width, L = C + P, E = D/H, M groups, G groups in a window,
K opened.
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
    "fuses_projections",
    "fuses_values",
    "gated_values",
    "group_attend",
    "permute",
    "project",
    "refine",
    "resolve_backend",
    "select",
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
    if resolve_backend(backend, unit.device) == "reference":
        return plain_refine.refine(unit, prototype, beta, steps).contiguous()
    return _bodies(backend, unit.device).refine(unit, prototype, beta, steps).contiguous()


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
