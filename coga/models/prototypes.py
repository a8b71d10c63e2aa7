"""Prototypes from data: where a model gets groups after it was trained without.

Fresh prototypes are random directions. The first steps of training then go into finding out where content is,
and tokens change group meanwhile. k-means over the content of some text puts them there at once.

Legend: B batch, T tokens, G groups in a window, X tokens of all windows, C content width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from coga.grouping.gumbel import CONTENT_EPS, GumbelGrouping
from coga.models.gpt import CoGAGPT

__all__ = ["Hooked", "check_rows", "fit_prototypes", "prototype_hooks", "visit"]

Hooked = tuple[nn.Module, Callable]

SAMPLES = 2**13  # rows that k-means sees
STARTS = 2


def check_rows(tokens_BT: Tensor) -> None:
    """ValueError unless it is a batch of rows."""
    if tokens_BT.ndim != 2:
        raise ValueError(f"tokens_BT={tuple(tokens_BT.shape)}: must be (rows, tokens)")


def prototype_hooks(model: CoGAGPT, tokens_BT: Tensor, seed: int) -> list[Hooked]:
    """What `visit` has to do to fit the prototypes. ValueError: the text is shorter than a window."""
    layers = [model.config.layer(i) for i in range(model.config.n_layer)]
    longest = max((one.window for one in layers if one.grouping == "gumbel" and one.groups), default=0)
    check_rows(tokens_BT)
    if tokens_BT.shape[1] < longest:
        raise ValueError(f"tokens_BT={tuple(tokens_BT.shape)}: must hold a whole window of {longest} tokens")

    from sklearn.cluster import KMeans  # takes a second, and few who import the models need it

    def fit(module: GumbelGrouping, arguments: tuple) -> None:
        rows_XC = normalize(arguments[0].float(), dim=-1, eps=CONTENT_EPS).flatten(0, 2).cpu()
        every = math.ceil(len(rows_XC) / SAMPLES)
        found = KMeans(module.groups, n_init=STARTS, random_state=seed).fit(rows_XC[::every].numpy())
        centre_GC = normalize(torch.from_numpy(found.cluster_centers_), dim=-1)
        for target in (module.prototypes_GC, module.slow_GC):
            target.copy_(centre_GC)
        module.use_G.fill_(1 / module.groups)

    return [(one, fit) for one in model.modules() if isinstance(one, GumbelGrouping)]


def fit_prototypes(model: CoGAGPT, tokens_BT: Tensor, seed: int = 0) -> int:
    """Set the prototypes of all `gumbel` layers to the centres of k-means over unit content, in place.

        p_1..p_G = argmin sum_x min_g |c_x / |c_x| - p_g|^2, normalised;  slow prototypes: the same

    tokens_BT  a text the model is to be used on, at least one whole window long; 8,192 tokens are used
    Layers are fitted from the first to the last in one forward pass, so each sees the groups before it.
    Returns the number of layers. ValueError: the text is shorter than a window.
    Source: scikit-learn's KMeans (Lloyd, k-means++).
    """
    return visit(model, prototype_hooks(model, tokens_BT, seed), tokens_BT)


@torch.no_grad()
def visit(model: CoGAGPT, hooked: Sequence[Hooked], tokens_BT: Tensor) -> int:
    """One forward pass in eval mode, with forward pre-hooks on modules (none: no pass); how many."""
    hooks = [module.register_forward_pre_hook(hook) for module, hook in hooked]
    was_training = model.training
    model.eval()
    try:
        if hooks:
            model(tokens_BT, return_logits=False)
    finally:
        model.train(was_training)
        for one in hooks:
            one.remove()
    return len(hooks)
