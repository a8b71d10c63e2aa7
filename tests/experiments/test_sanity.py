"""sanity.py: figures on models whose answer is known, every parameter in one part, rows, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import _sanity
import numpy as np
import pytest
import sanity
import torch
from _sanity import entropies, gradient_norms, part_of, rebuilt, reciprocities, watch

from coga import CoGAConfig
from coga.models import CoGAGPT
from coga.models.diagnostics import attention_entropy

SCRIPT = sanity

SMALL = dict(
    n_layer=3, n_head=2, d_model=24, latent_dim=10, rope_dim=4, window=16, band=8, layers="near 4 mha",
    open_groups=2, max_len=256, refine_groups=True, reciprocal_groups=True,
    output_gate=True,
)  # fmt: skip


def tokens(length: int = 80, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(1))


def model_of(**changes) -> CoGAGPT:
    """Weights of order one in float64, zero-initialised ones too."""
    model = CoGAGPT(CoGAConfig(**{**SMALL, **changes})).double().eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(noise * scale + (parameter if parameter.ndim == 1 else 0))
    return model


# --- keys and values ---------------------------------------------------------------------------------------


def test_maps_of_rank_c_are_rebuilt_exactly_at_width_c():
    """W_k and W_v that share a row space of 5 dimensions need a latent of 5, not of 4."""
    model = model_of(layers="mha")
    draw = torch.Generator().manual_seed(3)
    left, right = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((48, 5), (5, 24)))
    with torch.no_grad():
        model.stack[1].attention.qkv.weight[24:] = left @ right
    seen = watch(model, tokens())
    what, errors = rebuilt(seen[1], [4, 5, 24])
    assert "W_k x" in what and "W_v x" in what
    assert errors["both"][0] > 1e-3
    assert errors["both"][1] < 1e-9 and errors["both"][2] < 1e-9
    full = rebuilt(seen[0], [5, 23, 24])[1]["both"]  # a layer left as it was needs all 24
    assert full[0] > full[1] > 1e-3
    assert full[2] < 1e-9


def test_mha_errors_are_those_of_the_best_projection_found_by_hand():
    model = model_of(layers="mha")
    seen = watch(model, tokens())[0]
    x = seen.x_BTD.flatten(0, 1).detach()
    y = x @ model.stack[0].attention.qkv.weight[24:].detach().T
    u, s, v = torch.linalg.svd(y, full_matrices=False)
    for width, error in zip((3, 9), rebuilt(seen, [3, 9])[1]["both"]):
        best = u[:, :width] * s[:width] @ v[:width]
        assert error == pytest.approx(float((y - best).norm() / y.norm()))


def test_latent_layers_are_rebuilt_at_their_own_width_and_not_below():
    seen = watch(model_of(layers="near 4 full"), tokens())
    for one in seen:
        errors = rebuilt(one, [6, 9, 10])[1]
        assert errors["both"][0] > errors["both"][1] > 1e-3
        assert all(values[2] < 1e-9 for values in errors.values())


# --- attention ---------------------------------------------------------------------------------------------


def test_attention_without_queries_is_uniform_over_what_is_seen():
    """Zero queries and no sink: full and mha read all tokens alike, entropy 1; near reads a part of them."""
    model = model_of(layers="full mha near", sink=False, reciprocal=False)
    with torch.no_grad():
        model.stack[0].attention.projections.query.weight.zero_()
        model.stack[1].attention.qkv.weight[:24] = 0
        model.stack[2].attention.projections.query.weight.zero_()
    full, mha, near = (entropies(one, 79)[0] for one in watch(model, tokens()))
    assert full == pytest.approx([1, 1])
    assert mha == pytest.approx([1, 1])
    seen = [i + 1 - max(0, i // 16 - 1) * 16 for i in range(1, 80)]
    assert near == pytest.approx([np.mean(np.log(seen) / np.log(np.arange(2, 81)))] * 2)


def test_a_group_layer_that_opens_all_has_the_entropy_of_full():
    model = model_of(layers="4", open_groups=64, capacity_factor=1.0)
    dense = CoGAGPT(model.config.replace(layers="full")).double().eval()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if k in dense.state_dict()})
    a, b = (entropies(watch(m, tokens())[0], 40) for m in (model, dense))
    assert a[0] == pytest.approx(b[0], abs=1e-12)
    assert a[1] == pytest.approx(b[1], abs=1e-12)
    # Through the opened path as well, where members and summaries are laid out over tokens.
    model.stack[0].attention.route_full = False
    assert entropies(watch(model, tokens())[0], 40)[0] == pytest.approx(b[0], abs=1e-9)
    few = model_of(layers="4", open_groups=1)
    assert entropies(watch(few, tokens())[0], 40)[0] != pytest.approx(b[0], abs=1e-6)


def test_chunks_of_queries_change_nothing(monkeypatch):
    seen = watch(model_of(), tokens())
    whole = [entropies(one, 50) for one in seen]
    monkeypatch.setattr(_sanity, "AT_ONCE", 1)
    for one, (entropy, sink) in zip(seen, whole):
        again = entropies(one, 50)
        assert again[0] == pytest.approx(entropy)
        assert again[1] is None if sink is None else again[1] == pytest.approx(sink)


def test_mha_entropy_is_that_of_attention_by_hand():
    model = model_of(layers="mha")
    seen = watch(model, tokens(40))[2]
    q, k, _ = seen.module.project(seen.x_BTD, seen.context)
    score = torch.einsum("bihe,bjhe->bihj", q, k) / 12**0.5
    mask = torch.ones(40, 40).tril().bool()
    prob = score.masked_fill(~mask[None, :, None], -torch.inf).softmax(-1)
    want = attention_entropy(prob, torch.arange(1, 41)[:, None])[:, 1:].mean((0, 1))
    assert entropies(seen, 39)[0] == pytest.approx(want.tolist())


def test_reciprocity_is_one_where_queries_are_keys():
    model = model_of(layers="mha near")
    with torch.no_grad():
        weight = model.stack[0].attention.qkv.weight
        weight[24:48] = weight[:24]
        near = model.stack[1].attention.projections
        near.query.weight.copy_(near.latent.weight.repeat(2, 1))
    mha, latent, other = watch(model, tokens())
    assert reciprocities(mha, 8) == pytest.approx([1, 1])
    assert reciprocities(latent, 8) == pytest.approx([1, 1])
    assert max(abs(x) for x in reciprocities(other, 8)) < 0.9


# --- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", ["relu2", "swiglu"])
def test_every_parameter_is_in_a_part_that_is_known(mlp):
    model = CoGAGPT(CoGAConfig(**{**SMALL, "mlp": mlp, "tie_embeddings": False}))
    parts = {part_of(name) for name, _ in model.named_parameters()}
    assert parts == {part for part, _ in _sanity.PARTS}
    assert part_of("blocks.1.attention.group_level.alpha_H") == "group level"
    assert part_of("blocks.1.attention.alpha_H") == "alpha"
    assert part_of("blocks.0.mlp.gate.weight") == "mlp"
    assert part_of("blocks.0.attention.projections.gate.weight") == "gates"
    assert part_of("colour") == "other"


def test_norms_are_those_of_the_gradients():
    model = model_of(noise=0.0)
    x, y = tokens(81)[:, :-1], tokens(81)[:, 1:]
    found = gradient_norms(model, x, y)
    assert not model.training and all(p.grad is None for p in model.parameters())
    model.train()
    model(x, targets=y).total_loss.backward()
    grads = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    total = sum(float(g) ** 2 for g in grads.values()) ** 0.5
    assert sum(part["gradient"] ** 2 for part in found["parts"].values()) ** 0.5 == pytest.approx(total)
    assert sum(part["elements"] for part in found["parts"].values()) == sum(
        p.numel() for p in model.parameters()
    )
    name = "blocks.1.attention.grouping.prototypes_GC"
    assert found["layers"]["prototypes"] == [None, pytest.approx(float(grads[name])), None]
    assert found["parts"]["prototypes"]["gradient"] == pytest.approx(float(grads[name]))
    assert all(not part["without"] for part in found["parts"].values())


def test_a_part_without_gradient_is_named():
    """With no far token read, nothing behind the groups learns."""
    model = model_of(coherence_weight=0.0)
    found = gradient_norms(model, tokens(30), tokens(30))
    assert found["parts"]["far bias"] == {
        "gradient": 0.0,
        "parameters": pytest.approx(float(model.stack[1].attention.far_bias_H.detach().norm())),
        "elements": 2,
        "without": ["blocks.1.attention.far_bias_H"],
    }
    assert found["parts"]["mlp"]["without"] == []


# --- a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "mixed"
    model_of().float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(checkpoint, text) -> list[str]:
    return [
        "--checkpoint",
        str(checkpoint),
        "--data",
        text,
        "--n",
        "80",
        "--widths",
        "4,8,64",
        "--device",
        "cpu",
    ]


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sanity") / "run"
    assert sanity.main([*arguments, "--out", str(folder)]) == 0
    return folder


def test_what_a_run_leaves(run):
    names = {path.name for path in run.iterdir()}
    pictures = {"entropy.png", "reciprocity.png", "reconstruction.png", "gradients.png"}
    assert names == pictures | {"config.json", "rows.jsonl"}
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    (row,) = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    assert [one["kind"] for one in row["layers"]] == ["near", "4", "mha"]
    assert [one["widths"] for one in row["layers"]] == [[4, 8, 10], [4, 8, 10], [4, 8, 24]]
    for one in row["layers"]:
        assert all(0 < x <= 1 for x in one["entropy"])
        assert one["errors"]["both"][-1] < 1e-3
        assert len(one["reciprocity"]) == 2
        assert (one["sink"] is None) == (one["kind"] == "mha")
    assert row["band"] == 8
    assert set(row["gradients"]["parts"]) == {part for part, _ in _sanity.PARTS}
    assert {"device", "torch", "date", "command", "seed"} <= row.keys()


def test_resume_draws_the_same_row_again(run, arguments, capsys):
    rows = (run / "rows.jsonl").read_bytes()
    (run / "entropy.png").unlink()
    assert sanity.main([*arguments, "--out", str(run), "--resume"]) == 0
    assert (run / "rows.jsonl").read_bytes() == rows
    assert (run / "entropy.png").exists()
    out = capsys.readouterr().out
    assert all(part in out for part, _ in _sanity.PARTS)


def test_weights_that_are_not_finite_write_no_row(text, tmp_path, capsys):
    model = model_of().float()
    model.stack[1].mlp.up.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert (
        sanity.main(["--checkpoint", str(tmp_path / "model"), "--data", text, "--n", "80", "--out", str(out)])
        == 1
    )
    assert "not finite" in capsys.readouterr().err
    assert not (out / "rows.jsonl").exists()


# --- bad input ---------------------------------------------------------------------------------------------

BAD = {
    "n-1": (["--n", "1"], "n=1"),
    "n-above-max-len": (["--n", "300"], "max_len=256"),
    "widths": (["--widths", "0"], "widths=0"),
    "widths-text": (["--widths", "wide"], "widths='wide'"),
    "band": (["--band", "1"], "band=1"),
    "contexts": (["--contexts", "0"], "contexts=0"),
    "queries": (["--queries", "0"], "queries=0"),
    "device": (["--device", "abacus"], "device='abacus'"),
    "missing": (["--data", "/nowhere/text"], "existing file or folder"),
    "no-checkpoint": (["--checkpoint", "/nowhere/model"], "does not exist"),
    "no-model": (["--checkpoint", "."], "holds no model.safetensors"),
    "flag": (["--colour"], "--colour"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, arguments, refused_and_nothing_written):
    more, expected = BAD[name]
    assert expected in refused_and_nothing_written([*arguments, *more])


def test_texts_and_folders_that_do_not_fit(run, arguments, tmp_path, refused):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "already holds" in refused([*arguments, "--out", str(run)])
    assert "queries=7" in refused([*arguments, "--out", str(run), "--resume", "--queries", "7"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (tmp_path / "file").write_text("")
    assert "out=" in refused([*arguments, "--out", str(tmp_path / "file")])
    assert "must not be empty" in refused([*arguments, "--data", str(tmp_path / "file")])
    assert "--checkpoint" in refused([])
