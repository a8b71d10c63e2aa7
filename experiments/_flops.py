"""Floating-point operations a token, by formula: two for each multiply-add, averaged over a context.

    matrices   2 x their elements that a token passes through; a group's projections, shared by its tokens
    reads      per key: 2 H L for the score, 2 H C for the value (mha: 4 D), 2 H C more inside the band
    grouping   (2 refine_steps + 1) x 2 C G similarities and centroids, 2 G (L + D) to pool latents and states
    choices    without gradient: k-means, the pass that hysteresis adds, 2 L for each group that selection
               scores, for each of its members where it is by members

    keys       near: i - lowest + 1; opened: min(K, M_i) R; summaries, if read: max(0, M_i - K); of the
               M_i = max(0, i//W - 1) G groups in reach; a group of window w reads (w + 1) G groups

A training token costs three times as much (forward, gradient of inputs, gradient of weights), its choices
once. Norms, softmax, rotations and masks are left out, as is work on masked parts of a tile.
"""

from __future__ import annotations

import numpy as np

from coga import CoGAConfig
from coga.config import LayerConfig

__all__ = ["flops", "forward_flops", "layer_flops", "training_flops"]

PARTS = ("matrices", "reads", "grouping", "choices")


def _exact(config: CoGAConfig, layer: LayerConfig, keys: float, length: int) -> float:
    """Reading `keys` single latents a token, the reciprocal term included."""
    content = layer.latent_dim
    total = 2 * config.n_head * (2 * content + config.rope_dim) * keys
    if config.reciprocal:
        total += 2 * config.n_head * content * float(np.minimum(np.arange(length) + 1, config.band).mean())
    return total


def _formed(config: CoGAConfig, layer: LayerConfig, share: float, pooled_width: int) -> dict[str, float]:
    """Making groups, for the `share` of tokens whose window is closed, and pooling vectors of a width."""
    product = 2 * layer.latent_dim * layer.groups * share
    pooled = 2 * layer.groups * pooled_width * share
    found = {"grouping": pooled, "choices": 0.0}
    if layer.grouping == "gumbel":
        soft = product * (2 * config.refine_steps + 1)
        found["grouping"] += soft
        found["choices"] += soft if config.hysteresis > 0 else 0
    elif layer.grouping == "kmeans":
        found["choices"] += product * (2 * config.kmeans_steps + 1)
    return found


def layer_flops(config: CoGAConfig, layer: LayerConfig, length: int) -> dict[str, float]:
    """FLOPs a token of one attention layer, by part."""
    width, heads = config.d_model, config.n_head
    place = np.arange(length)
    found = dict.fromkeys(PARTS, 0.0)
    if layer.kind == "mha":
        return found | {"matrices": 8.0 * width**2, "reads": 4 * width * float((place + 1).mean())}
    content, latent = layer.latent_dim, layer.latent_dim + config.rope_dim
    query, out = 2 * width * heads * latent, 2 * width**2 * (2 if config.output_gate else 1)
    found["matrices"] = query + 2 * width * latent + 2 * width * content + out
    window = place // layer.window
    lowest = np.zeros_like(place) if layer.kind == "full" else np.maximum(0, window - 1) * layer.window
    keys = float((place - lowest + 1).mean())
    windows, groups, opened = length // layer.window, layer.groups, layer.open_groups
    if layer.kind != "group" or windows == 0:
        return found | {"reads": _exact(config, layer, keys, length)}
    read = max(0, (length - 1) // layer.window - 1) * groups
    # With every group opened the exact kernel reads all tokens; groups are formed, but not refined or read.
    routed = opened >= read
    refines = config.refine_groups and not routed
    pooled = latent * (config.reads_summaries and read > 0) + width * refines
    found |= _formed(config, layer, windows * layer.window / length, pooled)
    if routed:
        return found | {"reads": _exact(config, layer, float((place + 1).mean()), length)}
    visible = np.maximum(0, window - 1) * groups
    rest = np.maximum(0, visible - opened) * config.reads_summaries
    keys += float((np.minimum(opened, visible) * layer.group_size + rest).mean())
    found["reads"] = _exact(config, layer, keys, length)
    scored = layer.group_size if config.selection == "members" else 1  # vectors of a group
    found["choices"] += 2 * latent * scored * float(visible.mean()) if opened else 0
    if refines:
        a_token = windows * groups / length  # groups a token
        found["matrices"] += a_token * (query + 2 * width * content + 2 * width * latent)
        band = (2 - 1 / windows) * groups if config.reciprocal_groups else 0  # same and adjacent window
        among = 2 * heads * (latent + content) * (windows + 1) / 2 * groups + 2 * heads * content * band
        found["reads"] += a_token * among
    return found


def flops(config: CoGAConfig, length: int) -> dict[str, float]:
    """Forward FLOPs per token of a model on contexts of `length` tokens, by part."""
    width = config.d_model
    hidden = round(config.mlp_ratio * width * (2 / 3 if config.mlp == "swiglu" else 1))
    mlp = 2 * width * hidden * (3 if config.mlp == "swiglu" else 2)
    layers = [layer_flops(config, config.layer(i), length) for i in range(config.n_layer)]
    found = {part: sum(one[part] for one in layers) for part in PARTS}
    found["matrices"] += config.n_layer * mlp + 2 * width * config.vocab_size
    return found


def forward_flops(config: CoGAConfig, length: int) -> float:
    """Forward FLOPs per token."""
    return sum(flops(config, length).values())


def training_flops(config: CoGAConfig, length: int) -> float:
    """FLOPs per token of a training step: three forward passes, one of what has no gradient."""
    parts = flops(config, length)
    return 3 * sum(parts.values()) - 2 * parts["choices"]
