"""The far field can be faded in: nearly absent at first, all of it after `far_warmup` steps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from support import assert_close, real_bytes, small_model

from coga.models.attention import FAINTEST

STEPS = 4


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def at_step(step: int, **changes):
    model = small_model(0, layers="near 4 8", far_warmup=STEPS, **changes)
    model.step_count.fill_(step)
    return model


@pytest.mark.filterwarnings("ignore:with_layers")
def test_it_starts_as_the_window_alone_and_ends_as_without_a_warmup():
    tokens = real_bytes(2, 80, 0)
    whole = small_model(0, layers="near 4 8")
    near = logits(whole.with_layers("near"), tokens)
    distances = [float((logits(at_step(step), tokens) - near).norm()) for step in range(STEPS + 2)]
    assert all(a < b for a, b in pairwise(distances[: STEPS + 1]))
    assert distances[0] < 0.1 * distances[STEPS]
    for step in (STEPS, 10 * STEPS):
        assert_close(logits(at_step(step), tokens), logits(whole, tokens))


def test_the_weight_is_geometric():
    model = at_step(1)
    attention, context = model.stack[1].attention, model.call_context(torch.arange(3), None, 0, True)
    bias, shift = attention.far_weights(context)
    assert math.isclose(float(shift.exp()), FAINTEST ** (1 - 1 / STEPS), rel_tol=1e-6)
    assert torch.equal(bias, attention.far_bias_H + shift)
    assert bias.requires_grad and not shift.requires_grad  # a schedule, not a parameter


@pytest.mark.filterwarnings("ignore:with_layers")
def test_opening_everything_is_faded_too():
    """With K >= M the exact kernel would read all of it at full weight."""
    tokens = real_bytes(1, 80, 0)
    opened = at_step(0, open_groups=99)
    full = small_model(0, layers="near 4 8", open_groups=99)
    near, whole = logits(full.with_layers("near"), tokens), logits(full, tokens)
    assert (logits(opened, tokens) - near).norm() < 0.1 * (whole - near).norm()


@pytest.mark.filterwarnings("ignore")  # torch's own, when it looks at a graph's inputs
def test_compiled_blocks_follow_the_schedule_without_compiling_again():
    tokens = real_bytes(1, 80, 0)
    model = at_step(0, train=True)
    plain = [logits(at_step(step, train=True), tokens) for step in range(3)]
    model.compile_blocks(backend="aot_eager")
    logits(model, tokens)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            model.step_count.fill_(step)
            assert_close(logits(model, tokens), plain[step])
