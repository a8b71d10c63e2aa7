"""Narrower latents for a trained model: most of what a latent of width C says fits into fewer channels.

    U = the C' leading eigenvectors of sum_t c_t c_t^T over a text                    (C, C')
    W_c' = U^T W_c,  W_q,h' = U^T W_q,h,  W_up,h' = sqrt(r C / C') U^T W_up,h
    p_g' = U^T p_g, normalised
    gain_h' = gain_h sum s s' / sum s'^2,  s, s': scores before and after

r is the share of |c|^2 that U keeps: latents are normalised to sqrt(C') again, so values grow by the inverse.
With C' = C nothing changes but the basis. Otherwise train on; sanity.py shows the error against C.

Source: principal components (Pearson, 1901), as in the conversion of trained models to latent attention,
MHA2MLA (2025) and TransMLA (2025). Legend: B batch, T tokens, D model, H heads, L = C + P.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import normalize

from coga.grouping.gumbel import GumbelGrouping
from coga.kernels.reference import wide
from coga.models.attention import CoGAAttention
from coga.models.gpt import CoGAGPT
from coga.models.prototypes import Hooked, check_rows, visit

__all__ = ["shrink_latents"]

ASKED = 256  # tokens of a row whose scores are compared


def _scores(q_BTHL: Tensor, latent_BTL: Tensor) -> Tensor:
    """Scores among evenly spaced tokens of each row, (B, H, n, n), 0 for later ones."""
    every = -(-q_BTHL.shape[1] // ASKED)
    q, latent = wide(q_BTHL[:, ::every]), wide(latent_BTL[:, ::every])
    return torch.einsum("bihl,bjl->bhij", q, latent).tril()


def _basis(content_BTC: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Leading directions of the rows (C, C'), and the share of their squares that they keep."""
    rows = wide(content_BTC).flatten(0, 1)
    value, vector = torch.linalg.eigh(rows.T @ rows)  # ascending
    return vector[:, -width:], value[-width:].sum() / value.sum()


@torch.no_grad()
def shrink_latents(model: CoGAGPT, latent_dim: int | tuple[int, ...], tokens_BT: Tensor) -> CoGAGPT:
    """A copy with content latents of width `latent_dim`, one or one per layer.

    tokens_BT  a text the model is to be used on; layers are fitted from the first to the last in one pass
    ValueError: latent_dim is wider than a layer's, or groups attend to groups (`refine_groups`).
    """
    config = model.config.replace(latent_dim=latent_dim)
    check_rows(tokens_BT)
    for i in range(config.n_layer):
        before = model.config.layer(i).latent_dim
        if config.layer(i).latent_dim > before:
            raise ValueError(f"latent_dim={latent_dim!r}: must be at most {before}, that of layer {i}")
    if config.refine_groups:
        raise ValueError("refine_groups=True: must be off where latents are shrunk")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is fitted below
        narrow = model.with_layers(config.layers, latent_dim=latent_dim)

    def fit_from(old: CoGAAttention):
        def fit(module: CoGAAttention, arguments: tuple) -> None:
            x_BTD, context = arguments
            theirs, ours = old.projections, module.projections
            table = context.tables[ours.rotary]
            q, latent = theirs.queries(x_BTD, table), theirs.latents(x_BTD, table)
            basis, kept = _basis(latent[..., : theirs.content], ours.content)
            rows = theirs.latent.weight
            turned = basis.T @ wide(rows[: theirs.content])
            ours.latent.weight.copy_(torch.cat([turned, wide(rows[theirs.content :])]))
            heads_HLD = wide(theirs.query.weight).unflatten(0, (theirs.heads, theirs.width))
            turned = basis.T @ heads_HLD[:, : theirs.content]
            queries = torch.cat([turned, heads_HLD[:, theirs.content :]], 1)
            ours.query.weight.copy_(queries.flatten(0, 1))
            scale = (kept * theirs.content / ours.content).sqrt()
            ours.up_HCE.copy_(scale * (basis.T @ wide(theirs.up_HCE)))
            if isinstance(module.grouping, GumbelGrouping):
                assert isinstance(old.grouping, GumbelGrouping)
                for name in ("prototypes_GC", "slow_GC"):
                    found = normalize(wide(getattr(old.grouping, name)) @ basis, dim=-1)
                    getattr(module.grouping, name).copy_(found)
            before = _scores(q, latent)
            after = _scores(ours.queries(x_BTD, table), ours.latents(x_BTD, table))
            slope_H = (before * after).sum((0, 2, 3)) / after.square().sum((0, 2, 3)).clamp_min(1e-12)
            # A head whose scores are lost altogether keeps its gain.
            ours.gain_H.mul_(torch.where(slope_H > 0, slope_H, 1.0).to(ours.gain_H.dtype))

        return fit

    hooked: list[Hooked] = [
        (new, fit_from(old))
        for new, old in zip(narrow.modules(), model.modules(), strict=True)
        if isinstance(new, CoGAAttention)
        and isinstance(old, CoGAAttention)
        and new.projections.content < old.projections.content
    ]
    narrow.step_count.copy_(model.step_count)  # prototypes are no fresh ones
    visit(narrow, hooked, tokens_BT)
    return narrow
