"""Triton bodies of the custom ops in `coga.kernels.dispatch`: which kernel runs when, and in what order.

    attend            opened members, then one pass over summaries and near tokens that merges everything
    attend_backward   delta; opened members; gradients of the keys; gradients of the queries, which collect
    group_attend      the same pass with the bounds and the log sizes of groups

Every kernel of the backward pass reads the log-sum-exp of the whole softmax, so the parts need no order and
no weights of their own: the opened members, bound by the L2 cache, run beside the keys, bound by the tensor
cores. Shapes and dtypes without a kernel (float64, very wide latents) use the reference.

Legend: B batch, T tokens, H heads, C content width, L = C + P, M groups, G groups in a window, K opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coga.kernels import reference
from coga.kernels.beside import beside
from coga.kernels.triton_assign import assign
from coga.kernels.triton_flash import CAUSAL, FAR, GROUPED, WINDOWED, flash_forward, opened_bits
from coga.kernels.triton_flash_backward import delta_rows, keys_gradient, queries_gradient
from coga.kernels.triton_opened import opened_backward, opened_forward
from coga.kernels.triton_refine import refine
from coga.kernels.triton_select import select
from coga.kernels.triton_select_members import select_members
from coga.types import Far

__all__ = [
    "assign",
    "attend",
    "attend_backward",
    "group_attend",
    "group_attend_backward",
    "refine",
    "select",
    "select_members",
]

# Widest content by dtype. Without tensor cores ptxas spills kilobytes a thread on wider float32 tiles, and
# takes minutes to compile them.
WIDEST_CONTENT = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
WIDEST_ROTARY = 128


def _has_kernel(q: Tensor, content: int) -> bool:
    fits = content <= WIDEST_CONTENT.get(q.dtype, 0) and q.shape[-1] - content <= WIDEST_ROTARY
    return fits and q.numel() > 0


def _dense(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    if x is None:
        return None
    return (x if dtype is None else x.to(dtype)).contiguous()


@dataclass(frozen=True)
class _Plan:
    """Contiguous inputs in the dtype of q, and the options that the kernels share."""

    q: Tensor
    latent: Tensor
    far: Far | None
    near: dict  # near part, every kernel
    summary: dict  # far part, every kernel
    opens: bool

    @classmethod
    def of(cls, q, latent, content, window, band, alpha, sink, far) -> _Plan:
        mode, unit = (CAUSAL, 1) if window is None else (WINDOWED, window)
        near = dict(content=content, mode=mode.value, unit=unit)
        if alpha is not None and band > 0:
            near |= dict(band=band, alpha_H=_dense(alpha))
        summary: dict = {}
        opens = False
        if far is not None and far.total == 0:
            far = None
        if far is not None:
            assert window is not None
            far = replace(
                far,
                group_BML=_dense(far.group_BML, q.dtype),
                log_size_BM=_dense(far.log_size_BM, torch.float32),
                far_bias_H=_dense(far.far_bias_H),
                slot_BSL=_dense(far.slot_BSL, q.dtype),
            )
            opens = far.open_BTK is not None and far.open_BTK.shape[-1] > 0 and far.slot_BSL.shape[1] > 0
            if far.group_BML is not None:
                summary = dict(far_bias_H=far.far_bias_H, groups=far.groups)
                if opens:
                    summary["bits"] = opened_bits(far.open_BTK, far.total)
        return cls(_dense(q), _dense(latent, q.dtype), far, near, summary, opens)

    @property
    def groups(self) -> dict:
        """Far part as the kernels that walk over keys take it."""
        if self.far is None or self.far.group_BML is None:
            return {}
        return self.summary | dict(group_BML=self.far.group_BML, log_size_BM=self.far.log_size_BM)

    @property
    def shift(self) -> Tensor | None:
        """What the scores of opened members are short of, in float32."""
        return None if self.far is None else _dense(self.far.open_shift, torch.float32)

    @property
    def room(self) -> dict:
        """Of the opened groups: content width, the most members and how many there are on average."""
        far = self.far
        assert far is not None
        return dict(content=self.near["content"], slots=far.slots, mean=self.near["unit"] // far.groups)

    @property
    def opened(self) -> tuple:
        far = self.far
        assert far is not None
        return self.q, far.slot_BSL, far.offset_BM, far.size_BM, far.open_BTK


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
) -> tuple[Tensor, Tensor]:
    """`reference.attend` on the GPU: output (B, T, H, C) and log-sum-exp (B, T, H) in float32."""
    if not _has_kernel(q_BTHL, content):
        options = dict(content=content, window=window, band=band, alpha_H=alpha_H, sink_H=sink_H, far=far)
        return reference.attend(q_BTHL, latent_BTL, **options)
    plan = _Plan.of(q_BTHL, latent_BTL, content, window, band, alpha_H, sink_H, far)
    opened = None
    if plan.opens:
        out, opened_lse = opened_forward(*plan.opened, **plan.room)
        opened = out, opened_lse if plan.shift is None else opened_lse + plan.shift
    return flash_forward(
        plan.q, plan.latent, **plan.near, **plan.groups, sink_H=_dense(sink_H), opened=opened
    )


def attend_backward(
    grad_BTHC: Tensor,
    out_BTHC: Tensor,
    lse_BTH: Tensor,
    q_BTHL: Tensor,
    latent_BTL: Tensor,
    *,
    content: int,
    window: int | None = None,
    band: int = 0,
    alpha_H: Tensor | None = None,
    sink_H: Tensor | None = None,
    far: Far | None = None,
) -> dict[str, Tensor]:
    """`reference.attend_backward` on the GPU; dq comes in the dtype of q, the rest in float32."""
    if not _has_kernel(q_BTHL, content):
        options = dict(content=content, window=window, band=band, alpha_H=alpha_H, sink_H=sink_H, far=far)
        return reference.attend_backward(grad_BTHC, out_BTHC, lse_BTH, q_BTHL, latent_BTL, **options)
    plan = _Plan.of(q_BTHL, latent_BTL, content, window, band, alpha_H, sink_H, far)
    grad, lse = _dense(grad_BTHC, plan.q.dtype), _dense(lse_BTH)
    delta = delta_rows(grad, _dense(out_BTHC))
    rows = (grad, lse, delta, plan.q)
    grads: dict[str, Tensor] = {}
    dq_opened = None
    ready: list[Callable[[], None]] = []  # waits for dq of the opened part, then for all of it
    if plan.opens:
        with beside(grad.device) as mark:
            own_lse = lse if plan.shift is None else lse - plan.shift  # p = exp(s + shift - lse)
            dq_opened, grads["slot"] = opened_backward(
                grad,
                own_lse,
                delta,
                *plan.opened,
                **plan.room,
                queries_done=lambda: ready.append(mark()),
            )
            ready.append(mark())
    if plan.far is not None and plan.far.group_BML is not None:
        options = dict(content=content, mode=FAR.value, unit=window, log_size_BN=plan.far.log_size_BM)
        grads["group"], _ = keys_gradient(*rows, plan.far.group_BML, **options, **plan.summary)
    grads["latent"], dq_band = keys_gradient(*rows, plan.latent, **plan.near)
    if ready:
        ready[0]()
    grads["q"], dc, scalars = queries_gradient(
        *rows,
        plan.latent,
        **plan.near,
        **plan.groups,
        sink_H=_dense(sink_H),
        dq_opened=dq_opened,
        dq_band=dq_band,
    )
    if dc is not None:
        grads["latent"][..., :content] += dc.sum(2, dtype=torch.float32)
    if ready:
        ready[-1]()
    return grads | scalars


def group_attend(
    q_BMHL: Tensor,
    query_window: Tensor,
    latent_BML: Tensor,
    log_size_BM: Tensor,
    *,
    content: int,
    groups: int,
    alpha_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.group_attend` of all groups of a sequence: window m // G for query group m."""
    if not _has_kernel(q_BMHL, content):
        options = dict(content=content, groups=groups, alpha_H=alpha_H)
        return reference.group_attend(q_BMHL, query_window, latent_BML, log_size_BM, **options)
    return flash_forward(
        _dense(q_BMHL),
        _dense(latent_BML, q_BMHL.dtype),
        content=content,
        mode=GROUPED.value,
        unit=groups,
        alpha_H=_dense(alpha_H),
        log_size_BM=_dense(log_size_BM, torch.float32),
    )


