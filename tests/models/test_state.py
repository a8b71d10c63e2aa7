"""What decoding keeps: measured bytes equal the formula, and the formula is as small as promised."""

from __future__ import annotations

import pytest
import torch
from support import LONGEST, PATTERNS, case_id, pairwise, real_bytes, small_config, small_model

from coga import CoGAConfig
from coga.models import CoGAGPT
from coga.models.state import mha_bytes, state_bytes_formula

CASES = pairwise(
    dict(
        layers=PATTERNS,
        open_groups=(0, 2),
        refine_groups=(True, False),
        reciprocal=(True, False),
        reciprocal_groups=(True, False),
        band=(0, 7),
        dtype=(torch.float64, torch.float32, torch.bfloat16),
        window=(16, (16, 32, 16)),
        max_len=(LONGEST, 100),
    )
)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: case_id(CASES[i]))
def test_measured_bytes_are_the_formula(number):
    case = dict(CASES[number])
    dtype, limit = case.pop("dtype"), case.pop("max_len")
    model = small_model(number, dtype, **case)
    state = model.new_state(3, limit)
    model.step(real_bytes(3, LONGEST), state)
    size = torch.empty((), dtype=dtype).element_size()
    want = state_bytes_formula(model.config, limit, batch=3, element_size=size)
    assert [layer.bytes() for layer in state.layers] == want
    held = sum(x.untyped_storage().nbytes() for layer in state.layers for x in layer.tensors.values())
    assert state.bytes() == sum(want) == held


def test_the_formula_written_out():
    """Counted by hand for one layer of each kind: W 16, H 3, C 6, P 4, D 15, T 50, so 3 closed windows."""
    config = small_config(n_layer=4, layers="near full mha 4", open_groups=2)
    latent, band = 10, 7 * 3 * 6
    near = 32 * latent + band
    group = near + 12 * latent + 48 * latent + 16 * 15 + 4 * 3 * 6
    sizes = 12 * 4
    want = [near * 8, (50 * latent + band) * 8, 50 * 2 * 15 * 8, group * 8 + sizes]
    assert state_bytes_formula(config, 50, element_size=8) == want
    assert mha_bytes(config, 50, element_size=8) == want[2]


GPT2 = dict(latent_dim=128, rope_dim=32, backend="reference")
LENGTH = 32768


@pytest.mark.parametrize("layers", ["16", "32", "64", "near 16 32 64"])
def test_at_32k_a_layer_that_opens_groups_is_8_times_smaller_than_multi_head_attention(layers):
    config = CoGAConfig.preset("gpt2", layers=layers, **GPT2)
    dense = mha_bytes(config, LENGTH)
    assert all(layer * 8 <= dense for layer in state_bytes_formula(config, LENGTH))


def test_at_32k_without_opening_the_model_is_45_times_smaller():
    config = CoGAConfig.preset("gpt2", layers="near 16 32 64", open_groups=0, **GPT2)
    dense = 12 * mha_bytes(config, LENGTH)
    assert sum(state_bytes_formula(config, LENGTH)) * 45 <= dense
    opening = config.replace(open_groups=16)
    assert sum(state_bytes_formula(opening, LENGTH)) * 10 <= dense


@pytest.mark.parametrize("open_groups", [0, 16])
def test_at_32k_the_allocated_bytes_are_the_formula(open_groups):
    """The real shape, one layer: the state is allocated, not only counted."""
    config = CoGAConfig.preset("gpt2", layers="32", open_groups=open_groups, n_layer=1, **GPT2)
    state = CoGAGPT(config.replace(vocab_size=8)).to(torch.bfloat16).new_state(1, LENGTH)
    assert state.bytes() == sum(state_bytes_formula(config, LENGTH))
