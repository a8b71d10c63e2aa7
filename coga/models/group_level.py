"""Groups attend to groups: the level at which groups cooperate (DESIGN: section 5).

A group's state is the weighted mean of its members' hidden states. Its queries come from that state through
the token query map, rotated to the window's last position; it reads the raw latents of the groups of windows
<= its own, and refines its own latent through a normalised, zero-initialised residual:

    refined = raw + W_r rms_norm(values(attend(q(state), raw)))

Legend: B batch, M groups, D model width, H heads, C content width, L = C + P, G groups in a window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coga.config import CoGAConfig, LayerConfig
from coga.kernels import dispatch, reference
from coga.models.latent import LatentProjections, rms_norm

__all__ = ["GroupLevel"]


class GroupLevel(nn.Module):
    """The refinement of group latents; it borrows the projections of its attention layer."""

    def __init__(self, config: CoGAConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.groups, self.eps = layer.groups, config.norm_eps
        self.alpha_H = nn.Parameter(torch.zeros(config.n_head)) if config.reciprocal_groups else None
        self.residual = nn.Linear(config.d_model, layer.latent_dim + config.rope_dim, bias=False)

    def _refined(self, raw: Tensor, mixed: Tensor, projections: LatentProjections) -> Tensor:
        return raw + self.residual(rms_norm(projections.values(mixed), self.eps)).to(raw.dtype)

    def forward(
        self,
        state_BMD: Tensor,
        raw_BML: Tensor,
        log_size_BM: Tensor,
        projections: LatentProjections,
        table: tuple[Tensor, Tensor],
        warmth: Tensor | float,
        backend: str,
    ) -> Tensor:
        """Refined latents of all groups of a sequence; `table` is the rotary table at each window's end."""
        q = projections.queries(state_BMD, table)
        mixed, _ = dispatch.group_attend(
            q,
            raw_BML.to(q.dtype),
            log_size_BM,
            content=projections.content,
            groups=self.groups,
            alpha_H=None if self.alpha_H is None else self.alpha_H * warmth,
            backend=backend,
        )
        return self._refined(raw_BML, mixed, projections)

    def step(
        self,
        state_BGD: Tensor,
        raw_BML: Tensor,
        log_size_BM: Tensor,
        projections: LatentProjections,
        table: tuple[Tensor, Tensor],
        warmth: Tensor | float,
        previous_query_BGHC: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Refined latents of the groups of the LAST window in `raw_BML`, and their content queries."""
        q = projections.queries(state_BGD, table)
        own = q[..., : projections.content]
        keys = own if previous_query_BGHC is None else torch.cat([previous_query_BGHC, own], 1)
        window = torch.full_like(log_size_BM[0, : self.groups], raw_BML.shape[1] // self.groups - 1)
        mixed, _ = reference.group_attend(
            q,
            window.long(),
            raw_BML.to(q.dtype),
            log_size_BM,
            content=projections.content,
            groups=self.groups,
            alpha_H=None if self.alpha_H is None else self.alpha_H * warmth,
            key_query_BnHC=keys,
        )
        return self._refined(raw_BML[:, -self.groups :], mixed, projections), own
