"""Table and picture of `bench_attention.py` from rows that are there; the timing itself needs a GPU."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
import bench_attention
from _flops import layer_flops
from _speed_parts import Part, measure_parts, part_line, parts

SCRIPT = bench_attention

BAD = {
    "text": (["--lengths", "256,x"], "lengths='256,x'"),
    "zero": (["--lengths", "0"], "lengths=0"),
    "twice": (["--lengths", "256,256"], "lengths='256,256'"),
    "repeats": (["--repeats", "0"], "repeats=0"),
    "tokens": (["--tokens", "-1"], "tokens=-1"),
    "parts": (["--parts", "R64"], "parts='R64'"),
    "dtype": (["--dtype", "float64"], "float64"),
    "unknown": (["--lenghts", "256"], "lenghts"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, refused_and_nothing_written):
    arguments, expected = BAD[name]
    assert expected in refused_and_nothing_written(arguments)


def test_rows_are_not_written_over(not_written_over):
    not_written_over("attention_speed.json", [])


def test_report_only_compares_with_the_dense_rows_of_the_same_run(tmp_path, capsys):
    rows = [
        dict(implementation=name, setting="s", length=4096, ms=ms, launched_ms=ms, peak_mib=1.0, commit=run)
        | {"pass": "fwd"}
        for name, ms, run in (("sdpa-flash", 4.0, "a"), ("sdpa-cudnn", 3.0, "a"), ("coga", 2.0, "a"),
                              ("sdpa-flash", 8.0, "b"), ("coga", 2.0, "b"))
    ]  # fmt: skip
    (tmp_path / "attention_speed.json").write_text(json.dumps(rows))
    assert bench_attention.main(["--report-only", "--out", str(tmp_path)]) == 0
    ours = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("coga")]
    assert sorted(ours) == ["1.50", "4.00"]
    assert (tmp_path / "attention_speed.png").stat().st_size > 1000


@pytest.mark.parametrize("text", [None, "", "{}", "[1]", '[{"ms": 1}]'])
def test_report_only_refuses_what_are_no_rows(text, tmp_path, refused):
    if text is not None:
        (tmp_path / "attention_speed.json").write_text(text)
    assert "error: out=" in refused(["--report-only", "--out", str(tmp_path)])
    assert not (tmp_path / "attention_speed.png").exists()


def test_settings_are_named_by_what_differs():
    fixed = bench_attention.setting_of("fixed")
    assert fixed == bench_attention.FIXED
    assert bench_attention.setting_of("W256-R64-K8") == fixed | dict(window=256, layers="64", open_groups=8)
    assert bench_attention.setting_of("C128-cap1.5") == fixed | dict(latent_dim=128, capacity_factor=1.5)
    plain = dict(layers="64", open_groups=5, refine_groups=False, refine_steps=2)
    assert bench_attention.setting_of("R64-K5-refine0-steps2") == fixed | plain
    assert bench_attention.setting_of("K4-members1") == fixed | dict(open_groups=4, selection="members")
    assert bench_attention.setting_of("near") == fixed | dict(layers="near")
    assert fixed["output_gate"] and bench_attention.setting_of("gate0") == fixed | dict(output_gate=False)
    gates = [
        bench_attention.module_of(setting)[0].projections.gate
        for setting in (fixed, fixed | dict(output_gate=False))
    ]
    assert gates[0] is not None and gates[1] is None


@pytest.mark.parametrize(
    "name", ["fast", "R64-", "R64-R32", "Q8", "R48", "K-1", "W16", "P3", "refine2", "members2", "gate2", ""]
)
def test_settings_that_cannot_be(name, tmp_path, refused):
    assert "needs a CUDA GPU" not in refused(["--settings", name, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["R64-K4", "R64-K2-refine0-members1-summaries0-index1"])
def test_parts_stand_beside_floors_of_what_they_do(name):
    module, config = bench_attention.module_of(bench_attention.setting_of(name), backend="reference")
    length = 2560
    x = torch.randn(1, length, bench_attention.DIM)
    context = bench_attention.context_of(config, length, config.rope_dim, torch.float32, "cpu")
    made = [replace(part, compiled=False) for part in parts(module, config, x, context)]
    called = []

    def time_ms(run):
        called.append(run())
        return 2.0

    rows = list(measure_parts(made, length, (1e12, 1e11), time_ms))
    assert len(called) == len(rows) - 2  # sums are not timed
    by = {(row["part"].strip(), row["pass"]): row for row in rows}
    total = by["sum: projections in, groups, attention, projections out", "fwd"]
    whole = sum(layer_flops(config, config.layer(0), length).values())
    assert total["gflop"] * 1e9 == pytest.approx(whole * length, rel=1e-6)
    assert total["ms"] == 8.0
    for row in rows:
        assert (
            row["floor_ms"] == pytest.approx(max(row["gflop"], row["mb"] / 1e2), rel=1e-6) or not row["bound"]
        )
        assert row["mb"] > 0
    near, attention = by["of it: near alone", "fwd"], by["attention", "fwd"]
    assert 0 < near["gflop"] < attention["gflop"]
    q, latent = length * 12 * 96 * 4, length * 96 * 4
    assert near["mb"] * 1e6 == q + latent + length * 12 * 64 * 4
    # Groups read the latents and one query a token, and x only where groups attend to one another.
    given = latent + length * 96 * 4 + (0 if "refine0" in name else length * bench_attention.DIM * 4)
    far = module._groups(x, *(p.inputs[i] for p in made if p.name == "groups" for i in (1, 2)), context)[1]
    returned = sum(t.numel() * t.element_size() for t in vars(far).values() if isinstance(t, torch.Tensor))
    assert by["groups", "fwd"]["mb"] * 1e6 == given + returned
    both = by["projections out", "fwd+bwd"]
    assert both["gflop"] == pytest.approx(3 * by["projections out", "fwd"]["gflop"])
    assert (("loss of the head weights", "fwd") in by) == ("index1" in name)
    line = part_line(both)
    assert line.startswith("projections out ") and line.endswith(f" {both['mb']:.0f}")


def test_a_part_that_fails_is_left_out():
    broken = Part("attention", torch.zeros_like, ("no tensor",), 1.0)
    sound = Part("projections in", torch.exp, (torch.ones(3),), 2.0, 4.0)
    attempt = lambda name: suppress(Exception)  # noqa: E731
    rows = list(measure_parts([broken, sound], 10, (1.0, 1.0), lambda run: 1.0, attempt))
    assert [(row["part"], row["pass"]) for row in rows] == [
        ("projections in", kind) for kind in ("fwd", "fwd+bwd")
    ]
    assert [row["gflop"] * 1e9 for row in rows] == pytest.approx([20, 60])
    assert [row["mb"] * 1e6 for row in rows] == pytest.approx([24, 60])


def test_a_sum_is_of_all_parts_or_is_not_there():
    def made(name, **rest):
        return Part(name, torch.exp, (torch.ones(3),), 1.0, **rest)

    both = {"projections in": 2.0, "attention": 2.0, "projections out": 2.0}
    parts_ = [made("groups"), *(made(name, backward=flops) for name, flops in both.items())]
    rows = list(measure_parts(parts_, 10, (1.0, 1.0), lambda run: 1.0))
    assert [round(row["gflop"] * 1e9) for row in rows if row["part"].startswith("sum")] == [40, 100]
    fails = replace(parts_[2], run=lambda x: x.exp() if not x.requires_grad else 1 / 0)
    attempt = lambda name: suppress(ZeroDivisionError)  # noqa: E731
    parts_[2] = fails
    rows = list(measure_parts(parts_, 10, (1.0, 1.0), lambda run: 1.0, attempt))
    assert [row["pass"] for row in rows if row["part"].startswith("sum")] == ["fwd"]


@pytest.mark.parametrize("name", ["R64-K4", "near"])
def test_parts_of_what_is_not_timed(name, tmp_path, refused):
    error = refused(["--settings", "fixed,near", "--parts", name, "--out", str(tmp_path / "out")])
    assert f"parts={name!r}: must be one of settings, and have groups" in error
    assert not (tmp_path / "out").exists()
