"""What a model that was trained without groups needs to be read through them, found in a text."""

from __future__ import annotations

from torch import Tensor

from coga.models.gpt import CoGAGPT
from coga.models.index_fit import index_hooks
from coga.models.prototypes import prototype_hooks, visit

__all__ = ["fit_groups"]


def fit_groups(model: CoGAGPT, tokens_BT: Tensor, seed: int = 0) -> None:
    """Prototypes (`fit_prototypes`) and the heads that the selection listens to (`fit_index`), in place.

    tokens_BT  (B, T), a text the model is to be used on, on its device, longer than two windows; the
               project's own scripts take 65,536 tokens, several contexts
    seed       of k-means
    One forward pass for both: a layer is fitted on what the layers before it, fitted, return. Layers without
    either have nothing to fit. ValueError: the text is too short, before anything is changed.
    """
    visit(model, index_hooks(model, tokens_BT) + prototype_hooks(model, tokens_BT, seed), tokens_BT)
