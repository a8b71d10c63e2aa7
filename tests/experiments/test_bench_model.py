"""bench_model.py: one line for bad input; the timing itself needs a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import bench_model

from coga import CoGAConfig
from coga.models import CoGAGPT

SCRIPT = bench_model

BAD = {
    "arm": (["--arms", "coga,mamba"], "arms='mamba'"),
    "twice": (["--arms", "coga,coga"], "arms='coga,coga'"),
    "n": (["--n", "0"], "n=0"),
    "batch": (["--batch", "-1"], "batch=-1"),
    "repeats": (["--repeats", "0"], "repeats=0"),
    "text": (["--n", "many"], "many"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, refused_and_nothing_written):
    arguments, expected = BAD[name]
    assert expected in refused_and_nothing_written(arguments)


def test_rows_are_not_written_over(not_written_over):
    not_written_over("model_speed.json", [])


def test_the_twins_have_about_as_many_parameters():
    sizes = {}
    for name, changes in bench_model.ARMS.items():
        with torch.device("meta"):
            model = CoGAGPT(CoGAConfig.preset("gpt2", **changes))
        sizes[name] = sum(p.numel() for p in model.parameters())
    for name, size in sizes.items():
        assert abs(size / sizes["sdpa-mha"] - 1) < 0.1, name
