"""Configuration: every rule names field and value; presets, per-layer values, the way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from coga import CoGAConfig
from coga.config import PRESETS
from coga.models import CoGAGPT

BAD = [
    ("layers", "near sixteen", "unknown layer 'sixteen'"),
    ("layers", "near 0", "unknown layer '0'"),
    ("layers", "near -4", "unknown layer '-4'"),
    ("layers", "near ²", "unknown layer"),
    ("layers", "  ", "at least one layer"),
    ("layers", 16, "must be str"),
    ("window", 100, "must be a multiple of every group size in layers='32'"),
    ("window", 0, "at least 1"),
    ("window", (512, 512), "n_layer=6 values"),
    ("window", 512.0, "must be int"),
    ("n_head", 7, "must divide d_model=384"),
    ("n_head", True, "must be int"),
    ("band", 513, "at most window=512"),
    ("band", -1, "at least 0"),
    ("grouping", "spectral", "one of gumbel, contiguous, kmeans, random"),
    ("rope_dim", 7, "even"),
    ("rope_dim", -2, "even and at least 0"),
    ("vocab_size", 0, "at least 1"),
    ("max_len", 0, "at least 1"),
    ("latent_dim", 0, "at least 1"),
    ("open_groups", -1, "at least 0"),
    ("selection", "best", "one of summary, members"),
    ("capacity_factor", 0.9, "at least 1"),
    ("capacity_factor", float("inf"), "finite"),
    ("capacity_factor", float("nan"), "finite"),
    ("mlp", "gelu", "one of relu2, swiglu"),
    ("backend", "numpy", "one of auto, reference, triton"),
    ("refine_gradient", "first", "one of last, all"),
    ("rope_theta", 0.0, "above 0"),
    ("init_std", float("nan"), "finite"),
    ("tau_end", 0.0, "above 0"),
    ("tau_start", float("inf"), "finite"),
    ("noise", -1.0, "at least 0"),
    ("far_warmup", -1, "at least 0"),
    ("far_warmup", 0.5, "must be int"),
    ("gain_init", 0.0, "finite number above 0"),
    ("gain_init", float("nan"), "finite number above 0"),
    ("entropy_weight", float("nan"), "finite"),
    ("slow_decay", 1.0, "in [0, 1)"),
    ("revive", 1.0, "below 1"),
    ("freeze_step", -1, "None or at least 0"),
    ("far_bias_init", float("-inf"), "finite"),
    ("kmeans_steps", -1, "at least 0"),
    ("reciprocal", 1, "must be bool"),
    ("summaries", "no", "must be bool"),
    ("sink", "yes", "must be bool"),
    ("mlp_ratio", 0.0, "above 0"),
]


@pytest.mark.parametrize(("field", "value", "rule"), BAD)
@pytest.mark.parametrize("way", ["constructor", "replace", "preset"])
def test_a_bad_value_is_an_error_with_field_value_and_rule(field, value, rule, way):
    make = {
        "constructor": CoGAConfig,
        "replace": CoGAConfig().replace,
        "preset": lambda **changes: CoGAConfig.preset("small", **changes),
    }[way]
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}: ")) as error:
        make(**{field: value})
    assert rule in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (dict(selection="summary"), "needs selection='members'"),
        (dict(refine_groups=True), "needs refine_groups=False"),
        (dict(open_groups=0), "at least 1 where summaries are not read"),
        (dict(coherence_weight=0.0), "nothing else moves prototypes"),
    ],
)
def test_groups_without_summaries_must_be_opened_by_members(changes, rule):
    with pytest.raises(ValueError, match=rule):
        CoGAConfig(layers="near 32", summaries=False, **changes)
    CoGAConfig(layers="near full", summaries=False, open_groups=0)  # no groups, nothing to open
    CoGAConfig(layers="32", summaries=False, coherence_weight=0.0, freeze_step=0)
    CoGAConfig(layers="32", summaries=False, coherence_weight=0.0, grouping="contiguous")


@pytest.mark.parametrize(
    ("field", "tiny", "others"), [("output_gate", True, False), ("capacity_factor", 1, 2)]
)
def test_the_tiny_preset_has_a_gate_and_equal_groups(field, tiny, others):
    """Found by measurement (docs/findings.md): whoever changes it back should look there."""
    found = {name: getattr(CoGAConfig.preset(name), field) for name in PRESETS}
    assert found == {"tiny": tiny, "small": others, "gpt2": others}
    assert getattr(CoGAConfig(), field) == others


def test_summaries_are_read_where_something_needs_them():
    """And where nothing is said, a changed copy is not held to what its original needed."""
    plain = CoGAConfig(layers="32")
    needing = [plain.replace(**one) for one in (dict(selection="summary"), dict(refine_groups=True))]
    needing.append(plain.replace(open_groups=0))
    assert not plain.reads_summaries and all(one.reads_summaries for one in needing)
    assert not plain.replace(layers="near", open_groups=0).reads_summaries
    assert not needing[0].replace(selection="members").reads_summaries
    assert plain.replace(summaries=True).reads_summaries
    assert CoGAConfig.from_json(plain.to_json()).replace(open_groups=0).reads_summaries


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"preset='huge': must be one of tiny, small, gpt2"):
        CoGAConfig.preset("huge")
    with pytest.raises(ValueError, match=r"widnow=128: no such field"):
        CoGAConfig().replace(widnow=128)
    with pytest.raises(ValueError, match=r"widnow=128: no such field"):
        CoGAConfig.preset("tiny", widnow=128)


def test_the_dataclass_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CoGAConfig().window = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        CoGAConfig(256)  # type: ignore[misc]


def test_layers_are_tiled_and_values_picked_per_layer():
    config = CoGAConfig(
        n_layer=5,
        layers="near 16 full",
        window=(64, 128, 64, 64, 256),
        open_groups=(0, 1, 2, 3, 4),
        latent_dim=(8, 9, 10, 11, 12),
        capacity_factor=(1, 1.5, 1, 1, 1.01),
        grouping=("gumbel", "kmeans", "random", "contiguous", "gumbel"),
    )
    layers = [config.layer(i) for i in range(5)]
    assert [x.kind for x in layers] == ["near", "group", "full", "near", "group"]
    assert [x.group_size for x in layers] == [0, 16, 0, 0, 16]
    assert [x.groups for x in layers] == [0, 8, 0, 0, 16]
    assert [x.slots for x in layers][1::3] == [24, 17]
    assert [x.open_groups for x in layers] == [0, 1, 2, 3, 4]
    assert [x.latent_dim for x in layers] == [8, 9, 10, 11, 12]
    assert layers[1].grouping == "kmeans"


@pytest.mark.parametrize(("size", "opened"), [("16", 32), ("32", 16), ("64", 8), ("512", 1)])
def test_by_default_512_tokens_are_opened(size, opened):
    assert CoGAConfig(layers=size).layer(0).open_groups == opened


@pytest.mark.parametrize("factor", [1.0, 1.25, 1e6, 1e308])
def test_slots_are_the_rounded_up_capacity_and_never_more_than_a_window(factor):
    layer = CoGAConfig(layers="16", capacity_factor=factor).layer(0)
    assert layer.slots == {1.0: 16, 1.25: 20}.get(factor, 512)


def test_slots_are_not_one_more_for_rounding():
    """1.1 x 10 is 11.000000000000002."""
    assert CoGAConfig(layers="10", window=50, band=50, capacity_factor=1.1).layer(0).slots == 11


@pytest.mark.parametrize("name", ["tiny", "small", "gpt2"])
def test_json_brings_every_preset_back(name):
    config = CoGAConfig.preset(name, seed=5, freeze_step=9)
    text = config.to_json()
    assert CoGAConfig.from_json(text) == config
    assert json.loads(text)["seed"] == 5


def test_an_older_config_means_what_it_meant():
    values = json.loads(CoGAConfig().to_json())
    for name in ("selection", "summaries", "index_weight"):
        del values[name]
    config = CoGAConfig.from_json(json.dumps(values))
    assert config == CoGAConfig(selection="summary", summaries=True, index_weight=0.0)


def test_json_brings_tuples_back():
    config = CoGAConfig(n_layer=2, window=(64, 128), grouping=("gumbel", "kmeans"), band=8)
    assert CoGAConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must hold an object"),
        ('{"windows": 4}', "windows=4: no such field"),
        ('{"window": "wide"}', "window='wide': must be int"),
        ('{"window": [1, [2]]}', "window=.*must be int"),
        ('{"n_head": 7}', "n_head=7: must divide"),
        ('{"layers": null}', "layers=None: must be str"),
    ],
)
def test_json_that_is_no_configuration_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        CoGAConfig.from_json(text)


def test_an_integer_in_a_float_field_becomes_a_float():
    config = CoGAConfig.preset("tiny", far_bias_init=-1, capacity_factor=[1, 2, 1])
    assert isinstance(config.far_bias_init, float) and config.capacity_factor == (1.0, 2.0, 1.0)
    CoGAGPT(config)
