"""Spherical k-means in each window, without parameters: the way to read a dense model untrained.

Start from every R-th token of the window, then `kmeans_steps` times: nearest centroid by cosine, centroid =
normalised mean of its tokens. At the end tokens are placed under the capacity (Lloyd, 1982; Dhillon & Modha,
2001). No gradient reaches the assignment; the group means still carry it to the latents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from coga.config import CoGAConfig, LayerConfig
from coga.grouping.base import BaseGrouping, GroupingContext, make_grouping
from coga.grouping.choice import nearest
from coga.kernels.dispatch import assign
from coga.types import Grouping

__all__ = ["KMeansGrouping"]


class KMeansGrouping(BaseGrouping):
    """Per-window k-means with capacity; see the module docstring."""

    def __init__(self, config: CoGAConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.steps = config.kmeans_steps

    @torch.no_grad()
    def forward(self, content_BNWC: Tensor, context: GroupingContext) -> Grouping:
        content = content_BNWC if content_BNWC.dtype == torch.float64 else content_BNWC.float()
        unit = normalize(content, dim=-1)
        centroid = unit[:, :, :: self.group_size]
        for _ in range(self.steps):
            member = one_hot(nearest(unit @ centroid.transpose(-1, -2)), self.groups).to(unit.dtype)
            total = member.transpose(-1, -2) @ unit
            # A centroid that lost all its tokens stays where it was.
            empty = (member.sum(-2) == 0)[..., None]
            centroid = torch.where(empty, centroid, normalize(total, dim=-1))
        score = (unit @ centroid.transpose(-1, -2)).flatten(0, 1)
        index = assign(score, self.slots, backend=context.backend)
        return make_grouping(index.view(unit.shape[:3]), self.groups)
