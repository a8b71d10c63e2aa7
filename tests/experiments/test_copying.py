"""What a passage costs when it is met again."""

from __future__ import annotations

import _copying
import pytest
import torch
from _copying import HARDLY, LEAD, copying, copying_line, hardly_copies, repeated

from coga import CoGAConfig
from coga.models import CoGAGPT

CPU = torch.device("cpu")


def text(length=301, vocabulary=256):
    g = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (2, length), generator=g)


def test_the_passage_stands_where_it_is_said_to_and_the_rest_stays():
    x = text()
    found = repeated(x, 70)
    assert torch.equal(found["first"], x)
    for name, start in (("near", 161), ("far", 0)):
        here, passage = found[name], slice(start, start + 70)
        assert torch.equal(here[:, passage], x[:, -70:])
        assert torch.equal(here[:, -70:], x[:, -70:])
        same = torch.ones(301, dtype=torch.bool)
        same[passage] = False
        assert torch.equal(here[:, same], x[:, same])


def test_a_reader_that_copies_loses_nothing_where_it_can(monkeypatch):
    """It knows the next token where the last two tokens stood together before."""

    def reader(model, tokens_BT, targets_BT, device, batch):
        loss = torch.ones(tokens_BT.shape[1], dtype=torch.float64)
        for row, target in zip(tokens_BT.tolist(), targets_BT.tolist()):
            known: dict[tuple[int, int], int] = {}
            for i in range(1, len(row)):
                loss[i] -= (known.get((row[i - 1], row[i])) == target[i]) / len(tokens_BT)
                known[row[i - 1], row[i]] = target[i]
        return loss, []

    monkeypatch.setattr(_copying, "validate", reader)
    x = text(vocabulary=10**6)
    found = copying(None, x[:, :-1], x[:, 1:], CPU, 2)
    assert found == {"first": 1.0, "near": 0.0, "far": 0.0}
    assert copying_line(found) == "copying 1.000 nats a token, read again 0.000 near and 0.000 far"


def test_what_is_counted_is_the_passage_without_its_lead(monkeypatch):
    positions = torch.arange(300, dtype=torch.float64)
    monkeypatch.setattr(_copying, "validate", lambda *arguments: (positions, []))
    x = text()
    counted = float(positions[300 - 301 // 4 + LEAD :].mean())
    assert copying(None, x[:, :-1], x[:, 1:], CPU, 2) == dict.fromkeys(("first", "near", "far"), counted)


@pytest.mark.parametrize("layers", ["full", "near 16"])
def test_a_model_that_knows_nothing_gains_nothing(layers):
    model = CoGAGPT(CoGAConfig.preset("tiny", n_layer=2, layers=layers))
    x = text()
    found = copying(model, x[:, :-1], x[:, 1:], CPU, 1)
    assert model.training
    assert list(found) == ["first", "near", "far"]
    assert all(abs(value - found["first"]) < 0.1 for value in found.values())


def test_contexts_that_cannot_hold_it_say_nothing():
    x = text(4 * LEAD)
    assert copying(CoGAGPT(CoGAConfig.preset("tiny")), x[:, :-1], x[:, 1:], CPU, 1) == {}
    assert copying_line({}) == copying_line({"first": None, "near": None, "far": None}) == ""


@pytest.mark.parametrize(("near", "hardly"), [(HARDLY - 0.01, False), (HARDLY + 0.01, True)])
@pytest.mark.parametrize("first", [0.5, 1.0, 2.0])
def test_a_model_that_loses_most_of_it_again_hardly_copies(first, near, hardly):
    assert hardly_copies({"first": first, "near": near * first, "far": first}) is hardly


@pytest.mark.parametrize("name", ["first", "near", "far"])
@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_nothing_is_said_of_what_is_not_finite(name, value):
    """With the other numbers a model that hardly copies."""
    found = {"first": 1.0, "near": 1.0, "far": 1.0}
    assert hardly_copies(found) and copying_line(found)
    found[name] = value
    assert hardly_copies(found) is False
    assert copying_line(found) == ""
    assert hardly_copies({}) is False
