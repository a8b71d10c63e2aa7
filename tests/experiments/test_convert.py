"""convert.py: a dense model read through groups; exact where every group is opened; rows, bad input."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import convert
import pytest
import torch
from _convert import Reading, figures, parse_reading, readings, table
from _copying import copying

from coga import CoGAConfig
from coga.data import contexts, load_corpus
from coga.models import CoGAGPT

SCRIPT = convert

SMALL = dict(
    n_layer=2, n_head=2, d_model=16, latent_dim=8, rope_dim=4, window=16, band=8, layers="full", max_len=512,
    refine_groups=True, reciprocal_groups=True, output_gate=True,
)  # fmt: skip
TINY = [
    "--n", "96", "--window", "16", "--contexts", "2", "--batch", "2", "--group-sizes", "4,8",
    "--open", "0,2,16", "--groupings", "contiguous,kmeans", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Weights of order one, so that what is far matters."""
    folder = tmp_path_factory.mktemp("model") / "full"
    model = CoGAGPT(CoGAConfig(**SMALL))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        for block in model.stack:
            block.attention.projections.gain_H.fill_(4.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(checkpoint, text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "run"
    arguments = [*TINY, "--checkpoint", str(checkpoint), "--data", text, "--out", str(folder)]
    assert convert.main([*arguments, "--finetune", "3"]) == 0
    return folder


def rows_of(folder: Path, kind: str) -> dict[str, dict]:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return {row["arm"]: row for row in rows if row["kind"] == kind}


def test_a_model_whose_loss_is_not_finite_leaves_no_row(checkpoint, text, tmp_path, capsys):
    broken = CoGAGPT.from_pretrained(checkpoint)
    with torch.no_grad():
        broken.norm.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "model")
    arguments = [
        *TINY,
        "--checkpoint",
        str(tmp_path / "model"),
        "--data",
        text,
        "--out",
        str(tmp_path / "run"),
    ]
    for again in ([], ["--resume"]):
        assert convert.main([*arguments, *again]) == 1
        assert "full: the held-out loss is not finite" in capsys.readouterr().err
        rows = tmp_path / "run" / "rows.jsonl"
        assert not rows.exists() or not rows.read_text()


def test_every_reading_has_a_row(run):
    rows = rows_of(run, "zero_shot")
    names = [f"{g}:{r}:{k}" for g in ("contiguous", "kmeans") for r in (4, 8) for k in (0, 2, 16)]
    assert list(rows) == ["full", "near", *names]
    for row in rows.values():
        assert row["bits_per_byte_second_half"] == pytest.approx(row["nats_second_half"] / math.log(2))
        assert row["above_full"] == pytest.approx(row["nats_second_half"] - rows["full"]["nats_second_half"])
        assert {"device", "torch", "date", "command", "seed", "sha256"} <= row.keys()
    for name in ("zero-shot.png", "finetune.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_opening_every_group_is_the_dense_model_and_opening_none_is_not(run):
    """96 tokens in windows of 16: the last token reads 4 far windows, 16 groups of 4."""
    rows = rows_of(run, "zero_shot")
    for name in ("contiguous:4:16", "kmeans:4:16", "contiguous:8:16", "kmeans:8:16"):
        assert abs(rows[name]["above_full"]) < 1e-5
    for name in ("near", "contiguous:4:0", "kmeans:4:0", "kmeans:8:2"):
        assert abs(rows[name]["above_full"]) > 1e-4


def test_full_is_the_checkpoints_own_loss(run, checkpoint, text):
    tokens, targets = contexts(load_corpus(text, length=96), 96, 2)
    targets[:, :48] = -100
    loss = float(CoGAGPT.from_pretrained(checkpoint)(tokens, targets).loss.detach())
    row = rows_of(run, "zero_shot")["full"]
    assert row["nats_second_half"] == pytest.approx(loss, rel=1e-5)
    held_out = contexts(load_corpus(text, length=96), 96, 2)
    model = CoGAGPT.from_pretrained(checkpoint)
    assert row["copying"] == pytest.approx(copying(model, *held_out, torch.device("cpu"), 1), rel=1e-5)


def test_the_rates_of_fine_tuning_reach_the_run(checkpoint, text, tmp_path, monkeypatch, capsys):
    fit, seen = convert.fit, []

    def watched(model, *arguments, **options):
        seen.append((options["lr"], options["floor"]))
        return fit(model, *arguments, **options)

    monkeypatch.setattr(convert, "fit", watched)
    arguments = [*TINY, "--checkpoint", str(checkpoint), "--data", text, "--out", str(tmp_path / "run")]
    more = ["--finetune", "2", "--finetune-lr", "0.005", "--finetune-final-lr", "0"]
    assert convert.main([*arguments, *more]) == 0
    assert seen == [(0.005, 0.0)] * 2
    assert all(row["final_lr"] == 0 for row in rows_of(tmp_path / "run", "finetune").values())
    assert "read again" in capsys.readouterr().out


def test_a_folder_from_before_the_last_rate_goes_on(run, checkpoint, text, tmp_path, refused):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    content = json.loads((folder / "config.json").read_text())
    assert content["settings"].pop("finetune_final_lr") == 0.1
    (folder / "config.json").write_text(json.dumps(content))
    arguments = [*TINY, "--checkpoint", str(checkpoint), "--data", text, "--out", str(folder), "--resume"]
    before = (folder / "rows.jsonl").read_text()
    assert convert.main([*arguments, "--finetune", "3"]) == 0
    assert (folder / "rows.jsonl").read_text() == before
    assert "finetune_final_lr=0.0" in refused([*arguments, "--finetune", "3", "--finetune-final-lr", "0"])


def test_finetuning_takes_the_best_inexact_reading_and_full_as_control(run):
    zero, tuned = rows_of(run, "zero_shot"), rows_of(run, "finetune")
    inexact = {k: v["nats_second_half"] for k, v in zero.items() if k.endswith((":0", ":2"))}
    chosen = min(inexact, key=inexact.get)
    assert list(tuned) == [chosen, "full"]
    for name, row in tuned.items():
        assert row["before"]["nats_second_half"] == pytest.approx(zero[name]["nats_second_half"])
        assert row["after"] != row["before"]
        assert row["tokens"] == 3 * 2 * 96
    model = CoGAGPT.from_pretrained(run / f"finetuned-{chosen.replace(':', '-')}")
    assert model.config.layer(0).kind == "group"
    assert int(model.step_count) == 3


def test_the_table_holds_the_rows(run):
    rows = rows_of(run, "zero_shot")
    lines = table(list(rows.values())).splitlines()
    assert lines[0].count("R=") == 6
    kmeans = next(line for line in lines if line.startswith("| kmeans"))
    want = [f"{rows[f'kmeans:{r}:{k}']['nats_second_half']:.4f}" for r in (4, 8) for k in (0, 2, 16)]
    assert [cell.strip() for cell in kmeans.split("|")[2:-1]] == want
    assert kmeans in (run / "table.md").read_text()


def test_the_far_bias_is_what_was_asked_for(checkpoint):
    model = CoGAGPT.from_pretrained(checkpoint)
    for bias in (0.0, -1.5):
        other = Reading("kmeans", 4, 2).model(model, 16, 1.0, bias, {})
        assert all((block.attention.far_bias_H == bias).all() for block in other.stack)
        assert all((block.attention.group_level.residual.weight == 0).all() for block in other.stack)


def test_a_checkpoint_whose_far_field_was_faded_in_is_read_at_full_weight(checkpoint):
    model = CoGAGPT.from_pretrained(checkpoint)
    faded = CoGAGPT(model.config.replace(far_warmup=100))
    faded.load_state_dict(model.state_dict())
    tokens = torch.arange(80)[None] % 256
    with torch.no_grad():
        one, other = (
            Reading("kmeans", 4, 2).model(m, 16, 1.0, 0.0, {}).eval()(tokens).logits for m in (model, faded)
        )
    assert torch.equal(one, other)


def test_figures_of_a_known_loss():
    found = figures(torch.tensor([9.0, 9.0, 9.0, 1.0, 2.0, 3.0]))
    assert found["nats_second_half"] == 2.0
    assert found["bits_per_byte"] == pytest.approx(5.5 / math.log(2))


def test_readings_and_their_names():
    assert [one.text for one in readings(["random"], [4], [0, 1])] == [
        "full",
        "near",
        "random:4:0",
        "random:4:1",
    ]
    for one in readings(["random"], [4], [0, 1]):
        assert parse_reading(one.text) == one
    assert Reading("random", 4, 1).changes(16, 1.5, {})["capacity_factor"] == 1.5


def test_what_is_read_can_be_changed_and_nothing_opened_means_summaries(checkpoint):
    model = CoGAGPT.from_pretrained(checkpoint)
    model.config = model.config.replace(refine_groups=False, summaries=False)
    opened, closed = (Reading("random", 4, k) for k in (2, 0))
    asked = {"summaries": True, "index_weight": 0.0}
    found = [
        one.model(model, 16, 1.0, 0.0, fields).config
        for one, fields in ((opened, {}), (closed, {}), (opened, asked), (Reading("near"), asked))
    ]
    assert [config.reads_summaries for config in found] == [False, True, True, False]
    assert [config.index_weight > 0 for config in found] == [True, True, False, True]


def test_fields_of_all_readings_stand_in_the_rows(checkpoint, text, tmp_path):
    folder = tmp_path / "run"
    arguments = [*TINY, "--checkpoint", str(checkpoint), "--data", text, "--out", str(folder)]
    assert convert.main([*arguments, "--open", "2", "--read", "selection=summary", "--read", "beta=4"]) == 0
    rows = rows_of(folder, "zero_shot")
    assert all(row["read"] == {"selection": "summary", "beta": 4} for row in rows.values())


def test_training_a_dense_model_first_and_resuming(text, tmp_path):
    folder = tmp_path / "run"
    sizes = [x for k, v in SMALL.items() if k not in ("layers", "window") for x in ("--set", f"{k}={v}")]
    arguments = [*TINY, "--train", "3", "--data", text, "--out", str(folder), *sizes]
    assert convert.main(arguments) == 0
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[0])["kind"] == "train"
    weights = (folder / "full" / "model.safetensors").read_bytes()
    (folder / "rows.jsonl").write_text("".join(lines[:4]))
    assert convert.main([*arguments, "--resume"]) == 0
    assert (folder / "full" / "model.safetensors").read_bytes() == weights
    again = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    assert again[:4] == lines[:4] and len(again) == len(lines)
    for a, b in zip(again, lines):
        a, b = json.loads(a), json.loads(b)
        assert a["arm"] == b["arm"]
        assert a.get("nats_second_half") == b.get("nats_second_half")


# --- bad input ---------------------------------------------------------------------------------------------

BAD = {
    "n-0": (["--n", "0"], "n=0"),
    "n-above-max-len": (["--n", "600"], "max_len=512"),
    "read-unknown": (["--read", "colour=1"], "colour"),
    "read-bad": (["--read", "beta=-1"], "beta=-1"),
    "read-own": (["--read", "open_groups=3"], "'open_groups'"),
    "read-bias": (["--read", "far_bias_init=-1"], "'far_bias_init'"),
    "read-shape": (["--read", "n_head=4"], "'n_head'"),
    "read-twice": (["--read", "beta=4", "--read", "beta=5"], "'beta'"),
    "n-two-windows": (["--n", "32"], "two windows"),
    "grouping": (["--groupings", "magic"], "'magic'"),
    "grouping-twice": (["--groupings", "kmeans,gumbel,kmeans"], "groupings='kmeans,gumbel,kmeans'"),
    "group-size": (["--group-sizes", "5"], "multiple of every group size"),
    "group-size-text": (["--group-sizes", "many"], "group_sizes='many'"),
    "open": (["--open", "-1"], "open=-1"),
    "band": (["--window", "4", "--group-sizes", "4"], "at most window=4"),
    "capacity": (["--capacity", "0.5"], "capacity_factor"),
    "far-bias": (["--far-bias", "nan"], "far_bias=nan"),
    "train-too": (["--train", "3"], "train=3"),
    "arm": (["--finetune", "2", "--finetune-arm", "kmeans"], "finetune_arm='kmeans'"),
    "arm-alone": (["--finetune-arm", "near"], "needs --finetune"),
    "final-rate": (["--finetune-final-lr", "1.5"], "finetune_final_lr=1.5"),
    "device": (["--device", "abacus"], "device='abacus'"),
    "graph": (["--graph", "--device", "cpu"], "graph=True: needs a CUDA device"),
    "missing": (["--data", "/nowhere/text"], "existing file or folder"),
    "no-checkpoint": (["--checkpoint", "/nowhere/model"], "does not exist"),
    "flag": (["--colour"], "--colour"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, checkpoint, text, refused_and_nothing_written):
    arguments, expected = BAD[name]
    given = [*TINY, "--checkpoint", str(checkpoint), "--data", text, *arguments]
    assert expected in refused_and_nothing_written(given)


def test_checkpoints_that_do_not_fit(checkpoint, text, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--train STEPS" in refused([*TINY, "--data", text])
    near, cut, small = (tmp_path / name for name in ("near", "cut", "small"))
    CoGAGPT(CoGAConfig(**{**SMALL, "layers": "near"})).save_pretrained(near)
    CoGAGPT(CoGAConfig(**{**SMALL, "vocab_size": 100})).save_pretrained(small)
    shutil.copytree(checkpoint, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    (tmp_path / "empty").write_text("")
    for folder, data, expected in (
        (near, text, "must be a `full` model"),
        (cut, text, "safetensors"),
        (small, text, "vocab_size=100"),
        (checkpoint, "empty", "must not be empty"),
    ):
        assert expected in refused([*TINY, "--checkpoint", str(folder), "--data", data])
    assert not (tmp_path / "runs").exists()


def test_an_existing_run_is_left_alone(run, checkpoint, text, refused):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    arguments = [*TINY, "--checkpoint", str(checkpoint), "--data", text, "--out", str(run)]
    assert "already holds" in refused(arguments)
    assert "contexts=3" in refused([*arguments, "--resume", "--finetune", "3", "--contexts", "3"])
    other = [*arguments, "--out", str(checkpoint)]
    assert "already holds" in refused(other)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_written(checkpoint, text, tmp_path, refused):
    (tmp_path / "file").write_text("kept")
    arguments = [*TINY, "--checkpoint", str(checkpoint), "--data", text, "--out", str(tmp_path / "file")]
    assert "out=" in refused(arguments)
    assert (tmp_path / "file").read_text() == "kept"
