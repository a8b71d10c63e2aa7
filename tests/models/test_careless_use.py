"""What careless use must not do: recompile, overflow, forget, freeze, or end in an error of torch's own."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support import real_bytes, small_config, small_model

from coga import CoGAConfig
from coga.grouping import GumbelGrouping
from coga.models import CoGAGPT
from coga.models import loss as loss_module
from coga.models.decode import sample
from coga.models.train_graph import GraphedStep


def prototypes(model: CoGAGPT) -> list[torch.Tensor]:
    return [m.prototypes_GC for m in model.modules() if isinstance(m, GumbelGrouping)]


@pytest.mark.filterwarnings("ignore")  # torch's own, when it looks at a graph's inputs
def test_a_compiled_model_does_not_compile_again_when_the_noise_step_is_a_number():
    from torch._dynamo.testing import CompileCounterWithBackend

    model = small_model(train=True, layers="4", n_layer=1)
    counter = CompileCounterWithBackend("eager")
    model.compile_blocks(backend=counter)
    for step in range(4):
        model(real_bytes(1, 60), noise_step=step)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_a_half_precision_model_is_summed_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 256 * 16)
    model = small_model(layers="near").to(dtype)
    tokens = real_bytes(1, 500)
    out = model(tokens, tokens, return_logits=True)
    x = torch.nn.functional.cross_entropy(out.logits[0].float(), tokens[0])
    assert out.loss.dtype == torch.float32
    assert (out.loss - x).abs() < 0.01 * x


def test_padding_alone_never_revives_a_prototype():
    model = small_model(train=True, layers="4", slow_decay=0.5)
    before = [p.detach().clone() for p in prototypes(model)]
    tokens, mask = real_bytes(2, 40), torch.zeros(2, 40, dtype=torch.int64)
    mask[:, :10] = 1  # no row has a whole window of real tokens
    for step in range(30):
        model.update_groups(model(tokens, tokens, attention_mask=mask, noise_step=step))
    for a, b in zip(before, prototypes(model), strict=True):
        torch.testing.assert_close(a, b)


def test_a_hidden_state_of_zero_has_a_gradient_of_sensible_size():
    model = small_model(train=True, layers="4", n_layer=1)
    tokens = real_bytes(1, 60)
    tokens[0, 3] = 255  # one token only: a group of nothing else is normalised once more
    with torch.no_grad():
        model.embedding.weight[255] = 0
    model(tokens, tokens).total_loss.backward()
    assert model.embedding.weight.grad.norm(dim=1).max() < 1e6


def test_fresh_prototypes_are_not_frozen_and_loading_an_early_state_thaws():
    full = small_model(layers="full", freeze_step=2)
    full.step_count.fill_(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        other = full.with_layers("4")
    assert all(p.requires_grad for p in prototypes(other)) and int(other.step_count) == 0
    model = small_model(layers="4", freeze_step=1, train=True)
    early = copy.deepcopy(model.state_dict())
    for _ in range(3):
        model.update_groups(model(real_bytes(1, 40)))
    late = copy.deepcopy(model.state_dict())
    assert not any(p.requires_grad for p in prototypes(model))
    model.load_state_dict(early)
    assert all(p.requires_grad for p in prototypes(model))
    model.load_state_dict(late)
    assert not any(p.requires_grad for p in prototypes(model))
    norms = torch.cat([p.norm(dim=-1) for p in prototypes(model)])
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_targets_are_any_integers_and_nothing_else():
    model, tokens = small_model(layers="near"), real_bytes(1, 20)
    assert model(tokens, tokens.int()).loss == model(tokens, tokens).loss
    with pytest.raises(ValueError, match="targets"):
        model(tokens, tokens.float())


def test_no_rows_and_a_state_of_another_model():
    model = small_model(layers="near")
    with pytest.raises(ValueError, match="at least one row"):
        model(torch.zeros(0, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="another configuration"):
        model.step(real_bytes(1, 5), small_model(layers="near", window=32).new_state(1))


@pytest.mark.parametrize("value", [0.5, -1.0, 2, float("nan")])
def test_a_mask_of_anything_but_zeros_and_ones(value):
    mask = torch.ones(1, 20)
    mask[0, 5:] = value
    with pytest.raises(ValueError, match="attention_mask"):
        small_model(layers="near")(real_bytes(1, 20), attention_mask=mask)


def test_sampling_keeps_exactly_k_tokens_at_any_temperature():
    logits = torch.zeros(2000, 5)
    assert sample(logits, 1.0, 2, torch.Generator().manual_seed(0)).unique().numel() == 2
    logits[:, 3] = 1e-3
    assert (sample(logits, 1e-40, None, None) == 3).all()


def test_a_configuration_must_be_whole_and_within_what_can_be_ranked():
    text = small_config().to_json()
    assert CoGAConfig.from_json(text) == small_config()
    with pytest.raises(ValueError, match="window"):
        CoGAConfig.from_json(text.replace('"window": 16,', ""))
    for changes in (dict(beta=1e5), dict(noise=10**400), dict(hysteresis=1.0, slow_prototypes=False)):
        with pytest.raises(ValueError, match=next(iter(changes))):
            small_config(**changes)
    with pytest.raises(ValueError, match="seed"):
        small_config(seed=2**63)


def test_a_step_that_cannot_be_recorded_says_so():
    model = CoGAGPT(CoGAConfig.preset("tiny"))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="model=cpu: a CUDA graph needs a model on a CUDA device"):
        GraphedStep(model, optimizer)
