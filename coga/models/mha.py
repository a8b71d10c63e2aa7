"""Ordinary multi-head attention with rotary positions: the baseline (layer "mha").

Legend: B batch, T tokens, H heads, E = D/H head width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from coga.config import CoGAConfig, LayerConfig
from coga.models.attention import AttentionOutput
from coga.models.context import CallContext
from coga.models.rotary import rotate

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(nn.Module):
    """softmax(q k^T / sqrt(E)) v per head, causal, through torch's scaled_dot_product_attention."""

    def __init__(self, config: CoGAConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.n_head
        self.rotary = config.d_model // config.n_head // 2 * 2
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def project(self, x_BTD: Tensor, context: CallContext) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of shape (B, T, H, E), q and k rotated."""
        q, k, v = rearrange(self.qkv(x_BTD), "b t (n h e) -> n b t h e", n=3, h=self.heads)
        cos, sin = context.tables[self.rotary]
        table = cos[..., None, :], sin[..., None, :]

        def turned(x: Tensor) -> Tensor:
            rotary, rest = x.split([self.rotary, x.shape[-1] - self.rotary], -1)
            return torch.cat([rotate(rotary, table), rest], -1)

        return turned(q), turned(k), v

    def forward(self, x_BTD: Tensor, context: CallContext) -> AttentionOutput:
        q, k, v = (x.transpose(1, 2) for x in self.project(x_BTD, context))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return AttentionOutput(self.out(rearrange(y, "b h t e -> b t (h e)")), None, {})
