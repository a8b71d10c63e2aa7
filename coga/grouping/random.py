"""Random groups of equal size: the control that any learned grouping has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from coga.grouping.base import BaseGrouping, GroupingContext, make_grouping
from coga.grouping.noise import uniform
from coga.types import Grouping

__all__ = ["RandomGrouping"]


class RandomGrouping(BaseGrouping):
    """A shuffle of each window that depends on (seed, layer, window) alone, never on content or length."""

    def forward(self, content_BNWC: Tensor, context: GroupingContext) -> Grouping:
        width, device = content_BNWC.shape[2], content_BNWC.device
        place = torch.arange(width, device=device)
        seed, layer = self.seed_and_layer.unbind()
        u = uniform(seed, layer, context.window_BN[..., None], place, device=device)
        shuffled = u.sort(dim=-1, stable=True).indices
        index = torch.zeros_like(shuffled).scatter(
            -1, shuffled, (place // self.group_size).expand_as(shuffled)
        )
        return make_grouping(index, self.groups)
