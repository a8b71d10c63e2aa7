"""Oracle 5: no token sees a later one. Suffixes are changed, never cut, at every cut of a sequence.

One batch holds a row for each cut: rows before and after the change have the same shape and the same noise,
so every earlier logit must be the same to the last bit, and its gradient by any later hidden state zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import (
    GROUPINGS,
    LENGTHS,
    LONGEST,
    PATTERNS,
    READINGS,
    case_id,
    make_tokens,
    pairwise,
    random_tokens,
    read_by,
    small_model,
)
from torch import Tensor

from coga.kernels import reference
from coga.models import CoGAGPT
from coga.models import attention as attention_module

FACTORS: dict[str, Sequence[Any]] = dict(
    layers=PATTERNS,
    grouping=GROUPINGS,
    length=LENGTHS,
    tokens=("bytes", "random"),
    train=(True, False),
    dtype=(torch.float64, torch.float32),
    open_groups=(2, 0, 99),
    capacity_factor=(1.0, 1.5, 2.0),
    refine_groups=(True, False),
    hysteresis=(0.0, 0.5),
    far_warmup=(0, 3),
    selection=READINGS,
    output_gate=(True, False),
)
CASES = pairwise(FACTORS)
# Pairs of values leave triples open: every grouping by every reading, and every pattern with and without the
# gate, in training and in evaluation.
MODES = (("grouping", "selection", "train"), ("layers", "output_gate", "train"))
PLAIN: dict[str, Any] = dict(
    layers="8 4 16", grouping="gumbel", length=LONGEST, tokens="bytes", dtype=torch.float64, open_groups=2,
    capacity_factor=1.5, refine_groups=True, hysteresis=0.0, far_warmup=0, selection="members",
    output_gate=False,
)  # fmt: skip


def left_open(names: tuple[str, ...]) -> list[tuple]:
    """Combinations of the values of these factors that no case has."""
    seen = {tuple(case[name] for name in names) for case in CASES}
    return [each for each in itertools.product(*(FACTORS[name] for name in names)) if each not in seen]


for names in MODES:
    CASES += [PLAIN | dict(zip(names, values, strict=True)) for values in left_open(names)]


def leaks(model: CoGAGPT, tokens: str, length: int, seed: int) -> int:
    """How many (cut, earlier position) pairs have logits that a change of the whole suffix alters."""
    row = make_tokens(tokens, 1, length, seed)
    before = row.repeat(length, 1)
    cut = torch.arange(1, length + 1)[:, None]
    late = torch.arange(length) >= cut
    after = torch.where(late, (before + 1 + random_tokens(length, length, seed + 1, 255)) % 256, before)
    assert (after != before).eq(late).all()
    with torch.no_grad():
        first, second = (model(x, noise_step=seed).logits for x in (before, after))
    assert first.isfinite().all()
    if length > 1:
        assert (first != second)[late].any(), "the change reaches nothing: the test shows nothing"
    return int((first != second).any(-1)[~late].sum())


def gradient_leaks(model: CoGAGPT, tokens: str, length: int, seed: int) -> int:
    """How many hidden states after a cut have a gradient from the logits before it; every layer's input."""
    kept: list[Tensor] = []

    def keep(module, args, output):
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden.retain_grad()
        kept.append(hidden)

    hooks = [m.register_forward_hook(keep) for m in (model.embedding, *model.stack)]
    batch = make_tokens(tokens, 1, length, seed).repeat(length, 1)
    early = torch.arange(length) < torch.arange(1, length + 1)[:, None]
    logits = model(batch, noise_step=seed).logits
    weight = random_tokens(length * length, 256, seed).view(length, length, 256).to(logits) - 128
    (logits * weight * early[..., None]).sum().backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    gradients = [x.grad for x in kept]
    assert all(g[early].any() and g.isfinite().all() for g in gradients)
    return sum(int((g != 0).any(-1)[~early].sum()) for g in gradients)


def build(case: dict, seed: int) -> CoGAGPT:
    case = {k: v for k, v in case.items() if k not in ("length", "tokens")}
    return small_model(seed, case.pop("dtype"), case.pop("train"), **case)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: case_id(CASES[i]))
def test_no_suffix_changes_an_earlier_logit(number):
    case = read_by(CASES[number])
    model = build(case, number)
    for length in {case["length"], LONGEST}:
        assert leaks(model, case["tokens"], length, number) == 0


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: case_id(CASES[i]))
def test_no_earlier_logit_has_a_gradient_by_a_later_hidden_state(number):
    case = read_by(CASES[number])
    assert gradient_leaks(build(case, number), case["tokens"], LONGEST, number) == 0


@pytest.mark.filterwarnings("ignore")  # torch's own, when it looks at a graph's inputs
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_blocks_compiled_one_by_one_leak_nothing(grouping):
    """Training mode with noise; `leaks` also asserts that the changed suffix reaches later logits."""
    model = small_model(layers="near 4", n_layer=2, train=True, grouping=grouping)
    model.compile_blocks(backend="aot_eager")
    assert leaks(model, "bytes", LONGEST, 0) == 0


def test_the_seeds_cover_what_the_oracle_asks():
    assert len(CASES) >= 20
    seen = {(c["layers"], c["grouping"]) for c in CASES}
    assert len(seen) == len(PATTERNS) * len(GROUPINGS)
    assert not any(left_open(names) for names in MODES)


class WholeSequenceMean(torch.nn.Module):
    """A grouping that leaks: it subtracts the mean of ALL windows before it looks for groups."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, content_BNWC, context):
        return self.inner(content_BNWC - content_BNWC.mean((1, 2), keepdim=True), context)


@pytest.mark.parametrize("grouping", ["gumbel", "kmeans"])
def test_a_grouping_that_subtracts_a_whole_sequence_mean_is_caught(grouping):
    model = small_model(layers="4 8", grouping=grouping, open_groups=2)
    assert leaks(model, "bytes", LONGEST + 16, 0) == 0
    for block in model.stack:
        block.attention.grouping = WholeSequenceMean(block.attention.grouping)
    assert leaks(model, "bytes", LONGEST + 16, 0) > 0
    if grouping == "gumbel":
        assert gradient_leaks(model, "bytes", LONGEST + 16, 0) > 0


def test_a_selection_shared_by_the_mean_of_neighbours_is_caught(monkeypatch):
    model = small_model(layers="4")
    select = attention_module.dispatch.select

    def shared(q, *args, **options):
        block = torch.arange(q.shape[1]) // 4
        mean = torch.stack([q[:, block == b].mean(1) for b in block.unique()], 1)
        return select(mean[:, block], *args, **options)

    monkeypatch.setattr(attention_module.dispatch, "select", shared)
    assert leaks(model, "bytes", LONGEST, 0) > 0


def test_groups_read_one_window_too_early_are_caught(monkeypatch):
    """Both ways of looking must see it: the bits and the gradient."""
    model = small_model(layers="4", open_groups=0)
    monkeypatch.setattr(reference, "_far_chunk", lambda far, *bounds: far)
    monkeypatch.setattr(
        reference, "visible_groups", lambda position, window, groups: (position // window) * 99
    )
    monkeypatch.setattr(reference, "CHUNK", 24)  # chunks that cross windows, so that the masks are used
    assert leaks(model, "bytes", LONGEST + 16, 0) > 0
    assert gradient_leaks(model, "bytes", LONGEST + 16, 0) > 0
