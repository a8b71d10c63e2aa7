"""The parts of an attention module, each beside its own floor.

    floor = max(FLOPs / FLOP/s of a large product, bytes / B/s of a large copy)

FLOPs      by the formulas of `_flops`; backward: twice those of a product, and of attention what no backward
           without stored scores can avoid: the score again, dP, dq, dk, dv; 3 L + 2 C a key for L + C forward
bytes      what a part is given and returns, each once; backward: those, and a gradient of each
not in it  what is gathered more than once: opened members come from L2, K R latents a token; work that is no
           product (the assignment under capacity); that some products are float32

The sums are of parts run one after another, each from memory to memory: a module that fused them could do
with less. Groups are timed forward, and are in both sums as that. A copy writes half of what it moves: a part
that mostly reads, or whose inputs stay in the cache between repeats, may beat its B/s.

Legend: B batch, T tokens, H heads, C content width, L latent width, K opened groups of R tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from _flops import layer_flops
from torch import Tensor

from coga import CoGAConfig
from coga.kernels import dispatch
from coga.models.attention import CoGAAttention
from coga.models.context import CallContext
from coga.models.index import QUERIES, asked, index_loss, index_query

__all__ = ["PARTS_HEAD", "Part", "measure_parts", "part_line", "parts"]

WHOLE = ("projections in", "groups", "attention", "projections out")  # one after another


@dataclass(frozen=True)
class Part:
    """`run(*inputs)` returns tensors. FLOPs are those of a token.

    backward  FLOPs of its gradients, to inputs and `weights`; None where it is timed forward only
    touched   what of the inputs is read, if not all
    """

    name: str
    run: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    flops: float
    backward: float | None = None
    weights: tuple[Tensor, ...] = ()
    touched: tuple[Tensor, ...] | None = None
    compiled: bool = False


def _tensors(found: Any) -> list[Tensor]:
    """The tensors of a result, however it is wrapped."""
    if isinstance(found, Tensor):
        return [found]
    if is_dataclass(found):
        found = vars(found).values()
    elif not isinstance(found, tuple):
        return []
    return [x for one in found for x in _tensors(one)]


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@torch.no_grad()
def parts(module: CoGAAttention, config: CoGAConfig, x_BTD: Tensor, context: CallContext) -> list[Part]:
    """What a "group" module does, on real inputs."""
    layer, projections = module.layer, module.projections
    batch, length, dim = x_BTD.shape
    tokens, heads = batch * length, config.n_head
    content, width = projections.content, projections.width
    table, backend = context.tables[config.rope_dim], context.backend
    plain = config.replace(refine_groups=False, reciprocal_groups=False)
    near = config.replace(layers="near", refine_groups=False, reciprocal_groups=False)
    counted, ours, local = (layer_flops(c, c.layer(0), length) for c in (config, plain, near))
    q, latent, index_q = projections.enter(x_BTD, table, backend, module.index_H)
    if index_q is None:
        index_q = index_query(q, module.index_H)
    windows = length // layer.window
    far = module._groups(x_BTD, q, latent, context, index_q)[1]
    assert far is not None
    options = dict(content=content, band=config.band, alpha_H=module.alpha_H, sink_H=module.sink_H)
    options |= dict(window=layer.window, backend=backend)
    mixed, _ = dispatch.attend(q, latent, far=far, **options)
    score = torch.randn(batch * windows, layer.window, layer.groups, device=x_BTD.device)
    far_inputs = [x for x in (far.group_BML, far.slot_BSL, far.open_BTK) if x is not None]

    def attention(q: Tensor, latent: Tensor, *far_tensors: Tensor) -> Tensor:
        left = list(far_tensors)
        group = None if far.group_BML is None else left.pop(0)
        slot, opened = (None if x is None else left.pop(0) for x in (far.slot_BSL, far.open_BTK))
        here = replace(far, group_BML=group, slot_BSL=slot, open_BTK=opened)
        return dispatch.attend(q, latent, far=here, **options)[0]

    again = (3 * width + 2 * content) / (width + content)
    into = 2.0 * dim * (heads + 1) * width
    out = 2.0 * dim * content + 2.0 * dim * dim * (2 if config.output_gate else 1)
    groups = sum(counted[k] for k in ("grouping", "choices"))
    groups += counted["matrices"] - ours["matrices"] + counted["reads"] - ours["reads"]
    pooled = 2.0 * layer.groups * width * config.reads_summaries
    leaving = (projections.up_HCE, projections.out.weight)
    if projections.gate is not None:
        leaving += (projections.gate.weight,)
    found = [
        Part(
            "projections in",
            lambda x: projections.enter(x, table, backend, module.index_H),
            (x_BTD,),
            into,
            2 * into,
            (projections.query.weight, projections.latent.weight, projections.gain_H),
            compiled=True,
        ),
        Part(
            "groups",
            lambda x, q, latent, index_q: module._groups(x, q, latent, context, index_q)[1],
            (x_BTD, q, latent, index_q),
            groups,
            touched=(x_BTD, latent, index_q) if config.refine_groups else (latent, index_q),
            compiled=True,
        ),
        Part(
            "  of these: assignment of tokens",
            lambda latent: module._form(latent, windows, batch, context),
            (latent[:, : windows * layer.window],),
            ours["grouping"] - pooled,
            compiled=True,
        ),
        Part("  of that: capacity", lambda score: dispatch.assign(score, layer.slots), (score,), 0.0),
        Part("attention", attention, (q, latent, *far_inputs), ours["reads"], again * ours["reads"]),
        Part(
            "  of it: near alone",
            lambda q, latent: dispatch.attend(q, latent, **options)[0],
            (q, latent),
            local["reads"],
            again * local["reads"],
        ),
        Part(
            "projections out",
            lambda mixed, x: projections.output(mixed, x, backend),
            (mixed, x_BTD),
            out,
            2 * out,
            leaving,
            compiled=True,
        ),
    ]
    if layer.open_groups > 0:
        seen = far.group_BML if config.selection == "summary" else far.slot_BSL
        assert seen is not None
        chosen = Part(
            "  of these: selection",
            lambda index_q, _: module.choose(index_q, far, backend),
            (index_q, seen),
            counted["choices"],
        )
        found.insert(4, chosen)
    if module.index_H is not None:
        told = dict(sink_H=module.sink_H, window=layer.window, length_B=None)
        score_BHnT = asked(q, latent, module.sink_H, layer.window, None, QUERIES)[0]
        found.append(
            Part(
                "loss of the head weights",
                lambda q, latent: index_loss(q, latent, module.index_H, **told),
                (q, latent),
                2.0 * width * score_BHnT.numel() / tokens,
                touched=(q[:, : score_BHnT.shape[2]], latent),
                compiled=True,
            )
        )
    return found


def _times(part: Part, time_ms: Callable[[Callable[[], Any]], float]) -> Iterator[tuple[str, float, int]]:
    """(pass, ms, bytes) of a part: "fwd", and "fwd+bwd" where it has one."""
    run = torch.compile(part.run) if part.compiled else part.run

    def forward() -> Any:
        with torch.no_grad():
            return run(*part.inputs)

    read = _bytes(*(part.inputs if part.touched is None else part.touched), *part.weights)
    moved = read + _bytes(*_tensors(forward()))
    yield "fwd", time_ms(forward), moved
    if part.backward is None:
        return
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in part.inputs]
    wanted = [x for x in leaves if x.requires_grad] + list(part.weights)

    def outputs() -> list[Tensor]:
        return [y for y in _tensors(run(*leaves)) if y.requires_grad]

    grads = [torch.randn_like(y) for y in outputs()]

    def both() -> Any:
        return torch.autograd.grad(outputs(), wanted, grads)

    # The backward is given what the forward was given and the gradient of what it returned.
    yield "fwd+bwd", time_ms(both), moved + read + _bytes(*grads, *wanted)


def measure_parts(
    found: list[Part],
    tokens: int,
    roofs: tuple[float, float],
    time_ms: Callable[[Callable[[], Any]], float],
    attempt: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
) -> Iterator[dict[str, Any]]:
    """A row for each part and pass: ms, floor_ms, what bounds it, GFLOP, MB; then their sums, by pass.

    `attempt(name)` is around what may fail: a part that it lets pass has no row, and its pass no sum.
    """
    whole: dict[str, dict[str, dict[str, Any]]] = {"fwd": {}, "fwd+bwd": {}}
    for part in found:
        with attempt(part.name.strip()):
            for kind, ms, moved in _times(part, time_ms):
                flops = tokens * (part.flops + (part.backward or 0.0) * (kind == "fwd+bwd"))
                by = {"FLOPs": 1e3 * flops / roofs[0], "bytes": 1e3 * moved / roofs[1]}
                bound = max(by, key=lambda name: by[name])
                row = {"part": part.name, "pass": kind, "ms": ms, "floor_ms": by[bound], "bound": bound}
                row |= {"gflop": flops / 1e9, "mb": moved / 1e6}
                if part.name in WHOLE:
                    whole[kind][part.name] = row
                    if part.backward is None:
                        whole["fwd+bwd"][part.name] = row
                yield row
    for kind, ours in whole.items():
        if len(ours) == len(WHOLE):
            sums = {k: sum(row[k] for row in ours.values()) for k in ("ms", "floor_ms", "gflop", "mb")}
            yield {"part": "sum: " + ", ".join(WHOLE), "pass": kind, "bound": ""} | sums


PARTS_HEAD = f"{'part':58s}{'pass':9s}{'ms':>8s}{'floor':>8s}{'x':>6s} {'bound':6s}{'GFLOP':>9s}{'MB':>8s}"


def part_line(row: dict[str, Any]) -> str:
    """One row of the table under `PARTS_HEAD`."""
    over = row["ms"] / row["floor_ms"] if row["floor_ms"] else float("nan")
    return (
        f"{row['part']:58s}{row['pass']:9s}{row['ms']:8.3f}{row['floor_ms']:8.3f}{over:6.1f} "
        f"{row['bound']:6s}{row['gflop']:9.0f}{row['mb']:8.0f}"
    )
