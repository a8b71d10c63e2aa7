"""A whole model through the Triton kernels in training mode, in the interpreter (`test_triton_model.py`)."""

from __future__ import annotations

import pytest
import torch
from support import GROUPINGS, LONGEST, W, perturb, real_bytes, small_config

from coga.models import CoGAGPT


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_no_leak_and_every_parameter_learns(grouping):
    """No earlier logit changes with a suffix, to the bit, nor has a gradient by a later hidden state."""
    fade = 3 if grouping in ("gumbel", "contiguous") else 0
    config = small_config(layers="4 full", n_layer=2, grouping=grouping, far_warmup=fade, backend="triton")
    model = perturb(CoGAGPT(config)).train()
    row = real_bytes(1, LONGEST)
    for cut in (2 * W + 1, LONGEST - 1):
        other = row.clone()
        other[:, cut:] = (other[:, cut:] + 1) % 256
        with torch.no_grad():
            a, b = (model(x, noise_step=3).logits for x in (row, other))
        assert torch.equal(a[:, :cut], b[:, :cut])
        assert not torch.equal(a[:, cut:], b[:, cut:])
    hidden = []
    hook = model.embedding.register_forward_hook(lambda m, i, o: hidden.append(o))
    logits = model(row, noise_step=3).logits
    hook.remove()
    cut = 2 * W + 1
    grad = torch.autograd.grad(logits[:, :cut].square().sum(), hidden[0])[0]
    assert grad[:, cut:].abs().max() == 0 and grad[:, :cut].abs().sum() > 0
    model(row, row, noise_step=1).total_loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
