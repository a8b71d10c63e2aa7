"""How the scripts read a dense model through groups."""

from __future__ import annotations

import pytest
import torch
from _script import read_as
from support import W, real_bytes, small_model

from coga.models.fit import fit_groups
from coga.models.prototypes import fit_prototypes

CHANGES = dict(layers="4", refine_groups=False, reciprocal_groups=False, summaries=True)


@pytest.mark.parametrize(
    ("length", "fit"),
    [(None, None), (W - 1, None), (W, fit_prototypes), (2 * W, fit_prototypes), (2 * W + 1, fit_groups)],
)
def test_a_reading_finds_what_its_text_is_long_enough_for(length, fit):
    dense = small_model(layers="full", **{k: v for k, v in CHANGES.items() if k != "layers"})
    text = None if length is None else real_bytes(2, length)
    found = read_as(dense, far_bias=-1.0, text_BT=text, **CHANGES)
    with pytest.warns(UserWarning, match="freshly initialised"):
        wanted = dense.with_layers(**CHANGES)
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            if name.endswith("far_bias_H"):
                parameter.fill_(-1)
    if fit is not None:
        fit(wanted, text)
    for name, x in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], x), name
    assert all(
        torch.equal(found.state_dict()[n], x) for n, x in dense.state_dict().items() if n != "step_count"
    )
