"""Contiguous blocks of R tokens: the grouping of NSA, MoBA and DeepSeek-V4, as a baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from coga.grouping.base import BaseGrouping, GroupingContext, make_grouping
from coga.types import Grouping

__all__ = ["ContiguousGrouping"]


class ContiguousGrouping(BaseGrouping):
    """Token at place i of its window belongs to group i // R."""

    def forward(self, content_BNWC: Tensor, context: GroupingContext) -> Grouping:
        batch, windows, width, _ = content_BNWC.shape
        index = torch.arange(width, device=content_BNWC.device) // self.group_size
        return make_grouping(index.expand(batch, windows, -1), self.groups)
