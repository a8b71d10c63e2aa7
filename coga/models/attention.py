"""CoGA attention: near tokens exactly, far tokens through groups, the few best groups opened.

One module serves the patterns "near" (window only), "full" (dense latent attention) and a group size; they
share parameter names, so `with_layers` moves weights between them. The equations are in
`coga.kernels.reference` (attention), `coga.grouping` and `coga.models.group_level`.

Legend: B batch, T tokens, H heads, C content width, L = C + P, N closed windows, W window, G groups in a
window, M = N*G groups, K opened groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from coga.config import CoGAConfig, LayerConfig
from coga.grouping import GroupingContext, build_grouping, pool
from coga.kernels import dispatch
from coga.models.context import CallContext
from coga.models.entropy import entropy_shortfall
from coga.models.group_level import GroupLevel
from coga.models.index import index_loss, index_query
from coga.models.latent import LatentProjections
from coga.types import Far, Grouping

__all__ = ["AttentionOutput", "CoGAAttention", "log_size"]

FAINTEST = 1e-3  # weight of the far field at the first step of its warm-up


@dataclass(frozen=True)
class AttentionOutput:
    """y_BTD, the grouping of the closed windows (None without groups), unweighted extra losses by name."""

    y_BTD: Tensor
    grouping: Grouping | None
    losses: dict[str, Tensor]


def _share(step: Tensor | int, steps: int) -> Tensor | float:
    """min(1, step / steps); 1 where there are no steps."""
    if steps == 0:
        return 1.0
    share = step / steps
    return share.clamp(0, 1) if isinstance(share, Tensor) else min(1.0, share)


def log_size(size_BM: Tensor, dtype: torch.dtype) -> Tensor:
    """log |g| in at least float32; -inf for an empty group."""
    return size_BM.to(dtype if dtype == torch.float64 else torch.float32).log()


class CoGAAttention(nn.Module):
    """Attention layer of kind "near", "full" or "group".

    Parameters beyond the projections: sink_H, alpha_H (reciprocal term), and for groups index_H, far_bias_H,
    the grouping's prototypes and the group level. `route_full`: with K >= M the exact kernel computes the
    same, but for the weights of a far field that is being faded in.
    """

    def __init__(self, config: CoGAConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        heads = config.n_head
        self.projections = LatentProjections(config, layer)
        self.rotary = config.rope_dim
        self.reads_summaries = config.reads_summaries
        self.sink_H = nn.Parameter(torch.zeros(heads)) if config.sink else None
        self.alpha_H = nn.Parameter(torch.zeros(heads)) if config.reciprocal else None
        self.grouping = self.group_level = self.index_H = None
        self.route_full = config.far_warmup == 0
        if layer.kind == "group":
            bias = torch.full((heads,), config.far_bias_init)
            self.far_bias_H = nn.Parameter(bias) if self.reads_summaries else None
            self.grouping = build_grouping(config, layer)
            self.group_level = GroupLevel(config, layer) if config.refine_groups else None
            if layer.open_groups > 0 and config.index_weight > 0:
                self.index_H = nn.Parameter(torch.full((heads,), 1 / heads))

    def warmth(self, context: CallContext) -> Tensor | float:
        """Share of the reciprocal term that is on at this step: min(1, step / alpha_warmup)."""
        return _share(context.step, self.config.alpha_warmup)

    def far_weights(self, context: CallContext) -> tuple[Tensor | None, Tensor | None]:
        """Bias of summaries (H,), if any, and shift of opened members: log of what the far field weighs now.

        weight = FAINTEST^(1 - min(1, step / far_warmup)): attention learns to read its neighbourhood first.
        """
        steps = self.config.far_warmup
        if steps == 0:
            return self.far_bias_H, None
        up = self.projections.up_HCE
        missing = 1 - torch.as_tensor(_share(context.step, steps), device=up.device)
        shift = math.log(FAINTEST) * missing.to(up.dtype)
        return None if self.far_bias_H is None else self.far_bias_H + shift, shift

    def _alpha(self, context: CallContext) -> Tensor | None:
        return None if self.alpha_H is None else self.alpha_H * self.warmth(context)

    def forward(self, x_BTD: Tensor, context: CallContext) -> AttentionOutput:
        table = context.tables[self.projections.rotary]
        q, latent, index_q = self.projections.enter(x_BTD, table, context.backend, self.index_H)
        grouping, far = None, None
        if self.layer.kind == "group":
            grouping, far = self._groups(x_BTD, q, latent, context, index_q)
        window = None if self.layer.kind == "full" else self.layer.window
        if far is not None and self._opens_all(far.total):
            far, window = None, None
        mixed, _ = dispatch.attend(
            q,
            latent,
            content=self.projections.content,
            window=window,
            band=self.config.band,
            alpha_H=self._alpha(context),
            sink_H=self.sink_H,
            far=far,
            backend=context.backend,
        )
        losses: dict[str, Tensor] = {}
        if context.training and grouping is not None and grouping.stats is not None:
            losses["coherence"] = grouping.stats.coherence_loss
        if context.training and self.index_H is not None and x_BTD.shape[1] > 2 * self.layer.window:
            losses["index"] = index_loss(
                q,
                latent,
                self.index_H,
                sink_H=self.sink_H,
                window=self.layer.window,
                length_B=context.length_B,
            )
        if context.training and self.config.entropy_weight > 0:
            losses["entropy"] = entropy_shortfall(
                q,
                latent,
                content=self.projections.content,
                window=window,
                band=self.config.band,
                alpha_H=self._alpha(context),
                sink_H=self.sink_H,
                far=far,
                length_B=context.length_B,
            )
        return AttentionOutput(self.projections.output(mixed, x_BTD, context.backend), grouping, losses)

    def _opens_all(self, groups: int) -> bool:
        return self.route_full and self.layer.open_groups >= groups

    def _groups(
        self,
        x_BTD: Tensor,
        q_BTHL: Tensor,
        latent_BTL: Tensor,
        context: CallContext,
        index_q_BTL: Tensor | None = None,
    ) -> tuple[Grouping | None, Far | None]:
        """Form the groups of the closed windows; `Far` holds those that some token of the call may read."""
        layer, batch, length = self.layer, x_BTD.shape[0], x_BTD.shape[1]
        windows = length // layer.window
        if windows == 0:
            return None, None
        end = windows * layer.window
        with torch.autocast(x_BTD.device.type, enabled=False):
            grouping = self._form(latent_BTL[:, :end], windows, batch, context)
        read = max(0, (length - 1) // layer.window - 1) * layer.groups
        if read == 0:
            return grouping, None
        far = (q_BTHL, index_q_BTL, latent_BTL[:, :end], read, grouping, context)
        if not self.reads_summaries:
            return grouping, self._far(*far)
        with torch.autocast(x_BTD.device.type, enabled=False):
            raw = pool(latent_BTL[:, :end], grouping)
        sizes = log_size(grouping.size_BM, raw.dtype)
        refined = raw
        if self.group_level is not None and not self._opens_all(read):
            with torch.autocast(x_BTD.device.type, enabled=False):
                # In the dtype of its projections, which under autocast is half of what there is to read.
                state = pool(x_BTD[:, :end].to(raw.dtype), grouping)
            window = torch.arange(windows, device=x_BTD.device).repeat_interleave(layer.groups)
            position = (window + 1) * layer.window - 1
            table = context.table_at(position, self.projections.rotary)
            refined = self.group_level(
                state, raw, sizes, self.projections, table, self.warmth(context), context.backend
            )
        group = refined[:, :read].to(q_BTHL.dtype)
        return grouping, self._far(*far, group.contiguous(), sizes[:, :read].contiguous())

    def _form(self, latent: Tensor, windows: int, batch: int, context: CallContext) -> Grouping:
        width = self.layer.window
        content = latent[..., : self.projections.content].reshape(batch, windows, width, -1)
        index = torch.arange(windows, device=latent.device).expand(batch, -1)
        assert self.grouping is not None
        return self.grouping(
            content,
            GroupingContext(
                window_BN=index,
                valid_BN=context.valid_windows(batch, windows, width),
                noise_step=context.noise_step,
                step=context.step,
                training=context.training,
                backend=context.backend,
            ),
        )

    def _far(
        self,
        q,
        index_q,
        latent,
        read: int,
        grouping: Grouping,
        context: CallContext,
        group=None,
        log_sizes=None,
    ) -> Far:
        """The `read` groups that some token may read, with the selection of each token."""
        layer = self.layer
        bias, shift = self.far_weights(context)
        far = Far(
            group_BML=group,
            log_size_BM=log_sizes,
            far_bias_H=bias,
            slot_BSL=None,
            offset_BM=grouping.offset_BM[:, :read].contiguous(),
            size_BM=grouping.size_BM[:, :read].contiguous(),
            open_BTK=None,
            groups=layer.groups,
            slots=layer.slots,
        )
        if layer.open_groups == 0:
            return far
        far = replace(far, slot_BSL=dispatch.permute(latent, grouping.order_BS), open_shift=shift)
        if index_q is None:
            index_q = index_query(q, self.index_H)
        return replace(far, open_BTK=self.choose(index_q, far, context.backend))

    def choose(self, index_q_BTL: Tensor, far: Far, backend: str) -> Tensor:
        """The groups (B, T, K) that each token opens, by their summaries or by their members."""
        layer = self.layer
        options = dict(count=layer.open_groups, window=layer.window, groups=layer.groups)
        if self.config.selection == "summary":
            assert far.group_BML is not None and far.log_size_BM is not None
            return dispatch.select(index_q_BTL, far.group_BML, far.log_size_BM, **options, backend=backend)
        assert far.slot_BSL is not None
        options["slots"] = far.slots
        slot, offset, size = far.slot_BSL, far.offset_BM, far.size_BM
        return dispatch.select_members(index_q_BTL, slot, offset, size, **options, backend=backend)
