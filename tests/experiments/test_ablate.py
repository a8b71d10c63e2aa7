"""ablate.py: arms, FLOPs, what a run measures, rows that survive, resuming, one line for bad input."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import _ablate_report
import _arms
import _fit
import _flops
import _rows
import ablate
import numpy as np
import pytest
import torch
from _copying import copying
from torch.utils.flop_counter import FlopCounterMode

from coga import CoGAConfig
from coga.data import batches, contexts, load_corpus
from coga.models import CoGAGPT

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
SCRIPT = ablate

SMALL = {"window": 16, "layers": "near 4 8", "band": 8, "d_model": 16, "latent_dim": 8, "rope_dim": 4,
         "open_groups": 2}  # fmt: skip
TINY = [
    "--preset", "tiny", "--n", "100", "--steps", "8", "--batch", "2", "--validation", "2", "--device", "cpu",
    *[part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")],
]  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(text):
    return load_corpus(text, length=100)


@pytest.fixture(scope="module")
def done(text, tmp_path_factory) -> Path:
    """Two arms, two seeds."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    arguments = ["--arms", "gumbel,near", "--seeds", "0,1", "--data", text, "--out", str(folder)]
    assert ablate.main([*TINY, *arguments]) == 0
    return folder


def rows_of(folder: Path) -> dict[tuple[str, int], dict]:
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return {(row["arm"], row["seed"]): row for row in map(json.loads, lines)}


def figures(row: dict) -> dict:
    """What does not depend on the clock or the process."""
    timed = {
        "seconds",
        "dense_seconds",
        "wall_seconds",
        "tokens_per_second",
        "flops_per_second",
        "peak_bytes",
    }
    return {k: v for k, v in row["metrics"].items() if k not in timed}


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- arms --------------------------------------------------------------------------------------------------


def test_arms_carry_fields():
    arms = _arms.parse_arms("gumbel, near,gumbel:noise=1,sink=false,kmeans:lr_scale=2")
    assert [arm.text for arm in arms] == [
        "gumbel",
        "near",
        "gumbel:noise=1,sink=false",
        "kmeans:lr_scale=2",
    ]
    assert [arm.name for arm in arms] == ["gumbel", "near", "gumbel", "kmeans"]
    assert arms[2].changes == {"noise": 1, "sink": False}
    assert isinstance(arms[2].config("tiny", {}, 0).noise, float)
    assert [arm.lr_scale for arm in arms] == [1, 1, 1, 2]
    assert arms[3].changes == {}
    config = arms[2].config("tiny", {"window": 64, "sink": True}, 5)
    assert (config.grouping, config.noise, config.sink, config.window, config.seed) == (
        "gumbel", 1, False, 64, 5,
    )  # fmt: skip
    assert arms[1].config("tiny", {"layers": "16"}, 0).layers == "near"


def test_arms_keep_lists_and_patterns_whole():
    (arm,) = _arms.parse_arms("gumbel:latent_dim=[16,8,8],layers=32")
    assert arm.changes == {"latent_dim": [16, 8, 8], "layers": "32"}
    assert arm.config("tiny", {}, 0).layer(1).latent_dim == 8


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("magic", "must be one of"),
        ("", "must be one of"),
        ("gumbel,", "must be one of"),
        ("sink=false", "no arm before"),
        ("gumbel,sink=false", "no arm before"),
        ("gumbel:prototype_lr=0", "above 0"),
        ("gumbel:prototypes=best", "data or random"),
        ("full:dense_latent_dim=0", "dense_latent_dim=0 must be a whole number"),
        ("full:dense_latent_dim=[8,8]", "must be a whole number"),
        ("gumbel:sink=false,dense=other", "dense='other' must be own or plain"),
        ("gumbel:gain_init=1,dense=plain", "dense='plain' must stand without gain_init"),
        ("full:dense_latent_dim=64,dense=plain", "must stand without dense_latent_dim"),
        ("gumbel:sink", "FIELD=VALUE"),
        ("gumbel:", "FIELD=VALUE"),
        ("gumbel,near,gumbel", "twice"),
        ("gumbel:sink=false,sink=true", "twice"),
        ("gumbel:lr_scale=0", "lr_scale=0"),
        ("gumbel:lr_scale=fast", "lr_scale='fast'"),
        ("gumbel:seed=3", "seed"),
    ],
)
def test_arms_that_cannot_be_read(given, expected):
    with pytest.raises(ValueError, match=expected):
        _arms.parse_arms(given)


def test_arms_share_their_start():
    """Whatever an arm has in common with the unchanged model starts there; what it is about does not."""
    plain = _arms.parse_arms("gumbel")[0].build("tiny", SMALL, 3).state_dict()
    assert all(torch.equal(v, CoGAGPT(CoGAConfig.preset("tiny", seed=3, **SMALL)).state_dict()[k])
               for k, v in plain.items())  # fmt: skip
    for text in ("near", "kmeans", "mha", "gumbel:refine_groups=false", "gumbel:far_bias_init=-1"):
        (arm,) = _arms.parse_arms(text)
        mine = arm.build("tiny", SMALL, 3).state_dict()
        shared = [k for k in mine if k in plain and mine[k].ndim >= 2 and mine[k].shape == plain[k].shape]
        assert len(shared) >= 7
        assert all(torch.equal(mine[k], plain[k]) for k in shared), text
    assert float(mine["blocks.1.attention.far_bias_H"][0]) == -1
    other = _arms.parse_arms("gumbel:init_std=0.1")[0].build("tiny", SMALL, 3)
    assert float(other.embedding.weight.detach().std()) == pytest.approx(0.1, rel=0.1)


def test_integers():
    assert _arms.parse_integers("3,1,2", "seeds") == [3, 1, 2]
    for given in ("", "1,", "1,1", "-1", "a"):
        with pytest.raises(ValueError, match="seeds="):
            _arms.parse_integers(given, "seeds")


