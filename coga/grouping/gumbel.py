"""Learned groups: a differentiable k-means that starts from prototypes, with Gumbel noise and capacity.

    cos[t, g]  = c_t . m_g / (|c_t| |m_g|)                      m: centroids, from prototypes p_g
    logits     = beta cos;  refine: m_g <- normalise(sum_t softmax_g(logits)[t, g] c_t)
    soft       = softmax_g(logits / tau + noise n),  n ~ Gumbel(0, 1), training only
    hard       = capacity assignment of logits + tau noise n
    weight     = hard + soft - stop_gradient(soft)               (straight-through)

By default the gradient runs through the last refinement step only; the earlier steps pass it straight from
their result to the prototypes, which otherwise would receive none when refine_steps > 1.

Slow prototypes are an exponential average of the learned ones. Without hysteresis all centroids start from
them, and the gradient passes straight through to the learned ones; with it, their choice gets a bonus of
`hysteresis` on the live logits, and so stands unless the live prototypes prefer another group by that margin.

Source: Jang et al. 2017 (Gumbel-softmax); straight-through, Bengio et al. 2013; the rest is CoGA's own.
Cost: 2 refine_steps + 1 products of W x C by C x G a window, twice with hysteresis.

Legend: B batch, N windows, W tokens in a window, G groups in a window, C content width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from coga.config import CoGAConfig, LayerConfig
from coga.grouping.base import BaseGrouping, GroupingContext, make_grouping
from coga.grouping.choice import nearest
from coga.grouping.noise import gumbel
from coga.kernels.dispatch import assign, refine
from coga.kernels.refine import refine_step
from coga.types import Grouping, GroupingStats

# A latent has norm sqrt(C). Near zero, where its direction means nothing, this bounds the gradient (1 / EPS).
CONTENT_EPS = 0.1

__all__ = ["GumbelGrouping", "soft_assignment", "temperature"]


def temperature(step: Tensor | int, start: float, end: float, steps: int) -> Tensor | float:
    """tau at a step: geometric from `start` to `end` over `steps`, then constant."""
    if steps == 0 or start == end:
        return end
    share = (step / steps).clamp(0, 1) if isinstance(step, Tensor) else min(max(step / steps, 0), 1)
    power = share * math.log(end / start)
    return start * (power.exp() if isinstance(power, Tensor) else math.exp(power))


def soft_assignment(
    unit_BNWC: Tensor,
    prototype_GC: Tensor,
    beta: float,
    steps: int,
    through: str = "last",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Logits (B, N, W, G) and centroids (B, N, G, C) after `steps` soft k-means steps in each window.

    With `through` "last" the gradient is that of the last step, passed straight on to the prototypes, and
    the steps before it are one call of `coga.kernels.dispatch.refine`; with "all" it is that of all steps.
    """
    prototype = normalize(prototype_GC, dim=-1).expand(*unit_BNWC.shape[:2], -1, -1)
    centroid, left = prototype, steps
    if through == "last" and steps > 1:
        centroid = refine(unit_BNWC, prototype_GC, beta, steps - 1, backend=backend)
        centroid, left = prototype + (centroid - prototype).detach(), 1
    for _ in range(left):
        centroid = refine_step(unit_BNWC, centroid, beta)
    return beta * (unit_BNWC @ centroid.transpose(-1, -2)), centroid


