"""Oracles 1 and 2: with every group opened, or with groups of one token, a layer is dense attention."""

from __future__ import annotations

import pytest
import torch
from support import (
    GROUPINGS,
    LENGTHS,
    assert_close,
    case_id,
    make_tokens,
    opened_path,
    other_layers,
    pairwise,
    random_tokens,
    small_model,
)

from coga.models import CoGAGPT

GROUPED = ("near 4 8", "8", "4 full", "mha 4", "16 near", "1", "8 4 16")


def dense_twin(model: CoGAGPT) -> CoGAGPT:
    """The same weights with every group layer read densely."""
    words = ["full" if word.isdigit() else word for word in model.config.layers.split()]
    return other_layers(model, " ".join(words))


OPENED = pairwise(
    dict(
        layers=GROUPED,
        grouping=GROUPINGS,
        length=LENGTHS,
        tokens=("bytes", "random"),
        train=(True, False),
        open_groups=(24, 1000),
        band=(7, 16, 0),
        capacity_factor=(1.0, 1.5, 3.0),
        refine_groups=(True, False),
        output_gate=(True, False),
    )
)


@pytest.mark.parametrize("number", range(len(OPENED)), ids=lambda i: case_id(OPENED[i]))
def test_opening_every_group_is_dense_attention(number):
    """Through the opened path and through the route to the exact kernel; noise on, alpha not 0."""
    case = dict(OPENED[number])
    length, kind = case.pop("length"), case.pop("tokens")
    if case["layers"] == "1":
        case["open_groups"] = 1000  # 32 groups are far at the end; elsewhere at most 8
    model = small_model(number, **case)
    dense = dense_twin(model)
    tokens = make_tokens(kind, 2, length, number)
    with torch.no_grad():
        expected = dense(tokens, noise_step=number).logits
        routed = model(tokens, noise_step=number).logits
        with opened_path(model):
            opened = model(tokens, noise_step=number).logits
    assert_close(routed, expected)
    assert_close(opened, expected)


def test_opening_all_groups_but_one_is_not_dense_attention():
    """The identity above is not empty: with K one short of the number of far groups it fails."""
    model = small_model(layers="4", open_groups=7)
    tokens = random_tokens(2, 3 * 16 + 5)
    with torch.no_grad():
        assert (model(tokens).logits - dense_twin(model)(tokens).logits).abs().max() > 1e-6


def test_gradients_agree_when_every_group_is_opened():
    model = small_model(layers="4 8", open_groups=1000, train=True, grouping="gumbel", capacity_factor=1.5)
    dense, tokens = dense_twin(model), make_tokens("bytes", 2, 53)
    dense(tokens, targets=tokens).loss.backward()
    with opened_path(model):
        model(tokens, targets=tokens, noise_step=3).loss.backward()
    found = dict(model.named_parameters())
    compared = 0
    for name, parameter in dense.named_parameters():
        assert_close(found[name].grad, parameter.grad)
        compared += bool(parameter.grad.any())
    assert compared > 25


SINGLE = pairwise(
    dict(
        grouping=GROUPINGS,
        length=LENGTHS,
        open_groups=(0, 1, 5),
        layers=("1", "near 1"),
        train=(True, False),
        band=(7, 16),
        tokens=("bytes", "random"),
    )
)


@pytest.mark.parametrize("number", range(len(SINGLE)), ids=lambda i: case_id(SINGLE[i]))
def test_groups_of_one_token_are_dense_attention(number):
    """R = 1, capacity 1, no refinement, far bias 0: a summary is the token itself, whatever K is."""
    case = dict(SINGLE[number])
    length, kind = case.pop("length"), case.pop("tokens")
    model = small_model(number, refine_groups=False, capacity_factor=1.0, **case)
    for name, parameter in model.named_parameters():
        if name.endswith("far_bias_H"):
            parameter.data.zero_()
    tokens = make_tokens(kind, 2, length, number)
    with torch.no_grad():
        assert_close(model(tokens, noise_step=number).logits, dense_twin(model)(tokens).logits)
