"""What sanity.py measures on the layers of a model that has just read a text.

    entropy         H(p_i)/ln(i) of each head, mean over evenly spaced queries; group mass spread over members
    reciprocity     correlation of s[i,j] with s[j,i] inside the band, s = q_i . k_j before mask and
                    reciprocal term, rotary part included
    reconstruction  how well a linear latent of C numbers a token can rebuild keys and values:
                    an `mha` layer     from its input x: all heads' W_k x (before rotation) and W_v x, through
                                       the best map of rank C (reduced-rank regression)
                    a latent layer     from its content latent c: the content keys (c itself) and every head's
                                       value up-projection W_up c, the same way: how much of C is in use
    gradient norm   of one training step's loss, for each part of the model

Legend: B rows, T tokens, t queries, H heads, D width, C content width, L latent width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coga.kernels.reference import attention_parts, far_at, wide
from coga.models import CoGAGPT
from coga.models.attention import CoGAAttention
from coga.models.context import CallContext
from coga.models.diagnostics import attention_entropy, rank_errors, reciprocity, token_mass
from coga.models.mha import MultiHeadAttention
from coga.types import Far

__all__ = ["PARTS", "Seen", "entropies", "gradient_norms", "part_of", "rebuilt", "reciprocities", "watch"]

AT_ONCE = 2**24  # elements of one chunk's attention: queries x heads x tokens
PAIRS = 512  # tokens of the segment on which reciprocity is measured
SAMPLES = 4096  # tokens used to fit the maps

# The first part whose ending fits a parameter's name has it.
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("embeddings", ("embedding.weight", "head.weight")),
    ("group level", ("group_level.residual.weight", "group_level.alpha_H")),
    ("query maps", ("projections.query.weight", "projections.gain_H")),
    ("latents", ("projections.latent.weight",)),
    ("values", ("projections.up_HCE",)),
    ("output", ("attention.projections.out.weight", "attention.out.weight")),
    ("gates", ("projections.gate.weight",)),
    ("sinks", ("sink_H",)),
    ("alpha", ("attention.alpha_H",)),
    ("index", ("attention.index_H",)),
    ("far bias", ("far_bias_H",)),
    ("prototypes", ("prototypes_GC",)),
    ("mha qkv", ("attention.qkv.weight",)),
    ("mlp", ("mlp.up.weight", "mlp.down.weight", "mlp.gate.weight")),
    ("norms", ("norm.weight",)),
)


def part_of(name: str) -> str:
    """The part that a parameter belongs to; "other" for one this file does not know."""
    return next((part for part, endings in PARTS if name.endswith(endings)), "other")


# --- attention ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A layer's attention with what it was given."""

    module: CoGAAttention | MultiHeadAttention
    x_BTD: Tensor
    context: CallContext

    @property
    def kind(self) -> str:
        layer = self.module.layer
        return str(layer.group_size) if layer.kind == "group" else layer.kind


@torch.no_grad()
def watch(model: CoGAGPT, tokens_BT: Tensor) -> list[Seen]:
    """Run the model once, in eval mode: what each layer's attention was given."""
    seen: list[Seen] = []
    hooks = [
        block.attention.register_forward_pre_hook(lambda module, inputs: seen.append(Seen(module, *inputs)))
        for block in model.stack
    ]
    was_training = model.training
    model.eval()
    try:
        model(tokens_BT, targets=torch.full_like(tokens_BT, -100))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return seen