# --- FLOPs -------------------------------------------------------------------------------------------------


def test_flops_of_a_case_counted_by_hand():
    """One layer, T 16, W 4, R 2, G 2, K 1; D 4, H 2, C 3, P 2, L 5.

    Per window the keys are: near, on average, 2.5, 6.5, 6.5, 6.5; groups in reach 0, 0, 2, 4, of which one
    is opened (2 tokens) and the others are summaries: 0, 0, 2 + 1, 2 + 3.
    """
    config = CoGAConfig(
        vocab_size=10, n_layer=1, n_head=2, d_model=4, mlp_ratio=2.0, layers="2", latent_dim=3, rope_dim=2,
        window=4, band=3, open_groups=1, refine_steps=1, grouping="gumbel",
        refine_groups=True, reciprocal_groups=True, selection="summary", output_gate=True,
    )  # fmt: skip
    query, latent, up, out_and_gate = 2 * 4 * 2 * 5, 2 * 4 * 5, 2 * 4 * 3, 2 * 2 * 16
    mlp, head = 2 * 2 * 4 * 8, 2 * 4 * 10
    group_maps = query + up + latent  # for each of the 8 groups of 16 tokens
    near, far = (2.5 + 3 * 6.5) / 4, (0 + 0 + 3 + 5) / 4
    key = 2 * 2 * (5 + 3)
    band = 2 * 2 * 3 * (1 + 2 + 14 * 3) / 16
    # Groups of windows 0..3 read 2, 4, 6, 8 groups; 2, 4, 4, 4 of them are in the band.
    among = (key * (2 + 4 + 6 + 8) / 4 + 2 * 2 * 3 * (2 + 4 + 4 + 4) / 4) / 2
    similarities = (2 * 1 + 1) * 2 * 3 * 2
    found = _flops.flops(config, 16)
    assert found["matrices"] == query + latent + up + out_and_gate + mlp + head + group_maps / 2
    assert found["reads"] == key * (near + far) + band + among
    assert found["grouping"] == similarities + 2 * 2 * (5 + 4)
    assert found["choices"] == 2 * 5 * (0 + 0 + 2 + 4) / 4
    ungated = _flops.flops(config.replace(output_gate=False), 16)
    assert ungated["matrices"] == found["matrices"] - 2 * 16
    calm = config.replace(hysteresis=1.0, slow_prototypes=True)
    assert _flops.flops(calm, 16)["choices"] == similarities + found["choices"]
    assert _flops.forward_flops(config, 16) == pytest.approx(sum(found.values()))
    assert _flops.training_flops(config, 16) == pytest.approx(3 * sum(found.values()) - 2 * found["choices"])


