"""What every grouping shares: the call, the context it may depend on, and slot order.

A grouping maps the content latents of closed windows to a `Grouping`. It works window by window: nothing it
computes for one window may depend on another, because a window's groups are read by later tokens only.

Legend: B batch, N closed windows, W tokens in a window, G groups in a window, R group size, S = N*W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coga.config import CoGAConfig, LayerConfig
from coga.types import Grouping, GroupingStats

__all__ = ["BaseGrouping", "GroupingContext", "make_grouping", "pool"]


@dataclass(frozen=True)
class GroupingContext:
    """Where the windows stand.

    window_BN  int64, index of each window in its row (0 is the first of the row's real tokens)
    valid_BN   bool, windows made of real tokens only; the others are never read and count in no statistic
    noise_step step of the noise; step: training step for the schedules (both may be tensors)
    training   noise and statistics for `update_groups` are wanted
    """

    window_BN: Tensor
    valid_BN: Tensor
    noise_step: Tensor | int = 0
    step: Tensor | int = 0
    training: bool = False
    backend: str = "auto"


def make_grouping(
    index_BNW: Tensor, groups: int, weight_BNWG: Tensor | None = None, stats: GroupingStats | None = None
) -> Grouping:
    """A `Grouping` from the group of each token: one-hot weights if none are given, and slot order."""
    batch, windows, width = index_BNW.shape
    if weight_BNWG is None:
        weight_BNWG = torch.nn.functional.one_hot(index_BNW, groups).to(torch.float32)
    window = torch.arange(windows, device=index_BNW.device)[:, None]
    place_BNW = index_BNW.sort(dim=-1, stable=True).indices
    order_BS = (place_BNW + window * width).flatten(1)
    group_BS = (index_BNW + window * groups).flatten(1)
    size_BM = group_BS.new_zeros(batch, windows * groups)
    size_BM = size_BM.scatter_add(1, group_BS, torch.ones_like(group_BS))
    return Grouping(
        index_BNW=index_BNW,
        weight_BNWG=weight_BNWG,
        order_BS=order_BS,
        offset_BM=size_BM.cumsum(-1) - size_BM,
        size_BM=size_BM,
        stats=stats,
    )


def pool(x_BSD: Tensor, grouping: Grouping) -> Tensor:
    """Mean of the members of each group: (B, M, D), in the dtype of x, summed in at least float32.

    mean_g = sum_t weight[t, g] x_t / |g|, with |g| a constant count; 0 for an empty group.
    Half precision stays half in the product: its weights are 0 or 1, and the sum is float32 in any case.
    """
    weight = grouping.weight_BNWG
    batch, windows, width, groups = weight.shape
    x = x_BSD.reshape(batch, windows, width, -1)
    total = weight.to(x.dtype).transpose(-1, -2) @ x
    count = grouping.size_BM.view(batch, windows, groups, 1).clamp_min(1)
    return (total / count).flatten(1, 2)


class BaseGrouping(nn.Module):
    """`forward(content_BNWC, context) -> Grouping`. Subclasses document their rule.

    forward writes no buffer; `update(stats, step)` runs after the optimizer's step.
    """

    def __init__(self, config: CoGAConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.groups, self.group_size, self.slots = layer.groups, layer.group_size, layer.slots
        # A buffer, not integers: blocks that differ in nothing else then share their compiled code.
        self.register_buffer("seed_and_layer", torch.tensor([config.seed, layer.index]), persistent=False)
        self.seed_and_layer: Tensor

    def forward(self, content_BNWC: Tensor, context: GroupingContext) -> Grouping:
        raise NotImplementedError

    def update(self, stats: GroupingStats | None, step: int) -> None:
        """Called by `model.update_groups`; groupings without parameters have nothing to do."""
