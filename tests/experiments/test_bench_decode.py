"""bench_decode.py: one line for bad input, and a check that notices a decoder whose logits are others'."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import bench_decode

from coga import CoGAConfig
from coga.models import CoGAGPT

SCRIPT = bench_decode

BAD = {
    "text": (["--lengths", "256,x"], "lengths='256,x'"),
    "zero": (["--lengths", "0"], "lengths=0"),
    "steps": (["--steps", "0"], "steps=0"),
    "mode": (["--modes", "eager"], "modes='eager'"),
    "arm": (["--arms", "mha,nsa"], "arms='nsa'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, expected = BAD[name]
    assert expected in refused(arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "needs a CUDA GPU" in refused([])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("scale", "agrees"), [(1.0, True), (1.1, False), (float("nan"), False)])
def test_the_check_is_red_where_logits_differ(scale, agrees, monkeypatch):
    class Decoder:
        def __init__(self, model, state, compiled):
            self.model, self.state = model, state

        def __call__(self, token_B):
            return scale * self.model.step(token_B[:, None], self.state)[0].logits[:, -1]

    monkeypatch.setattr(bench_decode, "GraphedDecoder", Decoder)
    model = CoGAGPT(CoGAConfig.preset("tiny", n_layer=2, layers="near 16")).eval()
    tokens = torch.randint(model.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (bench_decode.error(model, tokens, compiled=False) <= bench_decode.TOLERANCE) == agrees
