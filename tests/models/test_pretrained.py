"""Saving, loading, other patterns with the same weights; every misfit is a ValueError that says what."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import GROUPINGS, assert_close, real_bytes, small_model

from coga.models import CoGAGPT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_what_is_loaded_is_what_was_saved(tmp_path, dtype, grouping):
    model = small_model(3, dtype, grouping=grouping, tie_embeddings=grouping != "kmeans")
    model.save_pretrained(tmp_path / "new" / "run")
    assert sorted(p.name for p in (tmp_path / "new" / "run").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    again = CoGAGPT.from_pretrained(tmp_path / "new" / "run")
    assert not again.training and again.config == model.config
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert theirs[name].dtype == value.dtype and torch.equal(theirs[name], value)
    tokens = real_bytes(2, 53)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_saving_twice_leaves_one_whole_checkpoint(tmp_path):
    small_model(1).save_pretrained(tmp_path)
    second = small_model(2)
    second.save_pretrained(tmp_path)
    found = CoGAGPT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[k], v) for k, v in second.state_dict().items())
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    first = small_model(1)
    first.save_pretrained(tmp_path)

    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("coga.models.pretrained.save_file", broken)
    with pytest.raises(ValueError, match=r"folder=.*disk full"):
        small_model(2).save_pretrained(tmp_path)
    found = CoGAGPT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[k], v) for k, v in first.state_dict().items())
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_where_the_folder_should_be_is_an_error(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ValueError, match=r"folder=.*taken.*cannot be created"):
        small_model().save_pretrained(tmp_path / "taken")


def damage_truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def damage_no_weights(folder):
    (folder / "model.safetensors").unlink()


def damage_no_config(folder):
    (folder / "config.json").unlink()


def damage_json(folder):
    (folder / "config.json").write_text("{")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_width(folder):
    edit_config(folder, latent_dim=7)


def damage_depth(folder):
    edit_config(folder, n_layer=4)


def damage_rule(folder):
    edit_config(folder, window=18)


def damage_missing(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def damage_extra(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"bias": torch.zeros(2)}, folder / "model.safetensors")


DAMAGES = [
    (damage_truncate, "model.safetensors: not a readable safetensors file"),
    (damage_empty, "model.safetensors: not a readable safetensors file"),
    (damage_no_weights, "holds no model.safetensors"),
    (damage_no_config, "holds no config.json"),
    (damage_json, "config.json: not valid JSON"),
    (damage_width, r"has shape .* config.json asks for"),
    (damage_depth, r"does not fit config.json \(missing"),
    (damage_rule, "window=18: must be a multiple"),
    (damage_missing, r"missing \['norm.weight'\]"),
    (damage_extra, r"not known \['bias'\]"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_checkpoint_that_does_not_fit_is_an_error(tmp_path, damage, message):
    small_model().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        CoGAGPT.from_pretrained(tmp_path)


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        CoGAGPT.from_pretrained(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------ with_layers


def test_with_layers_reports_what_is_missing_and_what_is_unused():
    model = small_model(3, layers="4")
    with pytest.warns(UserWarning, match=r"with_layers\('full'\): freshly initialised: nothing; unused: \["):
        dense = model.with_layers("full")
    with pytest.warns(
        UserWarning, match=r"freshly initialised: \['blocks.0.attention.far_bias_H'.*unused: no"
    ):
        grouped = dense.with_layers("4")
    assert not grouped.blocks[0].attention.far_bias_H.any()  # a dense model is read as it is
    mine, theirs = dict(model.named_parameters()), dict(dense.named_parameters())
    assert theirs.keys() < mine.keys()
    assert all(torch.equal(mine[k], v) and mine[k] is not v for k, v in theirs.items())


def test_with_layers_is_silent_when_everything_fits():
    model = small_model(3, layers="near")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = model.with_layers("full", max_len=600)
    assert other.config.max_len == 600 and other.config.layers == "full" and other.training == model.training
    tokens = real_bytes(1, 32)
    with torch.no_grad():
        assert_close(other(tokens).logits, model(tokens).logits)  # up to two windows they are the same
    with pytest.raises(ValueError, match="unknown layer"):
        model.with_layers("wide")


# -------------------------------------------------------------------------------------------- bad calls


def test_tokens_that_do_not_fit_are_errors():
    model = small_model(vocab_size=50, max_len=20)
    ok = torch.tensor([[1, 2, 3]])
    for tokens, message in [
        (torch.tensor([[1, 50]]), r"tokens=50: must be in \[0, vocab_size=50\)"),
        (torch.tensor([[-1, 4]]), r"tokens=-1: must be in"),
        (torch.zeros(1, 21, dtype=torch.int64), r"tokens=21 a row: must be between 1 and max_len=20"),
        (torch.zeros(1, 0, dtype=torch.int64), r"tokens=0 a row"),
        (torch.tensor([1, 2]), r"must be a \(batch, tokens\) integer tensor"),
        (torch.zeros(1, 3), r"integer tensor"),
    ]:
        for call in (model, model.generate, lambda x: model.step(x, model.new_state(1))):
            with pytest.raises(ValueError, match=message):
                call(tokens)
    with pytest.raises(ValueError, match=r"targets=\(1, 2\)"):
        model(ok, targets=ok[:, 1:])
    with pytest.raises(ValueError, match="total_loss needs targets"):
        _ = model(ok).total_loss
    for mask, message in [
        (torch.ones(1, 2), "must have the shape of tokens"),
        (torch.tensor([[1, 0, 1]]), "unbroken run"),
        (torch.tensor([[0, 0, 0]]), "at least one real token"),
    ]:
        with pytest.raises(ValueError, match=f"attention_mask.*{message}"):
            model(ok, attention_mask=mask)
    for options in (dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=0)):
        name = next(iter(options))
        with pytest.raises(ValueError, match=f"{name}="):
            model.generate(ok, **options)


@pytest.mark.parametrize("target", [50, -1, -7])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    model = small_model(vocab_size=50)
    tokens = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=rf"targets={target}: must be in \[0, vocab_size=50\)"):
        model(tokens, targets=torch.tensor([[2, 3, target]]))
    assert model(tokens, targets=torch.tensor([[2, 3, -100]])).loss.isfinite()