class GumbelGrouping(BaseGrouping):
    """Learned grouping; equations in the module docstring.

    Parameters: prototypes_GC, unit vectors in content space (renormalised after each update).
    Buffers: slow_GC, the exponential average of the prototypes; use_G, of their use.
    """

    def __init__(self, config: CoGAConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.config = config
        start = normalize(torch.randn(layer.groups, layer.latent_dim), dim=-1)
        self.prototypes_GC = nn.Parameter(start)
        self.register_buffer("slow_GC", start.clone())
        self.register_buffer("use_G", torch.full((layer.groups,), 1 / layer.groups))
        self.slow_GC: Tensor
        self.use_G: Tensor

    def logits(self, unit_BNWC: Tensor, prototype_GC: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
        cfg = self.config
        prototype = prototype_GC.to(unit_BNWC.dtype)
        options = cfg.beta, cfg.refine_steps, cfg.refine_gradient, backend
        return soft_assignment(unit_BNWC, prototype, *options)

    def forward(self, content_BNWC: Tensor, context: GroupingContext) -> Grouping:
        cfg = self.config
        content = content_BNWC if content_BNWC.dtype == torch.float64 else content_BNWC.float()
        batch, windows, width, _ = content.shape
        unit = normalize(content, dim=-1, eps=CONTENT_EPS)
        prototype: Tensor = self.prototypes_GC
        if cfg.slow_prototypes and cfg.hysteresis == 0:
            prototype = prototype + (self.slow_GC - prototype).detach()
        live, _ = self.logits(unit, prototype, context.backend)
        choice = live.detach()
        if cfg.slow_prototypes and cfg.hysteresis > 0:
            slow = self.logits(unit.detach(), self.slow_GC, context.backend)[0].detach()
            choice = choice + cfg.hysteresis * one_hot(nearest(slow), self.groups).to(choice.dtype)
        preferred = nearest(choice)
        tau = temperature(context.step, cfg.tau_start, cfg.tau_end, cfg.tau_steps)
        soft_logits = live / tau
        if context.training and cfg.noise > 0:
            noise = cfg.noise * self._noise(context, batch, windows, width).to(live.dtype)
            soft_logits = soft_logits + noise
            choice = choice + tau * noise
        index = assign(choice.flatten(0, 1), self.slots, backend=context.backend)
        index = index.view(batch, windows, width)
        soft = soft_logits.softmax(-1)
        hard = one_hot(index, self.groups).to(soft.dtype)
        weight = hard + (soft - soft.detach())
        stats = self._stats(live / cfg.beta, weight, preferred, unit, context)
        return make_grouping(index, self.groups, weight, stats)

    def _noise(self, context: GroupingContext, batch: int, windows: int, width: int) -> Tensor:
        device = context.window_BN.device
        place = torch.arange(width, device=device)
        position = (context.window_BN[..., None] * width + place).flatten(1)
        row = torch.arange(batch, device=device)
        seed, layer = self.seed_and_layer.unbind()
        noise = gumbel(seed, context.noise_step, layer, row, position, self.groups)
        return noise.view(batch, windows, width, self.groups)

    def _stats(self, cos, weight, preferred, unit, context: GroupingContext) -> GroupingStats:
        valid = context.valid_BN[..., None].to(cos.dtype)  # (B, N, 1)
        tokens = (valid.sum() * unit.shape[2]).clamp_min(1)
        loss = ((1 - (weight * cos).sum(-1)) * valid).sum() / tokens
        use = (one_hot(preferred, self.groups).to(cos.dtype) * valid[..., None]).sum((0, 1, 2)) / tokens
        candidate = self.prototypes_GC.detach()
        if context.training and self.config.revive > 0 and unit.shape[1]:
            # The tokens that fit their best centroid worst, spread over as many as there are groups.
            fit = cos.detach().amax(-1).masked_fill(valid == 0, torch.inf).flatten()
            count = min(self.groups, fit.numel())
            worst = fit.topk(count, largest=False).indices
            place = torch.arange(self.groups, device=fit.device) % count
            candidate = unit.detach().flatten(0, 2)[worst[place]]
        return GroupingStats(loss, use.detach(), candidate)

    @torch.no_grad()
    def update(self, stats: GroupingStats | None, step: int) -> None:
        """Unit prototypes, their slow average, revival of unused ones, freezing."""
        cfg = self.config
        if self.prototypes_GC.requires_grad:
            self.prototypes_GC.copy_(normalize(self.prototypes_GC, dim=-1))
        if cfg.freeze_step is not None and step >= cfg.freeze_step:
            self.prototypes_GC.requires_grad_(False)
            self.prototypes_GC.grad = None
            return
        if stats is not None and cfg.revive > 0:
            usage = stats.usage_G.to(self.use_G)
            seen = usage.sum() > 0  # else no window was whole: nothing was learned about use
            self.use_G.copy_(torch.where(seen, self.use_G.lerp(usage, 1 - cfg.slow_decay), self.use_G))
            dead = seen & (self.use_G < cfg.revive / self.groups)
            fresh = stats.candidate_GC.to(self.prototypes_GC)
            self.prototypes_GC.copy_(torch.where(dead[:, None], fresh, self.prototypes_GC))
            self.slow_GC.copy_(torch.where(dead[:, None], fresh, self.slow_GC))
            self.use_G.copy_(torch.where(dead, 1 / self.groups, self.use_G))
        self.slow_GC.lerp_(self.prototypes_GC, 1 - cfg.slow_decay)
