"""Discrete choices that one ulp cannot change: rounded scores, then the lower index."""

from __future__ import annotations

import torch
from torch import Tensor

from coga.kernels.reference import rounding_step

__all__ = ["nearest"]


def nearest(score: Tensor) -> Tensor:
    """Index of the largest rounded score along the last axis; the lower index among equals."""
    rounded = (score / rounding_step(score.dtype)).round()
    count = score.shape[-1]
    index = torch.arange(count, device=score.device)
    best = rounded == rounded.amax(-1, keepdim=True)
    return torch.where(best, index, count).amin(-1).clamp_max(count - 1)
