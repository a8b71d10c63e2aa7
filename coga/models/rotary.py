"""Rotary position embedding (Su et al., 2021) on the last axis, pairs (i, i + P/2).

Legend: P rotary width (even), t positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotary_table", "rotate"]


def rotary_table(position: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of shape (*position, P/2), in at least float32.

    angle[t, i] = t * theta^(-2i/P)
    """
    wide = dtype if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, width, 2, device=position.device, dtype=torch.float64) / max(width, 1)
    angle = position[..., None].to(torch.float64) * theta**-exponent
    return angle.cos().to(wide), angle.sin().to(wide)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (..., t, P) by a table of shape (..., t, P/2); heads need a table with one more axis."""
    cos, sin = table
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
