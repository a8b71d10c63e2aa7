"""The weights of the selection's index query from data: which heads a trained model's selection listens to.

A dense model that is read through groups has heads that look for single tokens, and no weights yet; training
moves them slowly at the rates of its end. A few thousand scores on a text are enough to find them at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coga.kernels.reference import wide
from coga.models.attention import CoGAAttention
from coga.models.gpt import CoGAGPT
from coga.models.index import asked, divergence
from coga.models.prototypes import Hooked, check_rows, visit

__all__ = ["fit_index", "index_hooks"]

QUERIES, SCORES = 256, 2**22  # tokens of all rows that are asked, and a head's scores of them
STEPS, RATE = 80, 0.05


def index_hooks(model: CoGAGPT, tokens_BT: Tensor) -> list[Hooked]:
    """What `visit` has to do to fit the weights. ValueError: the text has no far token."""
    found = [one for one in model.modules() if isinstance(one, CoGAAttention) and one.index_H is not None]
    longest = max((one.layer.window for one in found), default=0)
    check_rows(tokens_BT)
    if found and tokens_BT.shape[1] <= 2 * longest:
        rule = f"must be longer than two windows of {longest} tokens"
        raise ValueError(f"tokens_BT={tuple(tokens_BT.shape)}: {rule}")

    def fit(module: CoGAAttention, arguments: tuple[Any, ...]) -> None:
        x_BTD, context = arguments
        table = context.tables[module.projections.rotary]
        q, latent, _ = module.projections.enter(x_BTD, table, context.backend)
        most = -(-QUERIES // len(x_BTD))
        assert module.index_H is not None
        weights = wide(module.index_H).clone()  # half precision has no room for Adam's squares
        optimizer = torch.optim.Adam([weights], lr=RATE, betas=(0.9, 0.95))
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores = asked(q, latent, module.sink_H, module.layer.window, None, most, SCORES)
            for _ in range(STEPS):
                weights.grad = divergence(*scores, weights)[1].to(weights.dtype)
                optimizer.step()
        module.index_H.copy_(weights)

    return [(one, fit) for one in found]


def fit_index(model: CoGAGPT, tokens_BT: Tensor) -> int:
    """Set `index_H` of all layers that select groups to what `coga.models.index` asks for, in place.

    tokens_BT  (B, T), a text the model is to be used on, longer than two windows; 256 of its tokens are
               asked, fewer beyond 16,384 tokens in a row. One context may be an odd one: better several.
    Layers are fitted from the first to the last in one forward pass, by 80 steps of Adam from where they are.
    Returns the number of layers. ValueError: the text has no far token.
    """
    return visit(model, index_hooks(model, tokens_BT), tokens_BT)
