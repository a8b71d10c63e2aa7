"""Table and picture of `bench_attention.py` from rows that are there; the timing itself needs a GPU."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")
import bench_attention


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
def test_report_only_refuses_what_are_no_rows(text, tmp_path, capsys):
    if text is not None:
        (tmp_path / "attention_speed.json").write_text(text)
    assert bench_attention.main(["--report-only", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench_attention: out=") and len(error.splitlines()) == 1
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


@pytest.mark.parametrize(
    "name", ["fast", "R64-", "R64-R32", "Q8", "R48", "K-1", "W16", "P3", "refine2", "members2", ""]
)
def test_settings_that_cannot_be(name, tmp_path, capsys):
    assert bench_attention.main(["--settings", name, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench_attention: ") and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
