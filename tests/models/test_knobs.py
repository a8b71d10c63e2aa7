"""Oracle 8: every field of the configuration changes something, every parameter gets a gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import (
    GROUPINGS,
    LONGEST,
    READINGS,
    W,
    assert_close,
    case_id,
    other_layers,
    pairwise,
    perturb,
    read_by,
    real_bytes,
    small_config,
)

from coga import CoGAConfig
from coga.models import CoGAGPT

# Fields that cannot change the output, and why.
NO_EFFECT = {
    "max_len": "a limit: tokens beyond it are refused (test_pretrained)",
    "backend": "chooses between implementations of the same function (test_dispatch)",
}
# A second value of each field, and what else must be set for it to matter.
CHANGED: dict[str, tuple[object, dict]] = {
    "vocab_size": (300, {}),
    "n_layer": (2, {}),
    "n_head": (5, {}),
    "d_model": (18, {}),
    "mlp": ("swiglu", {}),
    "mlp_ratio": (3.0, {}),
    "tie_embeddings": (False, {}),
    "init_std": (0.03, {}),
    "seed": (1, {}),
    "norm_eps": (1e-2, {}),
    "layers": ("near 8 4", {}),
    "latent_dim": (7, {}),
    "rope_dim": (6, {}),
    "rope_theta": (100.0, {}),
    "window": (8, {}),
    "band": (5, {}),
    "reciprocal": (False, {}),
    "alpha_warmup": (100, {}),
    "gain_init": (3.0, {}),
    "sink": (False, {}),
    "output_gate": (False, {}),
    "grouping": ("kmeans", {}),
    "open_groups": (1, {}),
    "selection": ("members", {}),
    "index_weight": (0.0, {}),
    "summaries": (False, dict(selection="members", refine_groups=False)),
    "capacity_factor": (1.5, {}),
    "refine_steps": (1, {}),
    "refine_gradient": ("all", {}),
    "beta": (4.0, {}),
    "kmeans_steps": (0, dict(grouping="kmeans")),
    "refine_groups": (False, {}),
    "reciprocal_groups": (False, {}),
    "far_bias_init": (-1.0, {}),
    "far_warmup": (100, {}),
    "noise": (0.5, {}),
    "tau_start": (2.0, {}),
    "tau_end": (0.9, {}),
    "tau_steps": (0, {}),
    "slow_prototypes": (False, {}),
    "slow_decay": (0.5, {}),
    "hysteresis": (1.0, {}),
    "coherence_weight": (1.0, {}),
    "freeze_step": (0, {}),
    "revive": (0.9, dict(slow_decay=0.5)),
    "entropy_weight": (1.0, {}),
}


def trained_loss(config: CoGAConfig) -> torch.Tensor:
    """Losses of four training steps, a fifth in eval mode: reaches schedules, slow averages, revival.

    Set parameters keep their initial draw where it is what a field is about (init_std, far_bias_init, seed).
    """
    model = CoGAGPT(config).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha_H", "residual.weight")):  # zero at first
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
            if name.endswith("prototypes_GC"):  # some prototypes too bad to be used
                parameter[1:] = -parameter[:1] + 0.1 * parameter[1:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    data = real_bytes(2, LONGEST + 1, 1)
    losses = []
    for step in range(4):
        out = model(data[:, :-1], targets=data[:, 1:], noise_step=step)
        optimizer.zero_grad()
        out.total_loss.backward()
        optimizer.step()
        model.update_groups(out)
        losses.append(out.total_loss.detach())
    with torch.no_grad():
        losses.append(model.eval()(data[:, :-1], targets=data[:, 1:]).loss)
    assert torch.stack(losses).isfinite().all()
    return torch.stack(losses)


def test_every_field_is_in_one_of_the_two_lists():
    fields = {f.name for f in dataclasses.fields(CoGAConfig)}
    assert fields == CHANGED.keys() | NO_EFFECT.keys() and not CHANGED.keys() & NO_EFFECT.keys()


@pytest.mark.parametrize("field", CHANGED)
def test_every_knob_changes_the_output(field):
    value, setting = CHANGED[field]
    base = small_config(**setting)
    before, after = trained_loss(base), trained_loss(base.replace(**{field: value}))
    assert torch.equal(before, trained_loss(base))
    assert (before - after).abs().max() > 1e-9


@pytest.mark.parametrize("field", NO_EFFECT)
def test_the_fields_without_effect_have_none(field):
    value = {"max_len": LONGEST + 1, "backend": "reference"}[field]
    assert torch.equal(trained_loss(small_config()), trained_loss(small_config(**{field: value})))


GRADIENTS = pairwise(
    dict(
        layers=("near 4 8", "8 4", "mha 4 full", "16 near"),
        grouping=GROUPINGS,
        open_groups=(0, 1),
        refine_groups=(True, False),
        chooser=("slow", "live", "hysteresis"),
        refine_steps=(0, 1, 3),
        refine_gradient=("last", "all"),
        mlp=("relu2", "swiglu"),
        tie_embeddings=(True, False),
        capacity_factor=(1.0, 1.5, 2.0),
        entropy_weight=(0.0, 0.1),
        far_warmup=(0, 3),
        selection=READINGS,
        checkpointing=(False, True),
    )
)


@pytest.mark.parametrize("number", range(len(GRADIENTS)), ids=lambda i: case_id(GRADIENTS[i]))
def test_every_parameter_gets_a_gradient(number):
    """T > 3W and K < groups, after every zero is perturbed; finite, and neither lost nor blown up."""
    case = read_by(GRADIENTS[number])
    on, chooser = case.pop("checkpointing"), case.pop("chooser")
    case |= dict(slow_prototypes=chooser != "live", hysteresis=0.5 * (chooser == "hysteresis"))
    model = perturb(CoGAGPT(small_config(**case)).double(), number).train()
    model.set_activation_checkpointing(on)
    data = real_bytes(2, 4 * W + 6, number)
    model(data[:, :-1], targets=data[:, 1:], noise_step=number).total_loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("prototypes_GC") and len(parameter) == 1:
            continue  # the only group of its window is chosen whatever the prototype
        size = parameter.grad.norm() / parameter.numel() ** 0.5
        assert size.isfinite() and 1e-9 < size < 1e3, (name, float(size))


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_activation_checkpointing_changes_nothing(grouping):
    """Same noise in the recomputation: the same loss and gradients to the bit."""
    model = perturb(CoGAGPT(small_config(grouping=grouping)).double()).train()
    data, found = real_bytes(2, 4 * W + 6), []
    for on in (False, True):
        model.set_activation_checkpointing(on)
        model.zero_grad()
        out = model(data[:, :-1], targets=data[:, 1:], noise_step=7)
        out.total_loss.backward()
        found.append([out.total_loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_training_draws_noise_and_eval_does_not():
    model = perturb(CoGAGPT(small_config()).double())
    data = real_bytes(2, LONGEST, 1)
    with torch.no_grad():
        model.train()
        a, b, again = (model(data, noise_step=i).logits for i in (0, 1, 0))
        assert torch.equal(a, again) and not torch.equal(a, b)
        assert torch.equal(a, model(data, noise_step=torch.tensor(0)).logits)
        model.eval()
        assert torch.equal(model(data, noise_step=0).logits, model(data, noise_step=1).logits)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("train", [True, False])
def test_forward_writes_no_buffer_and_no_parameter(grouping, train):
    model = perturb(CoGAGPT(small_config(grouping=grouping, entropy_weight=0.1)).double()).train(train)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    out = model(real_bytes(2, LONGEST), targets=real_bytes(2, LONGEST))
    out.total_loss.backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_extra_losses_are_named_weighted_and_only_in_training():
    config = small_config(coherence_weight=0.5, entropy_weight=0.25, index_weight=0.125)
    model = perturb(CoGAGPT(config).double()).train()
    data = real_bytes(2, LONGEST)
    out = model(data, targets=data)
    assert out.aux.keys() == {"coherence", "entropy", "index"}
    assert_close(out.total_loss, out.loss + sum(out.aux.values()))
    doubled = other_layers(model, config.layers, coherence_weight=1.0, entropy_weight=0.75, index_weight=0.5)
    more = doubled(data, targets=data).aux
    assert_close(more["coherence"], 2 * out.aux["coherence"])
    assert_close(more["entropy"], 3 * out.aux["entropy"])
    assert_close(more["index"], 4 * out.aux["index"])
    assert not model.eval()(data, targets=data).aux


@pytest.mark.filterwarnings("ignore")  # torch's own, when it looks at a graph's inputs
def test_the_entropy_term_in_compiled_blocks_is_that_of_plain_ones():
    config = small_config(entropy_weight=0.25)
    data = real_bytes(2, LONGEST)
    results = []
    for compiled in (False, True):
        model = perturb(CoGAGPT(config).double()).train()
        if compiled:
            model.compile_blocks(backend="aot_eager")
        out = model(data, targets=data)
        out.total_loss.backward()
        results.append([out.aux["entropy"], *(p.grad for p in model.parameters())])
    for plain, ours in zip(*results, strict=True):
        assert_close(ours, plain)
    with pytest.raises(Exception, match="entropy term"):
        torch.compile(CoGAGPT(config).train(), backend="aot_eager", fullgraph=True)(data, targets=data)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.25])
def test_only_blocks_with_the_entropy_term_may_compile_into_several_graphs(entropy_weight, monkeypatch):
    """Elsewhere a break in a graph is an error, not a slower step that nobody sees."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda body, **options: asked.append(options) or body)
    model = CoGAGPT(small_config(entropy_weight=entropy_weight))
    model.compile_blocks()
    assert asked == [{"fullgraph": entropy_weight == 0, "dynamic": False}] * (len(model.stack) + 1)
    asked.clear()
    model.compile_blocks(fullgraph=entropy_weight > 0, mode="reduce-overhead")
    assert {(options["fullgraph"], options["mode"]) for options in asked} == {
        (entropy_weight > 0, "reduce-overhead")
    }
