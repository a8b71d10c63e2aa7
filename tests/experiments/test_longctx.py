"""longctx.py: what a run leaves, a killed run that ends like an unbroken one, one line for bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import _settings
import _train
import longctx
import pytest
import torch

from coga import CoGAConfig
from coga.config import PRESETS
from coga.data import contexts, load_corpus
from coga.models import CoGAGPT

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
SCRIPT = longctx

TINY = [
    "--n", "100", "--steps", "3", "--warmup-steps", "3", "--warmup-len", "40", "--warmup-batch", "2",
    "--sample", "12", "--window", "16", "--layers", "near 4 8", "--open-groups", "2", "--set", "band=8",
    "--set", "d_model=16", "--set", "latent_dim=8", "--set", "rope_dim=4", "--device", "cpu",
    "--save-every", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert longctx.main([*TINY, "--data", text, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def from_dense(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "from-dense"
    assert longctx.main([*TINY, "--dense-warmup", "--data", text, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def two_arms(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "two-arms"
    assert longctx.main([*TINY, "--compare", "near,gumbel", "--data", text, "--out", str(folder)]) == 0
    return folder


def metrics(folder: Path) -> str:
    return (folder / "metrics.jsonl").read_text()


def figures(folder: Path) -> dict:
    report = json.loads((folder / "report.json").read_text())
    return {k: v for k, v in report.items() if k not in ("tokens_per_second", "peak_bytes", "environment")}


def weights(folder: Path) -> bytes:
    return (folder / "checkpoint" / "model.safetensors").read_bytes()


# --- a run -------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(unbroken):
    names = {"config.json", "metrics.jsonl", "checkpoint", "report.json", "sample.txt"}
    assert {path.name for path in unbroken.iterdir()} == names | {"loss.png", "positions.png", "groups.png"}
    for name in ("loss.png", "positions.png", "groups.png"):
        assert (unbroken / name).read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in metrics(unbroken).splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [80] * 3 + [100] * 3
    report = figures(unbroken)
    assert report["bits_per_byte"] < 8.5
    assert 3 < report["unigram_bits_per_byte"] < 5
    assert report["position_edges"][0] == 0
    assert report["position_edges"][-1] == 100
    assert len(report["position_bits_per_byte"]) == 16
    for name in ("flip_rate", "prototype_use", "inside", "between"):
        assert -1 <= report[name] <= 1
    config = json.loads((unbroken / "config.json").read_text())
    assert config["model"]["layers"] == "near 4 8"
    assert len(config["corpus"]["sha256"]) == 64
    model = CoGAGPT.from_pretrained(unbroken / "checkpoint")
    assert int(model.step_count) == 6


def test_overall_bits_are_the_mean_over_positions(unbroken):
    report = figures(unbroken)
    edges = report["position_edges"]
    sizes = [b - a for a, b in pairwise(edges)]
    mean = sum(s * b for s, b in zip(sizes, report["position_bits_per_byte"])) / sum(sizes)
    assert mean == pytest.approx(report["bits_per_byte"])


def test_bits_per_byte_equal_the_models_loss(unbroken, text):
    from coga.data import contexts, load_corpus

    tokens, targets = contexts(load_corpus(text, length=100), 100, 1)
    model = CoGAGPT.from_pretrained(unbroken / "checkpoint")
    loss = float(model(tokens, targets).loss.detach()) / 0.6931471805599453
    assert figures(unbroken)["bits_per_byte"] == pytest.approx(loss, rel=1e-5)


def test_same_settings_same_run(unbroken, text, tmp_path):
    assert longctx.main([*TINY, "--data", text, "--out", str(tmp_path / "again")]) == 0
    assert metrics(tmp_path / "again") == metrics(unbroken)
    assert weights(tmp_path / "again") == weights(unbroken)


@pytest.mark.parametrize("n", [1, 2, 15, 31, 33])
def test_contexts_below_two_windows(n, text, tmp_path, capsys):
    arguments = [*TINY, "--n", str(n), "--warmup-len", "1", "--data", text, "--out", str(tmp_path / "short")]
    assert longctx.main(arguments) == 0
    assert (tmp_path / "short" / "groups.png").exists()
    assert "bits per byte" in capsys.readouterr().out


def test_the_output_names_what_decides_the_figures(text, tmp_path, capsys):
    assert longctx.main([*TINY, "--data", text, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    for word in (
        "device",
        "sha256",
        "near 4 8",
        "unigram byte entropy",
        "flip rate",
        "peak memory",
        "tokens/s",
    ):
        assert word in out
    assert out.index("device") < out.index("bits per byte")


# --- a dense warm-up ---------------------------------------------------------------------------------------


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in metrics(folder).splitlines()]


def test_groups_go_on_from_the_dense_model(from_dense, unbroken, text, tmp_path):
    """The warm-up is that of a run with `full` layers; then the layers are the run's own."""
    dense = tmp_path / "dense"
    assert longctx.main([*TINY, "--layers", "full", "--data", text, "--out", str(dense)]) == 0
    assert losses(from_dense)[:3] == losses(dense)[:3] != losses(unbroken)[:3]
    assert losses(from_dense)[3] != losses(dense)[3]
    model = CoGAGPT.from_pretrained(from_dense / "checkpoint")
    assert model.config == CoGAGPT.from_pretrained(unbroken / "checkpoint").config
    assert int(model.step_count) == 3  # schedules of the groups begin with them


