"""Models built from CoGA layers."""

from coga.models.attention import CoGAAttention
from coga.models.fit import fit_groups
from coga.models.gpt import CoGAGPT, ModelOutput
from coga.models.mha import MultiHeadAttention

__all__ = ["CoGAAttention", "CoGAGPT", "ModelOutput", "MultiHeadAttention", "fit_groups"]
