"""Projections into latent space: queries per head, one latent for all heads, and the way back out.

    c = rms_norm(W_c x), r = rope(rms_norm(W_r x)), latent = [c, r]       key and (first C dims) value
    q_h = [rms_norm(.), rope(rms_norm(.))] of W_q x, times gain_h / sqrt(L)
    y = W_o (concat_h(W_up,h o_h) * sigmoid(W_g x))

Source: multi-head latent attention, DeepSeek-V2 (2024), with K = V shared and no decoupled key.
Legend: B batch, T tokens, H heads, E = D/H, C content width, P rotary width, L = C + P.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.functional import linear

from coga.config import CoGAConfig, LayerConfig
from coga.kernels import fused
from coga.models.rotary import rotate

__all__ = ["LatentProjections", "rms_norm"]


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis, without a weight; computed in at least float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class LatentProjections(nn.Module):
    """Everything of an attention layer that is not the attention itself; names are shared by all patterns."""

    def __init__(self, config: CoGAConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.heads, self.content, self.rotary = config.n_head, layer.latent_dim, config.rope_dim
        self.width = self.content + self.rotary
        self.eps = config.norm_eps
        dim = config.d_model
        self.query = nn.Linear(dim, self.heads * self.width, bias=False)
        self.latent = nn.Linear(dim, self.width, bias=False)
        self.gain_H = nn.Parameter(torch.full((self.heads,), config.gain_init))
        self.up_HCE = nn.Parameter(torch.empty(self.heads, self.content, dim // self.heads))
        self.gate = nn.Linear(dim, dim, bias=False) if config.output_gate else None
        self.out = nn.Linear(dim, dim, bias=False)

    def _normed(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        content, rotary = x.split([self.content, self.rotary], -1)
        content = rms_norm(content, self.eps)
        if not self.rotary:
            return content
        return torch.cat([content, rotate(rms_norm(rotary, self.eps), table)], -1)

    def enter(
        self,
        x_BTD: Tensor,
        table: tuple[Tensor, Tensor],
        backend: str,
        index_H: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`queries`, `latents` and, where it comes for free, `coga.models.index.index_query` (B, T, L)."""
        if fused.fuses_projections(backend, x_BTD):
            raw = linear(x_BTD, torch.cat([self.query.weight, self.latent.weight]))
            return fused.project(raw, table, self.gain_H, index_H, content=self.content, eps=self.eps)
        return self.queries(x_BTD, table), self.latents(x_BTD, table), None

    def queries(self, x_BTD: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """Scaled queries (B, T, H, L)."""
        q = rearrange(self.query(x_BTD), "b t (h l) -> b t h l", h=self.heads)
        cos, sin = table
        q = self._normed(q, (cos[..., None, :], sin[..., None, :]))
        scale = self.gain_H * self.width**-0.5
        return q * scale.to(q.dtype)[:, None]

    def latents(self, x_BTD: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """Token latents (B, T, L)."""
        return self._normed(self.latent(x_BTD), table)

    def values(self, mixed_BTHC: Tensor) -> Tensor:
        """Per-head value up-projection: (B, T, H, C) to (B, T, D)."""
        up = self.up_HCE.to(mixed_BTHC.dtype)
        out = einsum(mixed_BTHC, up, "b t h c, h c e -> b t h e")
        return rearrange(out, "b t h e -> b t (h e)")

    def output(self, mixed_BTHC: Tensor, x_BTD: Tensor, backend: str) -> Tensor:
        """The way back out: (B, T, D) of what the heads have read."""
        gate = None if self.gate is None else self.gate(x_BTD)
        up = self.up_HCE.to(mixed_BTHC.dtype)
        if fused.fuses_values(backend, mixed_BTHC, up, gate):
            return self.out(fused.gated_values(mixed_BTHC, up, gate))
        y = self.values(mixed_BTHC)
        return self.out(y if gate is None else y * torch.sigmoid(gate))