def group_attend_backward(
    grad_BMHC: Tensor,
    out_BMHC: Tensor,
    lse_BMH: Tensor,
    q_BMHL: Tensor,
    latent_BML: Tensor,
    log_size_BM: Tensor,
    *,
    content: int,
    groups: int,
    alpha_H: Tensor | None = None,
) -> dict[str, Tensor]:
    """`reference.group_attend_backward` on the GPU; dq comes in the dtype of q, the rest in float32."""
    if not _has_kernel(q_BMHL, content):
        options = dict(content=content, groups=groups, alpha_H=alpha_H)
        inputs = (grad_BMHC, out_BMHC, lse_BMH, q_BMHL, latent_BML, log_size_BM)
        return reference.group_attend_backward(*inputs, **options)
    q, latent = _dense(q_BMHL), _dense(latent_BML, q_BMHL.dtype)
    options = dict(content=content, mode=GROUPED.value, unit=groups, alpha_H=_dense(alpha_H))
    log_size = _dense(log_size_BM, torch.float32)
    grad, lse = _dense(grad_BMHC, q.dtype), _dense(lse_BMH)
    rows = (grad, lse, delta_rows(grad, _dense(out_BMHC)), q)
    dlatent, dq_band = keys_gradient(*rows, latent, log_size_BN=log_size, **options)
    dq, dc, scalars = queries_gradient(*rows, latent, log_size_BM=log_size, dq_band=dq_band, **options)
    if dc is not None:
        dlatent[..., :content] += dc.sum(2, dtype=torch.float32)
    return {"q": dq, "latent": dlatent} | scalars
