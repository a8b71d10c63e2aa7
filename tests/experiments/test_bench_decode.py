"""bench_decode.py: one line for bad input, and a check that notices a decoder whose logits are others'."""

from __future__ import annotations

import json

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
    "twice": (["--arms", "mha, mha"], "names mha twice"),
    "short": (["--lengths", "99"], "lengths=99: must be above half of steps=200"),
    "arm": (["--arms", "mha,nsa"], "arms='nsa'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, refused_and_nothing_written):
    arguments, expected = BAD[name]
    assert expected in refused_and_nothing_written(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(refused_and_nothing_written):
    assert "needs a CUDA GPU" in refused_and_nothing_written([])


class Decoder:
    """Logits of `model.step`, those of the first step times `scale`."""

    scale = 1.0

    def __init__(self, model, state, compiled):
        self.model, self.state, self.taken = model, state, 0

    def __call__(self, token_B):
        self.taken += 1
        logits = self.model.step(token_B[:, None], self.state)[0].logits[:, -1]
        return logits * self.scale if self.taken == 1 else logits


@pytest.mark.parametrize(("scale", "agrees"), [(1.0, True), (1.1, False), (float("nan"), False)])
def test_the_check_sees_one_step_that_differs(scale, agrees, monkeypatch):
    monkeypatch.setattr(bench_decode, "GraphedDecoder", Decoder)
    monkeypatch.setattr(Decoder, "scale", scale)
    model = CoGAGPT(CoGAConfig.preset("tiny", n_layer=2, layers="near 16")).eval()
    tokens = torch.randint(model.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (bench_decode.error(model, tokens, compiled=False) <= bench_decode.TOLERANCE) == agrees


@pytest.fixture
def gpu(monkeypatch):
    """A CPU that passes for a GPU."""
    monkeypatch.setattr(bench_decode, "GraphedDecoder", Decoder)
    cuda = {"is_available": True, "get_device_name": "none", "synchronize": None, "empty_cache": None}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, value=value: value)
    for one in (torch.Tensor, torch.nn.Module):
        monkeypatch.setattr(one, "cuda", lambda self: self)


SMALL = ["--lengths", "40", "--layers", "1", "--steps", "2", "--modes", "captured"]


@pytest.mark.parametrize(("scale", "code"), [(1.0, 0), (2.0, 1)])
def test_rows_where_the_check_is_green_and_exit_code_1_where_it_is_not(
    scale, code, gpu, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Decoder, "scale", scale)
    assert bench_decode.main([*SMALL, "--out", str(tmp_path)]) == code
    path = tmp_path / "decode_speed.json"
    assert path.exists() == (code == 0)
    if code:
        assert "the check is red: mha captured, coga captured" in capsys.readouterr().err
    else:
        rows = json.loads(path.read_text())
        assert [(row["implementation"], row["mode"], row["length"]) for row in rows] == [
            ("mha", "captured", 40), ("coga", "captured", 40),
        ]  # fmt: skip
        assert all(row["ms"] > 0 and row["error"] == 0 for row in rows)


def test_a_file_in_the_way_is_one_line(gpu, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    assert "out=" in refused([*SMALL, "--out", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "mine"


def test_rows_are_not_written_over(not_written_over):
    not_written_over("decode_speed.json", SMALL)