def _latent_masses(seen: Seen, position: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Mass over tokens (B, t, H, T), mass of the sink (B, t, H), positions: a chunk of queries at a time."""
    module, x, context = seen.module, seen.x_BTD, seen.context
    assert isinstance(module, CoGAAttention)
    table = context.tables[module.rotary]
    q, latent = module.projections.queries(x, table), module.projections.latents(x, table)
    window = None if module.layer.kind == "full" else module.layer.window
    far: Far | None = None
    order = None
    if module.layer.kind == "group":
        grouping, far = module._groups(x, q, latent, context)
        order = None if grouping is None else grouping.order_BS
        if far is not None and module._opens_all(far.total):
            far, window = None, None
    q, latent = wide(q), wide(latent)
    length, content = latent.shape[1], module.projections.content
    every = torch.arange(length, device=x.device)
    step = max(1, AT_ONCE // (x.shape[0] * q.shape[2] * length))
    for at in position.split(step):
        own, members = far_at(far, at)
        parts = attention_parts(
            q[:, at],
            at,
            latent,
            every,
            content=content,
            window=window,
            band=module.config.band,
            alpha_H=module._alpha(context),
            c_BtC=latent[:, at, :content],
            key_query_BnHC=q[..., :content],
            sink_H=module.sink_H,
            far=own,
            members=members,
        )
        yield token_mass(parts, every, length, own, order), parts.sink_BtH, at


def _mha_masses(seen: Seen, position: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    assert isinstance(seen.module, MultiHeadAttention)
    q, k, _ = seen.module.project(seen.x_BTD, seen.context)
    length = q.shape[1]
    every = torch.arange(length, device=q.device)
    for at in position.split(max(1, AT_ONCE // (q.shape[0] * q.shape[2] * length))):
        score = torch.einsum("bthe,bshe->bths", wide(q[:, at]), wide(k)) * q.shape[-1] ** -0.5
        score = score.masked_fill(every > at[:, None, None], -torch.inf)
        yield score.softmax(-1), None, at


@torch.no_grad()
def entropies(seen: Seen, queries: int) -> tuple[list[float], list[float] | None]:
    """By head: mean of H(p_i)/ln(i) over evenly spaced queries that see two tokens or more; sink mass."""
    length, device = seen.x_BTD.shape[1], seen.x_BTD.device
    position = torch.linspace(1, length - 1, min(queries, length - 1), device=device).round().long()
    masses = _mha_masses if isinstance(seen.module, MultiHeadAttention) else _latent_masses
    ratio, sink = [], []
    for mass_BtHT, sink_BtH, at in masses(seen, position):
        ratio.append(attention_entropy(mass_BtHT, (at + 1)[:, None]))
        if sink_BtH is not None:
            sink.append(sink_BtH)
    mean = torch.cat(ratio, 1).double().mean((0, 1)).tolist()
    return mean, torch.cat(sink, 1).double().mean((0, 1)).tolist() if sink else None


@torch.no_grad()
def reciprocities(seen: Seen, band: int) -> list[float | None]:
    """Correlation of s[i,j] with s[j,i] for each head, on the last tokens of the first row."""
    module = seen.module
    if isinstance(module, MultiHeadAttention):
        q, k, _ = module.project(seen.x_BTD, seen.context)
        score = torch.einsum("the,she->hts", wide(q[0, -PAIRS:]), wide(k[0, -PAIRS:]))
    else:
        table = seen.context.tables[module.rotary]
        q, k = (make(seen.x_BTD, table) for make in (module.projections.queries, module.projections.latents))
        score = torch.einsum("thl,sl->hts", wide(q[0, -PAIRS:]), wide(k[0, -PAIRS:]))
    return [value if math.isfinite(value) else None for value in reciprocity(score, band).tolist()]


# --- keys and values ---------------------------------------------------------------------------------------


@torch.no_grad()
def rebuilt(seen: Seen, widths: Sequence[int]) -> tuple[str, dict[str, list[float]]]:
    """What is rebuilt, and relative errors by latent width of the keys, of the values, and of both."""
    module, x = seen.module, seen.x_BTD.flatten(0, 1)[:SAMPLES]
    if isinstance(module, MultiHeadAttention):
        _, key, value = module.qkv(x).chunk(3, -1)
        source, what = x, "W_k x (before rotation) and W_v x of all heads, from the layer's input x"
    else:
        flat = seen.x_BTD
        key = module.projections.latents(flat, seen.context.tables[module.rotary])
        key = key[..., : module.projections.content]
        source = key = key.flatten(0, 1)[:SAMPLES]
        value = torch.einsum("xc,hce->xhe", key, module.projections.up_HCE).flatten(1)
        what = "content keys c and values W_up c of all heads, from the layer's latent c"
    both = torch.cat([key, value], -1)
    targets = {"keys": key, "values": value, "both": both}
    return what, {name: rank_errors(source, target, widths) for name, target in targets.items()}


# --- gradients ---------------------------------------------------------------------------------------------


def gradient_norms(model: CoGAGPT, tokens_BT: Tensor, targets_BT: Tensor) -> dict[str, Any]:
    """Loss of one training step, and by part and layer the norms of gradient and parameters.

    parts   part -> {gradient, parameters, elements, without: names that got no gradient or a zero one}
    layers  part -> a norm a layer (null where the layer has no such part); embeddings and the last norm are
            in no layer
    """
    was_training = model.training
    model.train()
    model.zero_grad(set_to_none=True)
    out = model(tokens_BT, targets=targets_BT)
    out.total_loss.backward()
    square: dict[tuple[str, int | None], float] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        norm = 0.0 if parameter.grad is None else float(parameter.grad.double().norm())
        entry = parts.setdefault(part, {"gradient": 0.0, "parameters": 0.0, "elements": 0, "without": []})
        entry["gradient"] += norm**2
        entry["parameters"] += float(parameter.detach().double().square().sum())
        entry["elements"] += parameter.numel()
        if norm == 0:
            entry["without"].append(name)
        square[part, layer] = square.get((part, layer), 0.0) + norm**2
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    for entry in parts.values():
        entry["gradient"], entry["parameters"] = entry["gradient"] ** 0.5, entry["parameters"] ** 0.5
    by_layer: dict[str, list[float | None]] = {}
    for part in parts:
        row = [square.get((part, i)) for i in range(model.config.n_layer)]
        if any(value is not None for value in row):
            by_layer[part] = [None if value is None else value**0.5 for value in row]
    loss = float(out.total_loss.detach())
    return {"loss": loss, "parts": parts, "layers": by_layer}