def test_weights_and_moments_are_taken_over_and_groups_found(text, tmp_path, monkeypatch):
    seen = []
    open_groups = _train.Trainer._open_groups

    def watched(self):
        before = {
            name: (p.detach().clone(), self.optimizer.state[p]) for name, p in self.model.named_parameters()
        }
        open_groups(self)
        seen.append(self.step)
        random = CoGAGPT(self.config).state_dict()
        for name, p in self.model.named_parameters():
            if name in before:
                assert torch.equal(p, before[name][0]), name
                assert self.optimizer.state[p] is before[name][1], name
            else:
                assert p not in self.optimizer.state
            if name.endswith("prototypes_GC"):
                assert not torch.equal(p, random[name]), name

    monkeypatch.setattr(_train.Trainer, "_open_groups", watched)
    more = ["--dense-warmup", "--compare", "mha,near,gumbel", "--data", text, "--out", str(tmp_path / "run")]
    assert longctx.main([*TINY, *more]) == 0
    assert seen == [3, 3]  # `mha` layers have no dense twin but themselves


def test_the_switch_tells_how_well_the_dense_model_copies(text, tmp_path, capsys):
    """At random weights it does not."""
    more = ["--warmup-len", "80", "--dense-warmup", "--data", text, "--out", str(tmp_path / "run")]
    assert longctx.main([*TINY, *more]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "copying" in line]
    assert len(lines) == 1
    assert "nats a token, read again" in lines[0]
    assert lines[0].endswith("it hardly copies yet, and groups may lag; a longer dense warm-up may help")


def test_what_copies_at_the_switch_is_the_dense_model_on_held_out_text(text, tmp_path, monkeypatch, capsys):
    """Contexts as long as the warm-up's; with a tenth of the loss left nothing is said against it."""
    seen = []

    def watched(model, tokens_BT, targets_BT, device, batch):
        seen.append((model.config.layers, tokens_BT, targets_BT, device.type, batch))
        return {"first": 1.0, "near": 0.1, "far": 0.2}

    monkeypatch.setattr(_train, "copying", watched)
    more = ["--warmup-len", "80", "--dense-warmup", "--data", text, "--out", str(tmp_path / "run")]
    assert longctx.main([*TINY, *more]) == 0
    [(layers, tokens, targets, device, batch)] = seen
    assert (layers, device, batch) == ("full", "cpu", 2)
    held_out = contexts(load_corpus(text, length=100), 80, 8)
    assert torch.equal(tokens, held_out[0]) and torch.equal(targets, held_out[1])
    assert tokens.shape == (8, 80)
    lines = [line for line in capsys.readouterr().out.splitlines() if "copying" in line]
    assert lines == ["copying 1.000 nats a token, read again 0.100 near and 0.200 far"]


def test_a_run_from_before_the_option_goes_on(unbroken, tmp_path):
    folder = copied(unbroken, tmp_path)
    content = json.loads((folder / "config.json").read_text())
    del content["settings"]["dense_warmup"]
    (folder / "config.json").write_text(json.dumps(content))
    assert longctx.main(["--resume", "--out", str(folder)]) == 0
    assert figures(folder) == figures(unbroken)


# --- killed and resumed ------------------------------------------------------------------------------------


