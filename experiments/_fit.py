"""One training run in memory, as fast as the machine allows, and what is measured on it.

AdamW (0.9, 0.95), weight decay 0.1 on matrices only, linear warm-up, cosine to a share of the peak (a tenth),
gradient clipping at 1. Batches are a function of the step, so arms see the same tokens. The loss is fetched a
few times a run; no other step waits for the device.

    bits per byte    mean of -ln p / ln 2 over held-out bytes
    flips            share of fixed held-out tokens that changed group between two probes 100 steps apart (a
                     quarter of the run where that is shorter, scaled to 100 steps and cut at 1), ids matched
                     as well as they can be, noise off; mean over the last quarter
    prototype use    perplexity of the prototypes' shares over G, before capacity, noise off
    dead prototypes  those below a hundredth of the mean share
    divergence       a loss or gradient that is not finite, or a loss that ends a nat above its lowest

Legend: B batch, T tokens, D model width, N windows, W tokens in a window, G groups in a window.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from _common import peak_memory, precision, reset_peak_memory
from _evaluate import by_position, hidden_losses
from _inspect import catch
from torch import Tensor
from tqdm import tqdm

from coga.grouping.metrics import coherence, flip_rate, prototype_use
from coga.models import CoGAGPT
from coga.models.train_graph import GraphedStep, train_step

__all__ = [
    "Fitted",
    "Moments",
    "fit",
    "group_metrics",
    "per_hundred",
    "position_report",
    "rate_at",
    "validate",
]

Batches = Callable[[int], tuple[Tensor, Tensor]]
Moments = dict[str, dict[str, Tensor]]  # state of AdamW by name of the parameter
FETCHES = 20  # times a run at which the loss is read back
CLIP = 1.0
GAP = 100  # steps between two probes
DEAD = 0.01
RISEN = 1.0  # nats


@dataclass
class Fitted:
    """What training left.

    losses      (step, mean nats a token since the last entry); grad_norms: the largest of the same steps
    probes      (step, group ids (N, W) and G by layer) of the probe's tokens
    seconds     of training, probes left out, compilation included; tokens_per_second: without the first steps
    moments     of AdamW at the end, on the CPU, where they were asked for
    """

    steps: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    probes: list[tuple[int, dict[int, tuple[np.ndarray, int]]]] = field(default_factory=list)
    diverged: bool = False
    seconds: float = 0.0
    tokens: int = 0
    tokens_per_second: float | None = None
    peak_bytes: int = 0
    grad_norms: list[float] = field(default_factory=list)
    moments: Moments = field(default_factory=dict)

    def follows(self, before: Fitted) -> None:
        """Take over the curves of the part of the run that came before, and judge the whole."""
        self.losses = before.losses + self.losses
        self.grad_norms = before.grad_norms + self.grad_norms
        self.peak_bytes = max(before.peak_bytes, self.peak_bytes)
        self.diverged = self.diverged or before.diverged or self.risen

    @property
    def risen(self) -> bool:
        """Whether the loss ends a nat above its lowest."""
        values = [value for _, value in self.losses]
        return bool(values) and values[-1] > min(values) + RISEN

    @property
    def worst_rise(self) -> float:
        """The most the loss stood above its lowest before, in nats: a spike that healed shows here alone."""
        values = np.array([value for _, value in self.losses])
        return float((values - np.minimum.accumulate(values)).max()) if len(values) else 0.0

    @property
    def flip_curve(self) -> list[tuple[int, int, float]]:
        """(step, steps since the probe before, share that changed group), mean over layers with groups."""
        found = []
        for (a, before), (b, after) in pairwise(self.probes):
            rates = [flip_rate(before[i][0], index, groups) for i, (index, groups) in after.items()]
            if rates:
                found.append((b, b - a, float(np.mean(rates))))
        return found

    @property
    def flips(self) -> dict[str, float | None]:
        """Mean over the last quarter: as measured, over how many steps, and per 100 steps."""
        last = [one for one in self.flip_curve if one[0] - one[1] >= self.steps - max(1, self.steps // 4)]
        if self.diverged or not last:
            return {"flip_rate": None, "flip_steps": None, "flip_rate_100": None}
        return {
            "flip_rate": float(np.mean([rate for _, _, rate in last])),
            "flip_steps": last[-1][1],
            "flip_rate_100": float(np.mean([per_hundred(gap, rate) for _, gap, rate in last])),
        }


def per_hundred(gap: int, rate: float) -> float:
    """A rate over `gap` steps scaled to 100; linear, which is an upper bound, and at most 1."""
    return min(1.0, rate * 100 / gap)


def rate_at(step: int, steps: int, peak: float, warmup: int, floor: float = 0.1) -> float:
    """Learning rate: linear rise over `warmup` steps, then a cosine down to floor x peak at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def make_optimizer(
    model: CoGAGPT, lr: float, device: torch.device, graphed: bool = False, prototype_lr: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW; prototypes learn at `prototype_lr` times the rate of the rest."""
    kept = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    prototypes = [p for name, p in kept if name.endswith("prototypes_GC")]
    rest = [p for name, p in kept if not name.endswith("prototypes_GC")]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.1, "scale": 1.0},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "scale": 1.0},
        {"params": prototypes, "weight_decay": 0.0, "scale": prototype_lr},  # unit vectors: nothing to decay
    ]
    fused = device.type == "cuda"
    made = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=(0.9, 0.95),
        fused=fused,
        capturable=graphed,
    )
    if graphed:  # what a recorded step reads
        for group in made.param_groups:
            group["lr"] = torch.tensor(lr, device=device)
    return made


def _give_moments(model: CoGAGPT, optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """Parameters that are not named start with none."""
    for name, p in model.named_parameters():
        if name in moments:
            optimizer.state[p] = {key: x.to(p.device, copy=True) for key, x in moments[name].items()}


def _take_moments(model: CoGAGPT, optimizer: torch.optim.Optimizer) -> Moments:
    named = ((name, optimizer.state.get(p, {})) for name, p in model.named_parameters())
    return {name: {key: x.detach().cpu().clone() for key, x in one.items()} for name, one in named if one}


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        own = rate * group["scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def _to(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Onto the device without waiting for it."""
    if device.type == "cuda":
        return [x.pin_memory().to(device, non_blocking=True) for x in tensors]
    return [x.to(device) for x in tensors]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def _probe(model: CoGAGPT, tokens_T: Tensor) -> dict[int, tuple[np.ndarray, int]]:
    """Group ids (N, W) and G of each layer with groups on fixed tokens, noise off."""
    was_training = model.training
    model.eval()
    with precision(tokens_T.device):
        out = model(tokens_T[None], return_grouping=True, return_logits=False)
    model.train(was_training)
    found = {}
    for i, grouping in enumerate(out.grouping or []):
        if grouping is not None and grouping.index_BNW.numel():
            found[i] = (grouping.index_BNW[0].cpu().numpy(), model.config.layer(i).groups)
    return found


def _probe_steps(steps: int) -> set[int]:
    """From the last step backwards, `GAP` apart or a quarter of the run."""
    return set(range(steps, 0, -min(GAP, max(1, steps // 4))))


@contextmanager
def _unchecked(model: CoGAGPT, device: torch.device) -> Iterator[None]:
    """On a GPU: no check of token ids, which reads them back and so waits for it; the source is checked."""
    if device.type == "cuda":
        model._check_range = lambda *args, **options: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        model.__dict__.pop("_check_range", None)


def fit(
    model: CoGAGPT,
    batches: Batches,
    steps: int,
    *,
    lr: float,
    warmup: int,
    device: torch.device,
    floor: float = 0.1,
    prototype_lr: float = 1.0,
    first: int = 0,
    last: int | None = None,
    moments: Moments | None = None,
    keep_moments: bool = False,
    probe_T: Tensor | None = None,
    compiled: bool = False,
    graphed: bool = False,
    title: str = "",
) -> Fitted:
    """Train `model` in place, from step `first` to before step `last` of a schedule of `steps`.

    batches  step -> tokens and next tokens, (B, T) int64 on the host; probe_T: on the device
    floor    learning rate at the end of the schedule, over its peak
    prototype_lr  learning rate of prototypes over that of the rest
    moments  of AdamW at the start (none); keep_moments: hand them back
    graphed  record the step as a CUDA graph (same numbers, no waiting for the host; needs a GPU)
    A loss or gradient that is not finite ends the run: `diverged`.
    """
    found = Fitted(steps)
    model.train()
    reset_peak_memory(device)
    optimizer = make_optimizer(model, lr, device, graphed, prototype_lr)
    _give_moments(model, optimizer, moments or {})
    if compiled:
        model.compile_blocks()  # models of the same shape share what is compiled
    recorded = GraphedStep(model, optimizer, clip=CLIP) if graphed else None
    if recorded is not None:
        recorded.noise_step.fill_(first)
    last = steps if last is None else last
    count = last - first
    every, probed = max(1, count // FETCHES), _probe_steps(steps) if probe_T is not None else set()
    steady = first + min(count - 1, max(1, min(20, count // 4)))
    pending: list[Tensor] = []
    norms: list[Tensor] = []
    paused, counted, paused_before = 0.0, 0, 0.0
    since = began = time.monotonic()
    bar = tqdm(total=count, desc=title, unit="step", dynamic_ncols=True, mininterval=0.5, leave=False)
    with bar, _unchecked(model, device):
        for step in range(first, last):
            if step == steady:
                _wait(device)
                since, paused_before, counted = time.monotonic(), paused, found.tokens
            _set_rate(optimizer, rate_at(step, steps, lr, warmup, floor))
            tokens, targets = _to(device, *batches(step))
            if recorded is not None:
                loss, norm = recorded(tokens, targets)
            else:
                given = model, optimizer, tokens, targets, step
                loss, norm = train_step(*given, clip=CLIP, autocast=precision(device))
            pending.append(loss)
            norms.append(norm)
            found.tokens += tokens.numel()
            if (step + 1 - first) % every == 0 or step + 1 == last:
                value, largest = float(torch.stack(pending).mean()), float(torch.stack(norms).max())
                pending.clear()
                norms.clear()
                found.losses.append((step + 1, value))
                found.grad_norms.append(largest)
                bar.update(step + 1 - first - bar.n)
                bar.set_postfix_str(f"loss {value:.3f}")
                if not (math.isfinite(value) and math.isfinite(largest)):
                    found.diverged = True
                    break
            if step + 1 in probed:
                _wait(device)
                pause = time.monotonic()
                found.probes.append((step + 1, _probe(model, probe_T)))
                paused += time.monotonic() - pause
        _wait(device)
        now = time.monotonic()
    found.seconds = now - began - paused
    steady_seconds = now - since - (paused - paused_before)
    if found.tokens > counted and steady_seconds > 0:
        found.tokens_per_second = (found.tokens - counted) / steady_seconds
    found.peak_bytes = peak_memory(device)
    if keep_moments:
        found.moments = _take_moments(model, optimizer)
    found.diverged = found.diverged or found.risen
    return found


@torch.no_grad()
def validate(
    model: CoGAGPT, tokens_BT: Tensor, targets_BT: Tensor, device: torch.device, batch: int
) -> tuple[Tensor, list[Tensor | None]]:
    """-ln p by position (T,), float64, mean over contexts; and by layer the use of its prototypes (G,)."""
    was_training = model.training
    model.eval()
    hidden: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    total = torch.zeros(tokens_BT.shape[1], dtype=torch.float64, device=device)
    used: list[Tensor | None] = [None] * model.config.n_layer
    try:
        for x, y in zip(tokens_BT.split(batch), targets_BT.split(batch)):
            with precision(device):
                out = model(x.to(device), return_logits=False)
            loss = hidden_losses(model, hidden.pop().flatten(0, 1), y.to(device).flatten())
            total += loss.view(y.shape).sum(0)
            for i, stats in enumerate(out.stats):
                if stats is not None:
                    use = stats.usage_G.double() * (len(x) / len(tokens_BT))
                    used[i] = use if used[i] is None else used[i] + use
    finally:
        hook.remove()
        model.train(was_training)
    return total.cpu() / len(tokens_BT), [None if u is None else u.cpu() for u in used]


def position_report(loss_T: Tensor, beyond: int) -> dict[str, Any]:
    """Bits per byte overall, in equal buckets of position, and at positions >= `beyond`."""
    bits = loss_T.numpy() / math.log(2)
    far = float(bits[beyond:].mean()) if beyond < len(bits) else None
    return by_position(bits) | {"beyond_bits_per_byte": far, "beyond": beyond}


def group_metrics(model: CoGAGPT, used: list[Tensor | None], probe_T: Tensor) -> dict[str, Any]:
    """Use of prototypes (mean and worst layer), dead ones, coherence of the groups of the probe."""
    shares = [u for u in used if u is not None and float(u.sum()) > 0]
    uses = [prototype_use(u) for u in shares]
    found: dict[str, Any] = {
        "prototype_use": float(np.mean(uses)) if uses else None,
        "prototype_use_worst": min(uses) if uses else None,
        "prototypes": sum(len(u) for u in shares) or None,
        "dead_prototypes": sum(int((u < DEAD * u.sum() / len(u)).sum()) for u in shares) if shares else None,
    }
    was_training = model.training
    model.eval()
    with precision(probe_T.device):
        caught = [one for one in catch(model, probe_T) if one.index_NW.size]
    model.train(was_training)
    each = [coherence(one.content_NWC, one.index_NW, one.layer.groups) for one in caught]
    for name in ("inside", "between"):
        values = [one[name] for one in each if math.isfinite(one[name])]
        found[f"coherence_{name}"] = float(np.mean(values)) if values else None
    return found
