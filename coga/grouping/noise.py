"""Counter-based Gumbel noise: a pure function of (seed, step, layer, row, token position, group).

No generator state: recomputation under checkpointing, compilation, sharding and another sequence length all
draw the same number for the same token. Sampled in float32 or wider, from 23-bit uniforms in (0, 1), so it
is always finite: g = -log(-log(u)).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gumbel", "mix", "uniform"]

MASK = 0xFFFFFFFF
MULTIPLIER = 0x045D9F3B  # below 2**31, so that a product with a 32-bit word fits int64


def mix(x: Tensor) -> Tensor:
    """Scramble 32-bit words held in int64 (xor-shift-multiply, twice)."""
    x = (((x >> 16) ^ x) * MULTIPLIER) & MASK
    x = (((x >> 16) ^ x) * MULTIPLIER) & MASK
    return (x >> 16) ^ x


def combine(*words: Tensor | int, device: torch.device) -> Tensor:
    """One hash of several broadcastable integers; the order of the arguments matters."""
    state = torch.full((), 0x9E3779B9, dtype=torch.int64, device=device)
    for word in words:
        word = torch.as_tensor(word, dtype=torch.int64, device=device)
        state = mix(state ^ mix((word + 0x7F4A7C15) & MASK))
    return state


def uniform(*words: Tensor | int, device: torch.device) -> Tensor:
    """Uniform numbers in (0, 1), float32, one for each broadcast combination of the words."""
    bits = combine(*words, device=device) >> 9
    return (bits.to(torch.float32) + 0.5) * 2.0**-23


def gumbel(
    seed: Tensor | int,
    step: Tensor | int,
    layer: Tensor | int,
    row_B: Tensor,
    position_BS: Tensor,
    groups: int,
) -> Tensor:
    """Gumbel(0, 1) noise of shape (B, S, G), float32."""
    device = position_BS.device
    group = torch.arange(groups, device=device)
    u = uniform(seed, step, layer, row_B[:, None, None], position_BS[..., None], group, device=device)
    return -torch.log(-torch.log(u))