def killed_after(step: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill leaves a line of metrics more than the checkpoint has, and half of another."""

    class Killed(Exception):
        pass

    save = _train.Trainer.save

    def save_or_die(self):
        if self.step > step:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write('{"step": 7, "los')
            (self.folder / "checkpoint.tmp").mkdir()
            raise Killed
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(_train.Trainer, "save", save_or_die)
        with pytest.raises(Killed):
            longctx.main(arguments)


@pytest.mark.parametrize(
    ("run", "at"), [("unbroken", 1), ("unbroken", 3), ("unbroken", 5), ("from_dense", 3), ("from_dense", 4)]
)
def test_killed_between_metrics_and_checkpoint(run, at, text, tmp_path, monkeypatch, request):
    whole = request.getfixturevalue(run)
    more = ["--dense-warmup"] if run == "from_dense" else []
    folder = tmp_path / "run"
    killed_after(at, [*TINY, *more, "--data", text, "--out", str(folder)], monkeypatch)
    assert longctx.main(["--resume", "--out", str(folder), "--save-every", "0"]) == 0
    assert metrics(folder) == metrics(whole)
    assert weights(folder) == weights(whole)
    assert figures(folder) == figures(whole)
    assert (folder / "sample.txt").read_text() == (whole / "sample.txt").read_text()


@pytest.mark.parametrize("arms", ["", "near,gumbel"])
@pytest.mark.parametrize("at", [0, 3])
def test_a_run_keeps_the_defaults_it_began_with(at, arms, unbroken, two_arms, text, tmp_path, monkeypatch):
    """Before its first checkpoint, and after one: other defaults would change every figure in silence."""
    folder = tmp_path / "run"
    more = ["--compare", arms] if arms else []
    killed_after(at, [*TINY, *more, "--data", text, "--out", str(folder)], monkeypatch)
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["tiny"] | {"output_gate": False, "gain_init": 3.0})
    assert longctx.main(["--resume", "--out", str(folder), "--save-every", "0"]) == 0
    for name in arms.split(","):
        assert metrics(folder / name) == metrics((two_arms if arms else unbroken) / name), name


def test_a_dense_warm_up_goes_on_although_a_default_of_groups_changed(
    from_dense, text, tmp_path, monkeypatch
):
    """Its model has the default that was one then, and makes no use of it."""
    folder = tmp_path / "run"
    killed_after(1, [*TINY, "--dense-warmup", "--data", text, "--out", str(folder)], monkeypatch)
    path = folder / "checkpoint" / "config.json"
    then = json.loads(path.read_text())
    path.write_text(json.dumps(then | {"capacity_factor": 1.5}))
    assert longctx.main(["--resume", "--out", str(folder), "--save-every", "0"]) == 0
    assert metrics(folder) == metrics(from_dense) and weights(folder) == weights(from_dense)


def test_a_checkpoint_of_another_model_is_refused(text, tmp_path, monkeypatch, refused):
    folder = tmp_path / "run"
    killed_after(1, [*TINY, "--dense-warmup", "--data", text, "--out", str(folder)], monkeypatch)
    path = folder / "checkpoint" / "config.json"
    then = json.loads(path.read_text())
    path.write_text(json.dumps(then | {"gain_init": 1.5}))
    assert "does not fit the run's settings" in refused(["--resume", "--out", str(folder)])


def test_killed_between_the_two_renames(unbroken, text, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    rename, count = os.rename, []

    def second_time_dies(a, b):
        count.append(b)
        if len(count) == 5:  # step 3: old one moved away, new one not yet in place
            raise RuntimeError("killed")
        rename(a, b)

    monkeypatch.setattr(os, "rename", second_time_dies)
    with pytest.raises(RuntimeError, match="killed"):
        longctx.main([*TINY, "--data", text, "--out", str(folder)])
    monkeypatch.setattr(os, "rename", rename)
    assert not (folder / "checkpoint").exists()
    assert longctx.main([*TINY, "--data", text, "--out", str(folder), "--resume"]) == 0
    assert metrics(folder) == metrics(unbroken)


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXPERIMENTS / "longctx.py"), *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_lines(folder: Path, lines: int, process: subprocess.Popen) -> None:
    path = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < lines:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


LONGER = ["--warmup-steps", "60"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)], ids=["kill", "ctrl-c"]
)
def test_signals_leave_a_run_to_go_on_with(number, code, text, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    process = start([*TINY, *LONGER, "--data", text, "--out", str(folder)])
    wait_for_lines(folder, 7, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in error
    assert not (folder / "report.json").exists()
    assert longctx.main(["--resume", "--out", str(folder)]) == 0
    assert longctx.main([*TINY, *LONGER, "--data", text, "--out", str(whole)]) == 0
    assert metrics(folder) == metrics(whole)
    assert weights(folder) == weights(whole)


def test_a_finished_run_is_only_shown_again(unbroken, capsys):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    assert longctx.main(["--resume", "--out", str(unbroken)]) == 0
    assert "already finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path, monkeypatch, capsys):
    forward = CoGAGPT.forward

    def broken(self, tokens, targets=None, noise_step=0, **options):
        out = forward(self, tokens, targets, noise_step=noise_step, **options)
        if noise_step == 4 and self.training:
            out.loss.data.fill_(float("nan"))
        return out

    folder = tmp_path / "run"
    monkeypatch.setattr(CoGAGPT, "forward", broken)
    assert longctx.main([*TINY, "--data", text, "--out", str(folder)]) == 1
    assert "step 5" in capsys.readouterr().err
    model = CoGAGPT.from_pretrained(folder / "checkpoint")
    assert int(model.step_count) == 4
    assert all(x.isfinite().all() for x in model.state_dict().values())


# --- arms --------------------------------------------------------------------------------------------------


def test_compare_trains_arms_on_the_same_batches(unbroken, text, tmp_path, capsys):
    folder = tmp_path / "arms"
    arguments = [*TINY, "--data", text, "--compare", "mha,near,random,gumbel", "--out", str(folder)]
    assert longctx.main(arguments) == 0
    out = capsys.readouterr().out
    assert (folder / "compare.png").exists()
    # The arm that is the run's own setting is that run.
    assert metrics(folder / "gumbel") == metrics(unbroken)
    reports = json.loads((folder / "report.json").read_text())
    assert list(reports) == ["mha", "near", "random", "gumbel"]
    assert reports["mha"]["state_ratio"] == pytest.approx(1)
    assert "flip_rate" not in reports["near"]
    assert all(name in out for name in reports)
    # Cut off after two arms and inside the third: the others are kept.
    (folder / "report.json").unlink()
    (folder / "random" / "report.json").unlink()
    old = metrics(folder / "random")
    assert longctx.main(["--resume", "--out", str(folder)]) == 0
    assert metrics(folder / "random") == old
    assert json.loads((folder / "report.json").read_text())["mha"] == reports["mha"]


# --- bad input ---------------------------------------------------------------------------------------------

BAD = {
    "n-0": (["--n", "0"], "n=0"),
    "n-negative": (["--n", "-3"], "n=-3"),
    "n-text": (["--n", "many"], "--n"),
    "n-above-max-len": (["--n", "200000"], "max_len=131072"),
    "preset": (["--preset", "huge"], "preset='huge'"),
    "layer": (["--layers", "near 4 wide"], "unknown layer 'wide'"),
    "grouping": (["--grouping", "magic"], "grouping='magic'"),
    "window": (["--window", "18"], "multiple of every group size"),
    "heads": (["--set", "n_head=3"], "must divide d_model"),
    "band": (["--set", "band=17"], "at most window=16"),
    "field": (["--set", "colour=1"], "colour"),
    "no-value": (["--set", "band"], "FIELD=VALUE"),
    "arm": (["--compare", "mha,magic"], "compare='magic'"),
    "arm-twice": (["--compare", "mha,mha"], "twice"),
    "device": (["--device", "abacus"], "device='abacus'"),
    "cuda-index": (["--device", "cuda:99"], "device='cuda:99'"),
    "steps": (["--steps", "-1"], "steps=-1"),
    "batch": (["--batch", "0"], "batch=0"),
    "lr": (["--lr", "nan"], "lr=nan"),
    "dense-mha": (["--dense-warmup", "--layers", "mha 8"], "dense_warmup=True: layers='mha 8' must not mix"),
    "dense-alone": (["--dense-warmup", "--warmup-steps", "0"], "dense_warmup=True: needs warmup_steps"),
    "warmup-len": (["--warmup-len", "101"], "warmup_len=101"),
    "missing": (["--data", "/nowhere/text"], "existing file or folder"),
    "short": (["--n", "5000"], "must hold at least"),
    "flag": (["--colour"], "--colour"),
    "vocabulary": (["--set", "vocab_size=100"], "vocab_size=100"),
    "seed": (["--seed", "-1"], "seed=-1"),
    "seed-large": (["--seed", str(2**63)], "seed=9223372036854775808"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, text, refused_and_nothing_written):
    arguments, expected = BAD[name]
    assert expected in refused_and_nothing_written([*TINY, "--data", text, *arguments])


def test_a_comparison_never_adopts_a_run_that_is_there(unbroken, text, tmp_path, refused):
    """An arm's folder that holds a run, whatever its settings, ends the command; nothing is written."""
    shutil.copytree(unbroken, tmp_path / "near")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    arguments = [*TINY, "--data", text, "--out", str(tmp_path), "--compare", "near,gumbel"]
    assert "already holds a run" in refused(arguments)
    assert "parts of a run" in refused([*arguments, "--resume"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["rows.jsonl", "positions.png"])
def test_a_folder_of_another_script_is_left_alone(name, text, tmp_path, refused):
    (tmp_path / name).write_text("theirs")
    assert "already holds" in refused([*TINY, "--data", text, "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("file", "content"), [
    ("config.json", lambda text: text.replace('"steps": 3', '"steps": "x"')),
    ("metrics.jsonl", lambda text: "[1]\n" + text),
    ("checkpoint/config.json", lambda text: "{"),
])  # fmt: skip
def test_damaged_files_are_one_line_that_names_them(file, content, unbroken, tmp_path, refused):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    (folder / "report.json").unlink()
    damaged = content((folder / file).read_text())
    (folder / file).write_text(damaged)
    assert file in refused(["--resume", "--out", str(folder)])
    assert (folder / file).read_text() == damaged


def test_an_empty_file(tmp_path, refused):
    (tmp_path / "empty").write_text("")
    assert "must not be empty" in refused([*TINY, "--data", str(tmp_path / "empty")])


def test_an_existing_run_is_left_alone(unbroken, text, refused):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    arguments = [*TINY, "--data", text, "--out", str(unbroken)]
    assert "already holds a run" in refused(arguments)
    assert "steps=4" in refused([*arguments, "--resume", "--steps", "4"])
    assert "n=99" in refused([*arguments, "--resume", "--n", "99"])
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before


def test_a_folder_that_cannot_be_written(text, tmp_path, refused):
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        assert "out=" in refused([*TINY, "--data", text, "--out", str(place)])
    assert (tmp_path / "file").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_resume_without_a_run(tmp_path, refused):
    assert "holds no run" in refused(["--resume", "--out", str(tmp_path / "none")])
    assert "--out" in refused(["--resume"])
    assert "n: must be given" in refused([])


def copied(unbroken: Path, tmp_path: Path) -> Path:
    """The run as it was before its report."""
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(unbroken, folder)
    (folder / "report.json").unlink()
    return folder


def test_resume_on_a_checkpoint_that_does_not_fit(unbroken, tmp_path, refused):
    folder = copied(unbroken, tmp_path)
    other = CoGAGPT(CoGAConfig.preset("tiny", d_model=32))
    other.save_pretrained(folder / "checkpoint")
    assert "does not fit" in refused(["--resume", "--out", str(folder)])


@pytest.mark.parametrize("name", ["model.safetensors", "train.safetensors"])
def test_resume_on_a_truncated_checkpoint(name, unbroken, tmp_path, refused):
    folder = copied(unbroken, tmp_path)
    path = folder / "checkpoint" / name
    path.write_bytes(path.read_bytes()[:-100])
    before = metrics(folder)
    assert name in refused(["--resume", "--out", str(folder)])
    assert metrics(folder) == before


def test_resume_on_another_text(text, tmp_path, refused):
    path = tmp_path / "text"
    path.write_bytes(Path(text).read_bytes())
    folder = tmp_path / "run"
    assert longctx.main([*TINY, "--data", str(path), "--out", str(folder)]) == 0
    (folder / "report.json").unlink()
    path.write_bytes(path.read_bytes() + b"more")
    assert "sha256" in refused(["--resume", "--out", str(folder)])


def test_resume_on_a_damaged_config(unbroken, tmp_path, refused):
    folder = copied(unbroken, tmp_path)
    (folder / "config.json").write_text('{"settings": {"n": 3}}')
    assert "config.json" in refused(["--resume", "--out", str(folder)])
    (folder / "config.json").write_text("{")
    assert "config.json" in refused(["--resume", "--out", str(folder)])


# --- settings ----------------------------------------------------------------------------------------------


def test_learning_rate_rises_and_decays():
    given, _ = _settings.parse(["--n", "4096"], "")
    settings = _settings.complete(given)
    rates = [settings.learning_rate(step) for step in range(settings.total)]
    top = rates.index(max(rates))
    assert 0 < top < settings.total // 4
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.2 * settings.lr


@pytest.mark.parametrize("preset", ["tiny", "small", "gpt2"])
def test_presets_have_defaults_that_pass(preset):
    given, _ = _settings.parse(["--n", "32768", "--preset", preset], "")
    assert _settings.complete(given).total > 0


def test_cpu_precision_is_float32():
    from _common import precision

    with precision(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
