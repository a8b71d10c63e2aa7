"""What the tests of the model share: small models with every parameter set, real bytes, pairwise cases.

Widths differ from one another on purpose (H 3, D 15, E 5, C 6, P 4, W 16), so that no axis can stand in for
another. Legend: B rows, T tokens, W window, R group size.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coga import CoGAConfig
from coga.grouping import GumbelGrouping
from coga.models import CoGAGPT

W = 16
LENGTHS = (1, 2, W - 1, W, W + 1, 2 * W, 2 * W + 1, 3 * W + 5)
LONGEST = 3 * W + 5
GROUPINGS = ("gumbel", "contiguous", "kmeans", "random")
# Group sizes from single tokens to the whole window, and every named layer.
PATTERNS = ("near 4 8", "8", "4 full", "mha 4", "16 near", "1", "8 4 16", "near", "full mha")
F64 = torch.float64

SMALL: dict[str, Any] = dict(
    n_layer=3, n_head=3, d_model=15, latent_dim=6, rope_dim=4, window=W, band=7, open_groups=2,
    mlp_ratio=2.0, layers="near 4 8", max_len=512, noise=8.0,
    refine_groups=True, reciprocal_groups=True, coherence_weight=0.01, revive=0.1, selection="summary",
    summaries=True, slow_prototypes=True, output_gate=True, capacity_factor=1.0,
)  # fmt: skip


def small_config(**changes: Any) -> CoGAConfig:
    return CoGAConfig(**{**SMALL, **changes})


@torch.no_grad()
def perturb(model: CoGAGPT, seed: int = 0) -> CoGAGPT:
    """Give every parameter a value of order one: nothing stays at its zero, or its small, initial value.

    Maps get entries of variance 1/fan_in, vectors move by 0.3, live and slow prototypes differ.
    """
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=draw, dtype=F64)
        if parameter.ndim == 1:
            value = parameter.to(F64) + 0.3 * noise
        elif name.endswith("embedding.weight"):
            value = noise
        else:
            fan_in = parameter.shape[-2] if name.endswith("up_HCE") else parameter.shape[-1]
            value = noise * fan_in**-0.5
        parameter.copy_(value)
    for module in model.modules():
        if isinstance(module, GumbelGrouping):
            module.prototypes_GC.copy_(torch.nn.functional.normalize(module.prototypes_GC, dim=-1))
            mixed = module.prototypes_GC + 0.5 * torch.randn(module.slow_GC.shape, generator=draw)
            module.slow_GC.copy_(torch.nn.functional.normalize(mixed, dim=-1))
    return model


def small_model(seed: int = 0, dtype: torch.dtype = F64, train: bool = False, **changes: Any) -> CoGAGPT:
    """A perturbed model of `small_config`."""
    model = CoGAGPT(small_config(**changes)).to(dtype)
    return perturb(model, seed).train(train)


def real_bytes(rows: int, length: int, seed: int = 0) -> Tensor:
    """Rows of sample.txt, an old version of this file: text with many equal bytes, which no edit changes."""
    source = Path(__file__).with_name("sample.txt").read_bytes()
    start = torch.randint(0, len(source) - length, (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor([list(source[i : i + length]) for i in start.tolist()])


def random_tokens(rows: int, length: int, seed: int = 0, vocab: int = 256) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def make_tokens(kind: str, rows: int, length: int, seed: int = 0) -> Tensor:
    return {"bytes": real_bytes, "random": random_tokens}[kind](rows, length, seed)


READINGS = ("summary", "members", "members alone")


def read_by(case: Mapping[str, Any]) -> dict[str, Any]:
    """The case with its "selection", one of `READINGS`, as fields of a configuration.

    "members alone": groups are opened for their members, and the others are not read at all.
    """
    found = dict(case)
    if found["selection"] == "members alone":
        opened = found.get("open_groups", 2) or 2
        found |= dict(selection="members", summaries=False, refine_groups=False, open_groups=opened)
    return found


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations in which every pair of values of two factors occurs at least once (greedily)."""
    names = list(factors)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    cases = []
    while missing:
        a, i, b, j = min(missing)
        chosen = {a: i, b: j}
        for name in names:
            if name not in chosen:
                chosen[name] = _best(name, chosen, factors, missing, len(cases))
        missing -= set(_pairs(names, chosen))
        cases.append({name: factors[name][chosen[name]] for name in names})
    return cases


def _pairs(names: list[str], chosen: dict[str, int]) -> Iterator[tuple[str, int, str, int]]:
    for a, b in itertools.combinations(names, 2):
        if a in chosen and b in chosen:
            yield a, chosen[a], b, chosen[b]


def _best(name: str, chosen: dict[str, int], factors, missing: set, turn: int) -> int:
    """The value of `name` that covers most missing pairs; among equals they take turns."""
    count = len(factors[name])

    def gain(i: int) -> tuple[int, int]:
        return len(missing & set(_pairs(list(factors), {**chosen, name: i}))), -((i - turn) % count)

    return max(range(count), key=gain)


def case_id(case: Mapping[str, Any]) -> str:
    return "-".join(f"{k}={v}".replace(" ", "_") for k, v in case.items())


def other_layers(model: CoGAGPT, layers: str, **changes: Any) -> CoGAGPT:
    """`with_layers` without its report on missing and unused weights, which has a test of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model.with_layers(layers, **changes)


@contextmanager
def opened_path(model: CoGAGPT) -> Iterator[None]:
    """Take the path through opened groups even where the exact kernel would do the same (K >= M)."""
    modules = [m for m in model.modules() if hasattr(m, "route_full")]
    for module in modules:
        module.route_full = False
    yield
    for module in modules:
        module.route_full = True


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out
