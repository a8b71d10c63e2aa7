"""Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu, silu

from coga.config import CoGAConfig, LayerConfig
from coga.models.attention import AttentionOutput, CoGAAttention
from coga.models.context import CallContext
from coga.models.mha import MultiHeadAttention

__all__ = ["MLP", "Block"]


class MLP(nn.Module):
    """ReLU^2 (So et al., 2021): W_2 relu(W_1 x)^2, or SwiGLU (Shazeer, 2020): W_2 (silu(W_1 x) * W_3 x)."""

    def __init__(self, config: CoGAConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        hidden = round(config.mlp_ratio * config.d_model * (2 / 3 if self.kind == "swiglu" else 1))
        self.up = nn.Linear(config.d_model, hidden, bias=False)
        self.gate = nn.Linear(config.d_model, hidden, bias=False) if self.kind == "swiglu" else None
        self.down = nn.Linear(hidden, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(relu(self.up(x_BTD)).square())
        return self.down(silu(self.up(x_BTD)) * self.gate(x_BTD))


class Block(nn.Module):
    """One layer of the stack; `forward` also returns what the attention says about its groups."""

    def __init__(self, config: CoGAConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention: CoGAAttention | MultiHeadAttention = (
            MultiHeadAttention(config, layer) if layer.kind == "mha" else CoGAAttention(config, layer)
        )
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, context: CallContext) -> tuple[Tensor, AttentionOutput]:
        attended = self.attention(self.attention_norm(x_BTD), context)
        x = x_BTD + attended.y_BTD
        return x + self.mlp(self.mlp_norm(x)), attended