@pytest.mark.parametrize("layers", ["near", "full", "4", "near 4 8"])
@pytest.mark.parametrize("length", [1, 16, 80])
def test_matrix_flops_are_those_that_torch_counts(layers, length):
    """The kernels are opaque to torch's counter: all it sees is what is outside of reading and choosing.

    What `refine` costs is told it: two products of W x C by C x G a step and window.
    """

    def refining(unit_BNWC, prototype_GC, _beta, steps, _backend, out_shape=None):
        return 2 * 2 * math.prod(unit_BNWC) * prototype_GC[0] * steps

    config = CoGAConfig.preset("tiny", **{**SMALL, "layers": layers})
    model = CoGAGPT(config).eval()
    told = {torch.ops.coga.refine: refining}
    with FlopCounterMode(display=False, custom_mapping=told) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64))
    found = _flops.flops(config, length)
    chosen = found["choices"]
    for i in range(config.n_layer):  # selection runs inside a kernel
        layer = config.layer(i)
        if layer.kind == "group":
            reach = np.maximum(0, np.arange(length) // 16 - 1) * layer.groups
            chosen -= 2 * 12 * reach.mean() if layer.open_groups < reach.max() else 0
    expected = (found["matrices"] + found["grouping"] + chosen) * length
    assert counter.get_total_flops() == pytest.approx(expected)


def test_scoring_every_member_costs_the_group_size_times_scoring_summaries():
    config = CoGAConfig.preset("tiny", **{**SMALL, "n_layer": 1, "layers": "4"})
    costs = [_flops.flops(config.replace(selection=s), 80)["choices"] for s in ("summary", "members")]
    visible = np.maximum(0, np.arange(80) // 16 - 1) * 4
    assert costs[1] - costs[0] == pytest.approx(2 * 12 * (4 - 1) * visible.mean())


def test_without_summaries_nothing_is_pooled_and_only_members_are_read():
    changes = {"n_layer": 1, "layers": "4", "selection": "members", "open_groups": 2}
    config = CoGAConfig.preset("tiny", **{**SMALL, **changes})
    with_all, without = (_flops.flops(config.replace(summaries=x), 80) for x in (True, False))
    width, heads = config.layer(0).latent_dim + config.rope_dim, config.n_head
    rest = np.maximum(0, np.maximum(0, np.arange(80) // 16 - 1) * 4 - 2).mean()
    key = 2 * heads * (width + config.layer(0).latent_dim)
    assert with_all["reads"] - without["reads"] == pytest.approx(key * rest)
    assert with_all["grouping"] - without["grouping"] == 2 * 4 * width
    assert with_all["choices"] == without["choices"]


def test_dense_attention_costs_more_than_groups_and_groups_more_than_the_window():
    cost = {
        name: _flops.forward_flops(CoGAConfig.preset("small", layers=name), 32768)
        for name in ("near", "32", "full", "mha")
    }
    assert cost["near"] < cost["32"] < cost["mha"] < cost["full"]
    every = CoGAConfig.preset("small", layers="32", open_groups=10**6, refine_groups=False)
    full = _flops.flops(CoGAConfig.preset("small", layers="full"), 32768)
    assert _flops.flops(every, 32768)["reads"] == full["reads"]


# --- fit and what it measures ------------------------------------------------------------------------------


def test_learning_rate():
    rates = [_fit.rate_at(step, 100, 2.0, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == max(rates) == pytest.approx(2.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)
    assert _fit.rate_at(0, 1, 2.0, 0) == pytest.approx(2.0)
    assert _fit.rate_at(99, 100, 2.0, 10, floor=0.0) == 0


def probes(*ids: list[int]) -> list:
    return [(100 * (i + 1), {0: (np.array([one]), 2)}) for i, one in enumerate(ids)]


def test_flips_are_those_of_the_last_quarter():
    found = _fit.Fitted(400, probes=probes([0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 0, 1]))
    assert [rate for _, _, rate in found.flip_curve] == [0.5, 0.5, 0.25]
    # Ids that swapped are the same groups: 1 1 0 1 differs from 0 0 1 1 by one token.
    assert found.flips == {"flip_rate": 0.25, "flip_steps": 100, "flip_rate_100": 0.25}
    assert _fit.Fitted(800, probes=found.probes).flips["flip_rate"] is None
    assert _fit.Fitted(400).flips["flip_rate_100"] is None
    assert _fit.per_hundred(50, 0.1) == pytest.approx(0.2)
    assert _fit.per_hundred(5, 0.1) == 1


@pytest.mark.parametrize(("steps", "gap"), [(1, 1), (8, 2), (300, 75), (2000, 100)])
def test_probes_end_with_the_run_and_cover_its_last_quarter(steps, gap):
    found = sorted(_fit._probe_steps(steps))
    assert found[-1] == steps
    assert found[0] >= 1
    assert {b - a for a, b in pairwise(found)} <= {gap}
    assert steps < 4 or steps - steps // 4 in found


def test_validate_gives_the_models_loss(corpus):
    from coga.data import contexts

    model = CoGAGPT(CoGAConfig.preset("tiny", **SMALL))
    tokens, targets = contexts(corpus, 100, 5)
    loss_T, used = _fit.validate(model, tokens, targets, CPU, 2)
    assert model.training
    loss = float(model.eval()(tokens, targets).loss.detach())
    assert float(loss_T.mean()) == pytest.approx(loss, rel=1e-5)
    assert used[0] is None
    assert [float(u.sum()) for u in used[1:]] == pytest.approx([1, 1])
    report = _fit.position_report(loss_T, 32)
    bits = loss_T.numpy() / math.log(2)
    assert report["beyond_bits_per_byte"] == pytest.approx(bits[32:].mean())
    assert report["position_bits_per_byte"][0] == pytest.approx(bits[: report["position_edges"][1]].mean())
    assert _fit.position_report(loss_T, 100)["beyond_bits_per_byte"] is None


def test_dead_prototypes_and_their_use():
    model = CoGAGPT(CoGAConfig.preset("tiny", **SMALL))
    used = [None, torch.tensor([0.5, 0.5, 0, 0]).double(), torch.tensor([0.5, 0.5]).double()]
    found = _fit.group_metrics(model, used, torch.arange(64))
    assert found["prototype_use"] == pytest.approx(0.75)
    assert found["prototype_use_worst"] == pytest.approx(0.5)
    assert (found["prototypes"], found["dead_prototypes"]) == (6, 2)
    assert -1 <= found["coherence_between"] < found["coherence_inside"] <= 1
    near = CoGAGPT(CoGAConfig.preset("tiny", **{**SMALL, "layers": "near"}))
    assert set(_fit.group_metrics(near, [None] * 3, torch.arange(64)).values()) == {None}


def fitted(corpus, steps: int = 6, **options) -> _fit.Fitted:
    model = CoGAGPT(CoGAConfig.preset("tiny", **{**SMALL, "layers": "near"}))
    options = {"lr": 1e-3, "warmup": 1, "device": CPU, **options}
    return _fit.fit(model, lambda step: batches(corpus, 40, 2, 0, step), steps, **options)


def test_a_step_that_is_not_finite_ends_the_run(corpus, monkeypatch):
    seen = []

    def poisoned(parameters, limit):
        seen.append(1)
        return torch.tensor(float("nan") if len(seen) == 3 else 1.0)

    assert not fitted(corpus).diverged
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    found = fitted(corpus)
    assert found.diverged
    assert len(seen) == 3


def test_a_loss_that_ends_high_has_diverged(corpus):
    assert fitted(corpus, steps=12, lr=3.0).diverged
    found = _fit.Fitted(4, losses=[(1, 5.0), (2, 3.0), (3, 4.5), (4, 3.1)])
    assert found.worst_rise == pytest.approx(1.5)


# --- rows --------------------------------------------------------------------------------------------------


def test_rows_are_mended(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert _rows.read_rows(tmp_path) == []
    _rows.append_row(tmp_path, {"a": 1, "b": [float("nan"), np.float32(0.5)], "c": torch.tensor(3)})
    _rows.append_row(tmp_path, {"a": 2})
    whole = path.read_bytes()
    expected = [{"a": 1, "b": [None, 0.5], "c": 3}, {"a": 2}]
    assert _rows.read_rows(tmp_path) == expected
    for cut in range(1, len(b'{"a": 2}\n')):
        path.write_bytes(whole[:-cut])
        kept = 2 if cut == 1 else 1  # a whole object without its newline is a row
        assert _rows.read_rows(tmp_path) == expected[:kept]
        _rows.append_row(tmp_path, {"a": 3})
        assert _rows.read_rows(tmp_path) == [*expected[:kept], {"a": 3}]
    path.write_bytes(b'{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        _rows.read_rows(tmp_path)
    path.write_bytes(b"[1]\n")
    with pytest.raises(ValueError, match="line 1"):
        _rows.read_rows(tmp_path)


def test_mean_and_spread():
    assert _rows.mean_spread([1.0, None, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert _rows.mean_spread([1.0]) == (1.0, None)
    assert _rows.mean_spread([None]) == (None, None)


# --- a run -------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(done):
    names = {"rows.jsonl", "table.md", "positions.png", "losses.png", "flips.png"}
    assert {path.name for path in done.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in done.glob("*.png"))
    rows = rows_of(done)
    assert list(rows) == [("gumbel", 0), ("near", 0), ("gumbel", 1), ("near", 1)]
    for (arm, seed), row in rows.items():
        assert row["tokens"] == 8 * 2 * 100
        assert row["model"]["layers"] == ("near" if arm == "near" else "near 4 8")
        assert row["model"]["seed"] == seed
        assert row["setting"]["n"] == 100
        for name in ("hardware", "torch", "python", "date", "command", "precision"):
            assert row[name]
        metrics = row["metrics"]
        assert 4 < metrics["bits_per_byte"] < 8.5
        assert metrics["beyond"] == 32
        for name in ("seconds", "tokens_per_second", "peak_bytes", "flops_per_second", "parameters"):
            assert metrics[name] > 0
        config = CoGAConfig(**row["model"])
        assert metrics["training_flops"] == pytest.approx(_flops.training_flops(config, 100) * 1600)
        assert metrics["diverged"] is False
        assert [step for step, _ in row["curves"]["loss"]] == list(range(1, 9))
        grouped = arm == "gumbel"
        assert [step for step, _ in row["curves"]["flip_rate_100"]] == ([4, 6, 8] if grouped else [])
        assert metrics["flip_steps"] == (2 if grouped else None)
        assert metrics["prototypes"] == (6 if grouped else None)
        for name in ("flip_rate_100", "prototype_use", "coherence_inside", "coherence_between"):
            assert (metrics[name] is not None) == grouped


def test_arms_see_the_same_batches_and_a_run_repeats(text, tmp_path, done, monkeypatch):
    """Alone and in another order, an arm gives the figures it gave beside the others."""
    asked = []

    def watched(corpus, *arguments):
        asked.append(arguments)
        return batches(corpus, *arguments)

    monkeypatch.setattr(ablate, "batches", watched)
    arguments = ["--arms", "near,gumbel", "--seeds", "1", "--data", text, "--out", str(tmp_path / "run")]
    assert ablate.main([*TINY, *arguments]) == 0
    assert asked == [(100, 2, 1, step) for step in range(8)] * 2
    mine, theirs = rows_of(tmp_path / "run"), rows_of(done)
    for key in mine:
        assert figures(mine[key]) == figures(theirs[key])
        assert mine[key]["curves"] == theirs[key]["curves"]
    assert figures(theirs["near", 0]) != figures(theirs["near", 1])


def test_prototypes_may_learn_at_a_rate_of_their_own(corpus):
    """At a millionth of the rate they stay where they were, and the rest does not."""
    moved = []
    for rate in (1.0, 1e-6):
        model = CoGAGPT(CoGAConfig.preset("tiny", **SMALL, revive=0.0))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        drawn = lambda step: batches(corpus, 100, 2, 0, step)  # noqa: E731
        _fit.fit(model, drawn, 4, lr=1e-2, warmup=1, device=CPU, prototype_lr=rate)
        after = model.state_dict()
        names = ("blocks.1.attention.grouping.prototypes_GC", "embedding.weight")
        moved.append([float((after[k] - before[k]).abs().max()) for k in names])
    assert moved[0][0] > 1e-3 and moved[1][0] < 1e-6
    assert min(moved[0][1], moved[1][1]) > 1e-3


def test_models_are_kept_where_asked_for(done, text, tmp_path):
    assert not (done / "models").exists()
    arguments = ["--arms", "gumbel:beta=4", "--seeds", "1", "--save-models", "--data", text]
    assert ablate.main([*TINY, *arguments, "--out", str(tmp_path / "out")]) == 0
    (folder,) = (tmp_path / "out" / "models").iterdir()
    model = CoGAGPT.from_pretrained(folder)
    held_out = contexts(load_corpus(text, length=100), 100, 2)
    (row,) = rows_of(tmp_path / "out").values()
    assert row["metrics"]["copying"] == pytest.approx(copying(model, *held_out, CPU, 2), rel=1e-5)
    assert folder.name == "gumbel_beta=4-1" and model.config.beta == 4 and int(model.step_count) == 8


def test_fields_and_learning_rate_of_an_arm_reach_the_run(text, tmp_path, monkeypatch):
    rates, fit = [], ablate.fit

    def watched(model, *arguments, **options):
        rates.append((options["lr"], model.config.sink))
        return fit(model, *arguments, **options)

    monkeypatch.setattr(ablate, "fit", watched)
    arguments = ["--arms", "near,near:sink=false,lr_scale=2", "--seeds", "0", "--lr", "0.01", "--steps", "2"]
    assert ablate.main([*TINY, *arguments, "--data", text, "--out", str(tmp_path / "run")]) == 0
    assert rates == [(0.01, True), (0.02, False)]


# --- a dense start -----------------------------------------------------------------------------------------


def started(text, folder, arms: str, *more: str) -> dict:
    arguments = ["--arms", arms, "--seeds", "0", "--data", text, "--out", str(folder), *more]
    assert ablate.main([*TINY, *arguments]) == 0
    return rows_of(folder)


def test_a_dense_model_interrupted_by_a_start_is_the_one_that_is_not(text, tmp_path):
    """Weights, moments, schedule and batches go on where they were: the same figures to the bit."""
    whole = started(text, tmp_path / "a", "full,mha")
    parts = started(text, tmp_path / "b", "full,mha", "--dense-steps", "5")
    assert len(list((tmp_path / "b" / "starts").iterdir())) == 2
    for key, row in whole.items():
        assert row["tokens"] == parts[key]["tokens"] == 8 * 2 * 100
        for name in ("position_bits_per_byte", "training_flops"):
            assert row["metrics"][name] == pytest.approx(parts[key]["metrics"][name], rel=1e-12)
        first, second = (dict(one["curves"]["loss"]) for one in (row, parts[key]))
        assert first == second
        # How well it copied when the arms took over, and at the end.
        early, late = (parts[key]["metrics"][name] for name in ("dense_copying", "copying"))
        assert list(early) == list(late) == ["first", "near", "far"]
        assert late["first"] < early["first"]
        assert row["metrics"]["dense_copying"] == {}
        assert row["metrics"]["copying"] == pytest.approx(late)


def test_latents_are_shrunk_after_a_wide_dense_start(text, tmp_path, monkeypatch):
    """The wide start is the one of the wide arm; what has another shape starts without moments."""
    fits, fit = [], ablate.fit

    def watched(model, *arguments, **options):
        found = fit(model, *arguments, **options)
        widths = [block.attention.projections.content for block in model.blocks]
        fits.append((options.get("first", 0), widths, options.get("moments"), found))
        return found

    monkeypatch.setattr(ablate, "fit", watched)
    wide, narrow = "full:latent_dim=24", "gumbel:latent_dim=[24,16,8],dense_latent_dim=24"
    rows = started(text, tmp_path / "a", f"{wide},{narrow}", "--dense-steps", "4")
    assert [(first, widths) for first, widths, *_ in fits] == [
        (0, [24, 24, 24]), (4, [24, 24, 24]), (4, [24, 16, 8])
    ]  # fmt: skip
    all_moments, left = fits[1][2], fits[2][2]
    gone = {name.split("attention.")[-1] for name in all_moments.keys() - left.keys()}
    assert gone == {"projections.query.weight", "projections.latent.weight", "projections.up_HCE"}
    assert not any(name.startswith("blocks.0.") for name in all_moments.keys() - left.keys())
    assert rows[narrow, 0]["start"] == {"prototypes": "data", "far_bias": 0.0, "latent_dim": 24}
    assert "latent_dim" not in rows[wide, 0]["start"]
    assert rows[narrow, 0]["model"]["latent_dim"] == [24, 16, 8]
    wide_part = rows[wide, 0]["metrics"]["training_flops"] / 2
    assert rows[narrow, 0]["metrics"]["training_flops"] > wide_part


def test_a_switch_is_thrown_after_the_dense_start_of_the_unchanged_model(text, tmp_path, monkeypatch):
    """dense=plain: one start for both, weights and moments carried over, the switch's own parameters gone."""
    fits, fit = [], ablate.fit

    def watched(model, *arguments, **options):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        found = fit(model, *arguments, **options)
        after = {k: v.clone() for k, v in model.state_dict().items()}
        fits.append((options.get("first", 0), before, options.get("moments"), after))
        return found

    monkeypatch.setattr(ablate, "fit", watched)
    arms = "full,full:sink=false,dense=plain,full:output_gate=false,reciprocal=false,dense=plain"
    rows = started(text, tmp_path / "a", arms, "--dense-steps", "4")
    assert [first for first, *_ in fits] == [0, 4, 4, 4]
    trained = fits[0][3]
    for (_, read, moments, _), gone in zip(fits[1:], ((), ("sink_H",), ("gate.weight", "alpha_H"))):
        assert all(torch.equal(x, trained[name]) for name, x in read.items() if name != "step_count")
        missing = {name for name in trained if name.endswith(gone)} if gone else set()
        assert trained.keys() - read.keys() == missing and len(missing) == 3 * len(gone)
        carried = [name for name, x in read.items() if name in moments]
        assert {name for name in trained if name in moments} - {*carried} == missing
        assert all(moments[name]["exp_avg"].any() and moments[name]["step"] == 4 for name in carried)
    assert rows["full:sink=false,dense=plain", 0]["start"]["dense"] == "plain"
    assert "dense" not in rows["full", 0]["start"]


def test_arms_share_a_dense_start_and_learn_after_it(text, tmp_path, monkeypatch):
    """One start for all arms whose dense twin is the same, kept for another call; new parameters move."""
    fits, fit = [], ablate.fit

    def watched(model, *arguments, **options):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        found = fit(model, *arguments, **options)
        fits.append((options.get("first", 0), options.get("last"), before, model.state_dict()))
        return found

    monkeypatch.setattr(ablate, "fit", watched)
    dense = ["--dense-steps", "4", "--dense-n", "50", "--starts", str(tmp_path / "starts")]
    rows = started(text, tmp_path / "a", "gumbel,near,gumbel:sink=false", *dense)
    assert [(first, last) for first, last, *_ in fits] == [(0, 4), (4, None), (4, None), (0, 4), (4, None)]
    (_, _, _, trained), (_, _, read, moved) = fits[:2]
    assert all(torch.equal(read[k], trained[k]) for k in trained if "far_bias" not in k and k != "step_count")
    for name in ("blocks.1.attention.far_bias_H", "blocks.2.attention.grouping.prototypes_GC"):
        assert not torch.equal(read[name], moved[name]), name
    assert [step for step, _ in rows["near", 0]["curves"]["loss"]] == list(range(1, 9))
    assert rows["gumbel", 0]["metrics"]["dense_tokens"] == 4 * 200
    again = started(text, tmp_path / "b", "gumbel", *dense)
    assert len(fits) == 6
    assert figures(again["gumbel", 0]) == figures(rows["gumbel", 0])
    # Other prototypes and biases are other runs on the same start; other first weights are another start.
    other = started(text, tmp_path / "d", "gumbel:prototypes=random,gumbel:far_bias_init=-4", *dense)
    assert len(fits) == 8
    assert other["gumbel:prototypes=random", 0]["start"] == {"prototypes": "random", "far_bias": 0.0}
    assert other["gumbel:far_bias_init=-4", 0]["start"] == {"prototypes": "data", "far_bias": -4.0}
    assert rows["gumbel", 0]["start"] == {"prototypes": "data", "far_bias": 0.0}
    name = "blocks.1.attention.grouping.prototypes_GC"
    assert not torch.equal(fits[-2][2][name], fits[1][2][name])
    assert torch.equal(fits[-1][2][name], fits[1][2][name])
    assert float(fits[-1][2]["blocks.1.attention.far_bias_H"][0]) == -4
    started(text, tmp_path / "e", "near", "--set", "layers=near", *dense)
    assert len(fits) == 10 and fits[-2][:2] == (0, 4)
    # A start cut off while it was written is trained again, to the same bits.
    for summary in (tmp_path / "starts").glob("*/summary.json"):
        summary.unlink()
    third = started(text, tmp_path / "c", "gumbel", *dense)
    assert len(fits) == 12
    assert figures(third["gumbel", 0]) == figures(rows["gumbel", 0])


def test_a_run_that_diverged_in_its_dense_part_has_diverged(text, tmp_path):
    """The whole curve is judged, and both parts count."""
    first = _fit.Fitted(8, losses=[(1, 1.0), (2, 2.5)], grad_norms=[3.0, 9.0], peak_bytes=7)
    second = _fit.Fitted(8, losses=[(3, 2.4)], grad_norms=[1.0], peak_bytes=5)
    assert not second.risen
    second.follows(first)
    assert second.diverged and max(second.grad_norms) == 9 and second.peak_bytes == 7
    assert second.losses == [(1, 1.0), (2, 2.5), (3, 2.4)]
    healthy = _fit.Fitted(8, losses=[(3, 0.9)], grad_norms=[1.0])
    healthy.follows(_fit.Fitted(8, losses=[(1, 1.0)], diverged=True))
    assert healthy.diverged
    rows = started(text, tmp_path / "run", "near,gumbel", "--dense-steps", "4", "--lr", "1e30")
    assert rows["near", 0]["metrics"]["diverged"] and rows["gumbel", 0]["metrics"]["diverged"]


def test_rows_that_started_otherwise_are_refused(text, tmp_path, refused):
    """What a name meant once is not what it means today."""
    folder = tmp_path / "run"
    started(text, folder, "gumbel", "--dense-steps", "4")
    path = folder / "rows.jsonl"
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "start": {"prototypes": "random", "far_bias": 0.0}}) + "\n")
    arguments = ["--arms", "gumbel", "--seeds", "0,1", "--data", text, "--dense-steps", "4", "--resume"]
    assert "start=" in refused([*TINY, *arguments, "--out", str(folder)])


# --- resuming ----------------------------------------------------------------------------------------------


def copied(done: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes((done / "rows.jsonl").read_bytes())
    return folder


def counted(monkeypatch) -> list[tuple[str, int]]:
    runs, run = [], ablate._run

    def watched(arm, seed, *rest):
        runs.append((arm.text, seed))
        return run(arm, seed, *rest)

    monkeypatch.setattr(ablate, "_run", watched)
    return runs


def test_resume_runs_what_is_missing_only(done, text, tmp_path, monkeypatch, capsys):
    folder, runs = copied(done, tmp_path), counted(monkeypatch)
    path = folder / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # the last row was being written
    arguments = [*TINY, "--data", text, "--out", str(folder), "--resume"]
    assert ablate.main([*arguments, "--arms", "gumbel,near", "--seeds", "0,1"]) == 0
    assert runs == [("near", 1)]
    assert figures(rows_of(folder)["near", 1]) == figures(rows_of(done)["near", 1])
    assert "3 runs are already there" in capsys.readouterr().out
    before = path.read_bytes()
    assert ablate.main([*arguments, "--arms", "near", "--seeds", "1"]) == 0
    assert len(runs) == 1
    assert path.read_bytes() == before
    # An arm more is compared with what is there.
    assert ablate.main([*arguments, "--arms", "mha", "--seeds", "0"]) == 0
    assert runs[1:] == [("mha", 0)]
    assert "| mha |" in (folder / "table.md").read_text()


def test_time_limit_stops_between_runs(text, tmp_path, monkeypatch, capsys):
    folder, runs = tmp_path / "run", counted(monkeypatch)
    arguments = [*TINY, "--arms", "near,mha", "--seeds", "0", "--data", text, "--out", str(folder)]
    arguments += ["--steps", "2", "--resume"]
    assert ablate.main([*arguments, "--time-limit", "0"]) == 0
    assert runs == []
    out = capsys.readouterr().out
    assert "2 runs left" in out
    assert "near seed 0  mha seed 0" in out
    # The clock passes the limit during the first run: it is kept, the second is not started.
    clock, now = ablate.time.monotonic, [0.0]
    monkeypatch.setattr(ablate.time, "monotonic", lambda: clock() + now[0])
    run = ablate._run

    def slow(*given):
        now[0] += 1000
        return run(*given)

    monkeypatch.setattr(ablate, "_run", slow)
    assert ablate.main([*arguments, "--time-limit", "900"]) == 0
    assert list(rows_of(folder)) == [("near", 0)]
    assert "1 runs left" in capsys.readouterr().out
    assert ablate.main([*arguments, "--time-limit", "9000"]) == 0
    assert list(rows_of(folder)) == [("near", 0), ("mha", 0)]


def test_a_run_that_would_end_too_late_is_not_started(done, text, tmp_path, monkeypatch, capsys):
    near, mha = _arms.parse_arms("near,mha")
    # Of 50 and 70 seconds 40 were training, 38 of them building kernels: 100 tokens at 50 a second take 2.
    rows = [
        {
            "arm": arm,
            "tokens": 1100,
            "metrics": {"wall_seconds": s, "seconds": 40, "tokens_per_second": 50, "dense_tokens": 1000},
        }
        for arm, s in (("near", 50.0), ("gumbel", 70.0))
    ]
    assert [ablate._expected(rows, arm, False) for arm in (near, mha)] == [50, 70]
    assert [ablate._expected(rows, arm, True) for arm in (near, mha)] == [12, 32]
    assert ablate._expected([], near, True) == 0
    folder, runs = copied(done, tmp_path), counted(monkeypatch)
    slow = [{**row, "metrics": {**row["metrics"], "wall_seconds": 5000.0}} for row in rows_of(done).values()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in slow))
    arguments = ["--arms", "near", "--seeds", "2", "--data", text, "--out", str(folder), "--resume"]
    assert ablate.main([*TINY, *arguments, "--time-limit", "1000"]) == 0
    assert "near seed 2" in capsys.readouterr().out
    assert runs == []


def test_out_of_memory_costs_one_run(text, tmp_path, monkeypatch, capsys):
    run = ablate._run

    def too_large(arm, *rest):
        if arm.text == "mha":
            raise torch.OutOfMemoryError("no room")
        return run(arm, *rest)

    monkeypatch.setattr(ablate, "_run", too_large)
    arguments = ["--arms", "mha,near", "--seeds", "0", "--steps", "2", "--data", text]
    assert ablate.main([*TINY, *arguments, "--out", str(tmp_path / "run")]) == 1
    assert "mha seed 0" in capsys.readouterr().err
    assert list(rows_of(tmp_path / "run")) == [("near", 0)]


def test_ctrl_c(text, tmp_path, monkeypatch, capsys):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate, "_run", interrupted)
    arguments = ["--arms", "near", "--data", text, "--out", str(tmp_path / "run")]
    assert ablate.main([*TINY, *arguments]) == 130
    assert "--resume" in capsys.readouterr().err


def test_a_diverged_run_leaves_a_row(text, tmp_path, capsys):
    arguments = ["--arms", "gumbel:lr_scale=1e30,near", "--seeds", "0", "--data", text]
    assert ablate.main([*TINY, *arguments, "--out", str(tmp_path / "run")]) == 0
    found = rows_of(tmp_path / "run")
    assert found["gumbel:lr_scale=1e30", 0]["metrics"]["diverged"] is True
    assert found["near", 0]["metrics"]["diverged"] is False
    assert "DIVERGED" in capsys.readouterr().out


# --- report ------------------------------------------------------------------------------------------------


def test_report_only_redraws_from_the_rows(done, tmp_path, monkeypatch, capsys):
    folder, runs = copied(done, tmp_path), counted(monkeypatch)
    assert ablate.main(["--report-only", "--out", str(folder), "--reference", "near"]) == 0
    assert runs == []
    assert {path.name for path in folder.iterdir()} == {path.name for path in done.iterdir()}
    assert "minus near" in (folder / "table.md").read_text()
    assert "minus near" in capsys.readouterr().out
    assert (folder / "positions.png").read_bytes() != (done / "positions.png").read_bytes()


def made(arm: str, seed: int, bits: float, beyond: float | None = None) -> dict:
    metrics = dict.fromkeys(("flip_rate_100", "prototype_use", "peak_bytes", "seconds", "tokens_per_second"))
    metrics |= {"bits_per_byte": bits, "beyond_bits_per_byte": beyond, "beyond": 32, "diverged": False}
    return {"arm": arm, "seed": seed, "tokens": 10, "metrics": {**metrics, "training_flops": 2e7}}


def test_table_pairs_by_seed():
    rows = [made("gumbel", 0, 2.0, 1.0), made("near", 0, 2.1, 1.5), made("gumbel", 1, 3.0, 1.0)]
    rows += [made("near", 1, 3.3, None), made("near", 2, 9.0), made("gumbel", 0, 7.0)]  # the last: a repeat
    found = _ablate_report.tables(rows, "gumbel")
    assert found["Held out"][1][:4] == ["gumbel", "2", "0", "2.5000 ± 0.7071"]
    head, line = found["Paired differences"]
    assert head[:5] == ["minus gumbel", "bits per byte", "seed 0", "seed 1", "seed 2"]
    assert line == ["near", "+0.2000 ± 0.1414", "+0.1000", "+0.3000", "-", "+0.5000", "+0.5000", "-", "-"]
    assert found["Groups and cost"][1][8] == "2.00"  # MFLOP a token
    assert "Paired differences" not in _ablate_report.tables(rows[:1], "gumbel")


# --- bad input ---------------------------------------------------------------------------------------------

BAD = {
    "arm": (["--arms", "gumbel,magic"], "arms='magic'"),
    "arm-field": (["--arms", "gumbel:colour=1"], "colour"),
    "arm-value": (["--arms", "gumbel:band=17"], "at most window=16"),
    "seeds": (["--seeds", "0,x"], "seeds='0,x'"),
    "seed-negative": (["--seeds", "-1"], "seeds"),
    "seed-field": (["--set", "seed=1"], "option of their own"),
    "n-0": (["--n", "0"], "n=0"),
    "n-above-max-len": (["--n", "200000"], "max_len=131072"),
    "n-above-the-arms": (["--arms", "near,mha:max_len=64"], "max_len=64"),
    "n-above-the-data": (["--n", "6000"], "must hold at least"),
    "steps": (["--steps", "0"], "steps=0"),
    "batch": (["--batch", "0"], "batch=0"),
    "validation": (["--validation", "0"], "validation=0"),
    "preset": (["--preset", "huge"], "preset='huge'"),
    "field": (["--set", "colour=1"], "colour"),
    "shared-value": (["--arms", "near", "--set", "window=18"], "multiple of every group size"),
    "vocabulary": (["--set", "vocab_size=100"], "vocab_size=100"),
    "lr": (["--lr", "nan"], "lr=nan"),
    "warmup": (["--warmup", "-1"], "warmup=-1"),
    "final-lr": (["--final-lr", "1.5"], "final_lr=1.5"),
    "dense-steps": (["--dense-steps", "8"], "below steps=8"),
    "dense-n": (["--dense-steps", "4", "--dense-n", "30"], "dense_n=30: must divide"),
    "dense-n-alone": (["--dense-n", "50"], "needs --dense-steps"),
    "starts-a-file": (["--dense-steps", "4", "--starts", __file__], f"starts={__file__!r}: must be a folder"),
    "dense-fading": (["--dense-steps", "4", "--set", "far_warmup=2"], "far_warmup=2: must be 0"),
    "prototypes-alone": (["--arms", "gumbel:prototypes=random"], "needs --dense-steps"),
    "plain-alone": (["--arms", "gumbel:sink=false,dense=plain"], "dense='plain': needs --dense-steps"),
    "plain-mha": (["--arms", "mha:sink=false,dense=plain", "--dense-steps", "4"], "no layers of kind mha"),
    "plain-unfit": (
        [
            "--arms",
            "random,gumbel:coherence_weight=0.1,dense=plain",
            "--dense-steps",
            "4",
            "--set",
            "grouping=random",
            "--set",
            "selection=members",
            "--set",
            "summaries=false",
            "--set",
            "coherence_weight=0",
        ],
        "coherence_weight=0",
    ),
    "wide-alone": (["--arms", "gumbel:dense_latent_dim=64"], "dense_latent_dim=64: needs --dense-steps"),
    "not-wide": (["--arms", "full:dense_latent_dim=4", "--dense-steps", "4"], "at least latent_dim="),
    "starts-alone": (["--starts", "elsewhere"], "needs --dense-steps"),
    "device": (["--device", "abacus"], "device='abacus'"),
    "reference": (["--reference", "full"], "reference='full'"),
    "time-limit": (["--time-limit", "nan"], "time_limit=nan"),
    "graph": (["--graph", "--device", "cpu"], "graph=True: needs a CUDA device"),
    "missing": (["--data", "/nowhere/text"], "existing file or folder"),
    "flag": (["--colour"], "--colour"),
    "nothing-to-report": (["--report-only"], "holds no rows.jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, text, refused_and_nothing_written, monkeypatch):
    monkeypatch.setattr(ablate, "_run", lambda *given: pytest.fail("computed"))
    arguments, expected = BAD[name]
    given = [*TINY, "--arms", "gumbel,near", "--data", text, *arguments]
    assert expected in refused_and_nothing_written(given)


def test_an_empty_file(tmp_path, refused):
    (tmp_path / "empty").write_text("")
    assert "must not be empty" in refused([*TINY, "--data", str(tmp_path / "empty")])


def test_a_folder_that_cannot_be_written(text, tmp_path, refused):
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        assert "out=" in refused([*TINY, "--data", text, "--out", str(place)])
    assert (tmp_path / "file").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_other_settings_is_left_alone(done, text, tmp_path, refused):
    before = snapshot(done)
    arguments = [*TINY, "--data", text, "--out", str(done), "--arms", "gumbel,near", "--seeds", "0,1"]
    assert "use --resume" in refused(arguments)
    arguments.append("--resume")
    assert "steps=9" in refused([*arguments, "--steps", "9"])
    assert "lr=0.5" in refused([*arguments, "--lr", "0.5"])
    assert "model=" in refused([*arguments, "--set", "sink=false"])
    other = tmp_path / "other.txt"
    other.write_bytes(Path(text).read_bytes() + b"more")
    assert "sha256" in refused([*arguments, "--data", str(other)])
    assert snapshot(done) == before


def test_rows_from_before_a_default_changed_are_refused(done, text, tmp_path, refused):
    folder = copied(done, tmp_path)
    path = folder / "rows.jsonl"
    path.write_text(path.read_text().replace('"far_bias_init": -2.0', '"far_bias_init": -3.0'))
    arguments = [*TINY, "--data", text, "--out", str(folder), "--resume"]
    for arm in ("gumbel", "near"):  # of an arm that is asked for, and of another: they are compared
        assert "far_bias_init=-3.0" in refused([*arguments, "--arms", arm, "--seeds", "2"])


def test_a_default_of_groups_does_not_part_models_without_any():
    for layers, found in (("near full", ""), ("near 8", "beta=1, a run of today 2")):
        assert _arms.different({"layers": layers, "beta": 1}, {"layers": layers, "beta": 2}) == found
    assert _arms.different({"gain_init": None}, {}) == "gain_init=None, a run of today 'nothing'"


def test_a_folder_of_another_experiment_is_refused(done, text, tmp_path, refused):
    arguments = [*TINY, "--data", text, "--out", str(tmp_path), "--resume"]
    (tmp_path / "rows.jsonl").write_text('{"arm": "near", "accuracy": 1}\n')
    assert "another experiment" in refused(arguments)
    whole = json.loads((done / "rows.jsonl").read_text().splitlines()[0])
    for broken in ({"arm": None}, {"arm": ["near"]}, {"model": None}, {"model": []}, {"metrics": None}):
        (tmp_path / "rows.jsonl").write_text(json.dumps(whole | broken) + "\n")
        assert "another experiment" in refused(arguments)
    (tmp_path / "rows.jsonl").write_text(json.dumps(whole | {"arm": "gumbel:foo=1"}) + "\n")
    assert "means nothing today" in refused(arguments)
    (tmp_path / "rows.jsonl").write_text("{\n{}\n")
    assert "line 1" in refused(arguments)
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "config.json").write_text("{}")
    assert "another experiment" in refused(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
