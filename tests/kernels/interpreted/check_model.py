"""A whole model through the Triton kernels in training mode, in the interpreter (`test_triton_model.py`)."""

from __future__ import annotations

import pytest
import torch
from support import GROUPINGS, READINGS, W, perturb, read_by, real_bytes, small_config

from coga.models import CoGAGPT

# Groups with room for half as many members again: tiles run over a list of members.
ROOMY = dict(layers="16 full", window=2 * W, capacity_factor=1.5)
# The default's: twice as many, and more groups than two.
TWICE = dict(layers="8 full", window=2 * W, capacity_factor=2.0)
UNGATED = {"output_gate": False}


@pytest.mark.parametrize(
    ("grouping", "changes"),
    [
        *((name, {}) for name in GROUPINGS),
        ("gumbel", ROOMY),
        ("random", ROOMY | UNGATED),
        ("kmeans", TWICE | UNGATED),
    ],
    ids=[*GROUPINGS, "gumbel-roomy", "random-roomy-no-gate", "kmeans-twice-no-gate"],
)
@pytest.mark.parametrize("selection", READINGS)
def test_no_leak_and_every_parameter_learns(selection, grouping, changes):
    """No earlier logit changes with a suffix, to the bit, nor has a gradient by a later hidden state."""
    fade = 3 if grouping in ("gumbel", "contiguous") else 0
    own = {"layers": "4 full", "n_layer": 2, "grouping": grouping, "far_warmup": fade, **changes}
    config = small_config(backend="triton", **read_by(own | {"selection": selection}))
    model = perturb(CoGAGPT(config)).train()
    window = config.layer(0).window
    longest = 3 * window + 5
    row = real_bytes(1, longest)
    with torch.no_grad():
        a = model(row, noise_step=3).logits
    for cut in (window + 1, 2 * window + 1, longest - 1):  # the first of a group that is read, and beyond
        other = row.clone()
        other[:, cut:] = (other[:, cut:] + 1) % 256
        with torch.no_grad():
            b = model(other, noise_step=3).logits
        assert torch.equal(a[:, :cut], b[:, :cut])
        assert not torch.equal(a[:, cut:], b[:, cut:])
    hidden = []
    hook = model.embedding.register_forward_hook(lambda m, i, o: hidden.append(o))
    logits = model(row, noise_step=3).logits
    hook.remove()
    cut = 2 * window + 1
    grad = torch.autograd.grad(logits[:, :cut].square().sum(), hidden[0])[0]
    assert grad[:, cut:].abs().max() == 0 and grad[:, :cut].abs().sum() > 0
    model(row, row, noise_step=1).total_loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
