"""Capacity assignment: tokens of a window to groups that hold at most S tokens each.

In rounds, every unplaced token proposes to its best group that has room, and a group takes the best-scored
proposals until it is full. A round that leaves a token unplaced has filled at least one group, so G rounds
always suffice. Scores are rounded to `step`; ties go to the lower group (a token choosing) and to the lower
token (a group choosing).

Legend: N windows, W tokens in a window, G groups in a window, S slots of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assign"]


def assign(score_NWG: Tensor, slots: int, step: float) -> Tensor:
    """Group of each token, (N, W) int64. Needs G * slots >= W. No gradient.

    Cost: at most G rounds of one sort of W keys a window; rounds end early when all tokens are placed.
    """
    windows, width, groups = score_NWG.shape
    if groups * slots < width:
        raise ValueError(f"slots={slots}: {groups} groups of {slots} cannot hold {width} tokens")
    device = score_NWG.device
    rounded = (score_NWG.detach() / step).round().to(torch.int64)
    token = torch.arange(width, device=device)
    group = torch.arange(groups, device=device)
    room = torch.full((windows, groups), slots, device=device)
    placed = torch.full((windows, width), -1, device=device)
    lowest = torch.iinfo(torch.int64).min
    choice_key = rounded * groups + (groups - 1 - group)  # unique in a row: score, then lower group
    span = (rounded.amax() - rounded.amin() + 1) * width if rounded.numel() else 1
    for _ in range(groups):
        open_key = choice_key.masked_fill((room == 0)[:, None], lowest)
        best = open_key.argmax(-1)
        waiting = placed < 0
        proposal = torch.where(waiting, best, groups)
        value = rounded.gather(-1, best[..., None])[..., 0]
        # Sort by (group, higher score, lower token); the rank inside the group decides who gets in.
        order = (proposal * span + (rounded.amax() - value) * width + token).argsort(-1)
        sorted_group = proposal.gather(-1, order)
        count = torch.zeros(windows, groups + 1, dtype=torch.int64, device=device)
        count.scatter_add_(1, proposal, torch.ones_like(proposal))
        first = count.cumsum(-1) - count
        rank = token - first.gather(-1, sorted_group)
        limit = torch.nn.functional.pad(room, (0, 1)).gather(-1, sorted_group)
        taken = rank < limit  # the extra column for tokens already placed has no room
        placed = placed.scatter(1, order, torch.where(taken, sorted_group, placed.gather(-1, order)))
        used = torch.zeros_like(count).scatter_add_(1, sorted_group, taken.long())
        room = room - used[:, :groups]
        if bool((placed >= 0).all()):
            break
    return placed
