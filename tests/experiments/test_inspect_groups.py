"""inspect_groups.py: the page, the terminal, and one clear line for whatever does not fit."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from coga import CoGAConfig
from coga.models import CoGAGPT

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import _inspect  # noqa: E402
import inspect_groups  # noqa: E402

CONFIG = CoGAConfig(
    n_layer=4, n_head=2, d_model=16, latent_dim=12, rope_dim=4, window=(32, 32, 64, 32), band=8,
    layers="near 8 16 full", open_groups=2, capacity_factor=1.5, output_gate=True,
)  # fmt: skip
SOURCE = Path(_inspect.__file__).read_bytes()


@pytest.fixture(scope="module")
def model() -> CoGAGPT:
    return CoGAGPT(CONFIG).eval()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "source.py"
    path.write_bytes(SOURCE)
    return path


class Page(HTMLParser):
    """Elements, the addresses they load, and the text of each script."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def run(folder, text, *more) -> Page:
    out = text.parent / "page.html"
    assert inspect_groups.main([str(folder), str(text), "--out", str(out), *map(str, more)]) == 0
    return Page(out.read_text(encoding="utf-8"))


def numbers(value):
    """Every number in nested plain data."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [x for each in value for x in numbers(each)]
    return [value] if isinstance(value, (int, float)) else []


def test_page_loads_nothing_and_holds_the_models_own_groups(model, folder, text, capsys):
    page = run(folder, text)
    assert page.loads == ["data:,"]
    assert "http-equiv" in (text.parent / "page.html").read_text(encoding="utf-8")
    assert len(page.scripts) == 2
    data = page.data
    assert [layer["layer"] for layer in data["layers"]] == [1, 2]
    assert all(math.isfinite(x) for x in numbers(data))
    tokens = torch.tensor(list(SOURCE[:256]))[None]
    grouping = model(tokens, return_grouping=True).grouping
    for report in data["layers"]:
        own = grouping[report["layer"]].index_BNW[0].tolist()
        for window in report["windows"]:
            assert window["groupings"]["gumbel"]["index"] == own[window["window"]]
    assert "layer 1, window 7: gumbel groups" in capsys.readouterr().out


def test_page_covers_the_windows_of_every_layer_in_step(folder, text):
    data = run(folder, text, "--layer", 2, "--window-index", 9).data
    by_layer = {r["layer"]: [w["window"] for w in r["windows"]] for r in data["layers"]}
    assert by_layer == {1: list(range(4, 20)), 2: list(range(2, 10))}
    assert (data["layer"], data["window"], data["start"]) == (2, 9, 128)
    assert len(data["glyphs"]) == len(data["kinds"]) == len(data["classes"]) == 512


def test_other_groupings_are_there_and_right(folder, text):
    report = run(folder, text, "--layer", 1).data["layers"][0]
    groupings = report["windows"][0]["groupings"]
    assert list(groupings) == ["gumbel", "contiguous", "random", "kmeans"]
    assert groupings["contiguous"]["index"] == (np.arange(32) // 8).tolist()
    assert report["slots"] == {"gumbel": 12, "contiguous": 8, "random": 8, "kmeans": 12}
    for name, view in groupings.items():
        assert np.bincount(view["index"], minlength=4).max() <= report["slots"][name]
        assert sorted(view["hue"]) == [0, 1, 2, 3]
        assert len(view["coherence"]) == len(view["nearest"]) == 4
    inside = {name: means["inside"] for name, means in report["means"].items()}
    assert inside["kmeans"] > inside["random"]


def test_means_are_over_windows_that_have_the_figure(folder, text):
    report = run(folder, text).data["layers"][0]
    rows = [w["groupings"]["kmeans"]["metrics"]["silhouette"] for w in report["windows"]]
    assert report["means"]["kmeans"]["silhouette"] == pytest.approx(np.mean(rows), abs=1e-4)


@pytest.mark.parametrize("place", ["itself", "run folder"])
def test_checkpoint_may_be_a_run_folder(model, tmp_path, text, place):
    folder = tmp_path / "run"
    model.save_pretrained(folder / "checkpoint" if place == "run folder" else folder)
    if place == "run folder":
        (folder / "config.json").write_text("{}")  # a run has its own
    assert run(folder, text).data["layers"]


def test_terminal_shows_the_window_its_groups_and_with_compare_every_layer(folder, text, capsys):
    run(folder, text, "--window-index", 0, "--compare")
    shown = capsys.readouterr().out
    assert '"""What `inspect_groups.py`' in shown
    assert shown.count("gumbel (model)") == 2
    for word in ("members, in order", "layer 2, mean of", "contiguous", "random", "kmeans", "token classes"):
        assert word in shown
    run(folder, text)
    assert capsys.readouterr().out.count("gumbel (model)") == 1


def test_text_cannot_end_the_script_or_change_the_terminal(folder, tmp_path, capsys):
    text = tmp_path / "prose [bold].txt"
    text.write_bytes(
        b"</script><script>alert(1)</script><!-- [red]\x1b[31m:smile: \xff\x00 caf\xc3\xa9. Yes! " * 9
    )
    page = run(folder, text, "--window-index", 0)
    assert len(page.scripts) == 2
    assert "".join(page.data["glyphs"]).startswith("</script><script>alert(1)</script><!-- [red]\\x1b")
    assert page.data["class_title"] == "word classes"
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "prose [bold].txt" in shown
    assert run(folder, text, "--structure", "python").data["class_title"] == "token classes"


def test_glyphs_show_every_byte():
    data = "aé\t日\n\u200b".encode() + b"\xff\x00\xe2\x82"
    assert _inspect.glyphs(data) == [
        ("a", "c"), ("é", "c"), ("₂", "k"), ("⇥", "t"), ("日", "c"), ("₂", "k"), ("₃", "k"), ("⏎", "n"),
        ("\\u200b", "x"), ("₂", "k"), ("₃", "k"), ("\\xff", "x"), ("\\x00", "x"), ("\\xe2", "x"),
        ("\\x82", "x"),
    ]  # fmt: skip
    assert len(_inspect.glyphs(SOURCE)) == len(SOURCE)
    assert len(_inspect.glyphs(bytes(range(256)) * 3)) == 768
    assert _inspect.glyphs("e\u0301".encode())[1] == ("◌\u0301", "c")


@pytest.mark.parametrize("groups", [1, 2, 3, 64])
def test_terminal_colours_are_pale_and_well_formed(groups):
    for rank in range(groups):
        red, green, blue = (
            int(x, 16)
            for x in re.fullmatch(r"#101010 on #(..)(..)(..)", inspect_groups.colour(rank, groups)).groups()
        )
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue > 130  # black stays readable on it


def test_one_token_groups_and_a_single_group_have_no_silhouette(tmp_path, text):
    config = CONFIG.replace(layers="1 32 near near", window=32, capacity_factor=1.0)
    CoGAGPT(config).save_pretrained(tmp_path / "edge")
    data = run(tmp_path / "edge", text).data
    assert data["layers"][0]["windows"][0]["groupings"]["gumbel"]["metrics"]["silhouette"] is None
    single = data["layers"][1]["windows"][0]["groupings"]["kmeans"]
    assert single["metrics"]["between"] is None
    assert single["nearest"] == [None]


def damaged(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "shapes":
        (folder / "config.json").write_text(CONFIG.replace(d_model=32).to_json())
    elif how == "layers":
        (folder / "config.json").write_text(CONFIG.replace(layers="mha").to_json())
    elif how == "json":
        (folder / "config.json").write_text("{")
    elif how == "binary":
        (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    elif how == "field":
        (folder / "config.json").write_text('{"no_such_field": 1}')
    elif how == "config":
        (folder / "config.json").unlink()
    elif how == "weights":
        weights.unlink()


def refused(capsys, arguments, *words) -> None:
    """Exit code 2, one line on stderr with these words."""
    try:
        code = inspect_groups.main([str(x) for x in arguments])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2, said
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err


@pytest.fixture
def unchanged(tmp_path):
    """Nothing is written or changed in the test's folder after the call of this fixture."""
    state = {}

    def listing():
        return {p: p.read_bytes() if p.is_file() else None for p in sorted(tmp_path.rglob("*"))}

    yield lambda: state.update(listing())
    assert listing() == state


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "shapes", "layers", "json", "binary", "field", "config", "weights"]
)
def test_a_damaged_checkpoint_is_refused(folder, text, capsys, unchanged, how):
    damaged(folder, how)
    unchanged()
    refused(capsys, [folder, text, "--out", text.parent / "x.html"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layer", 0], ["--layer=0", "'near'", "1, 2"]),
        (["--layer", 3], ["'full'", "1, 2"]),
        (["--layer", 4], ["does not exist", "1, 2"]),
        (["--layer", -1], ["does not exist"]),
        (["--layer", "x"], ["--layer"]),
        (["--window-index", -1], ["--window-index=-1", "0..7"]),
        (["--window-index", 8], ["0..7", "288"]),
        (["--out", "page.txt"], [".html"]),
        (["--out", "missing/page.html"], ["cannot be written"]),
        (["--out", "/proc/page.html"], ["cannot be written"]),
        (["--structure", "poem"], ["--structure"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
    ids=lambda x: " ".join(map(str, x)),
)
def test_options_that_do_not_fit_are_refused(
    folder, tmp_path, capsys, unchanged, monkeypatch, options, words
):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.py"
    text.write_bytes(SOURCE[:270])
    unchanged()
    refused(capsys, [folder, text, *options], *words)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, [], ["does not exist"]),
        (b"", [], ["is empty"]),
        (b"x" * 31, [], ["31 bytes", "at least 32"]),
        (b"x" * 63, ["--layer", 2], ["at least 64"]),
    ],
    ids=["missing", "empty", "short", "short for the layer"],
)
def test_a_text_that_is_missing_empty_or_short_is_refused(
    folder, tmp_path, capsys, unchanged, content, options, words
):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    unchanged()
    refused(capsys, [folder, text, "--out", tmp_path / "x.html", *options], *words)
    refused(capsys, [folder, tmp_path, "--out", tmp_path / "x.html", *options], "is not a file")


def test_a_missing_checkpoint_and_one_without_groups_are_refused(text, tmp_path, capsys, unchanged):
    CoGAGPT(CONFIG.replace(layers="near full")).save_pretrained(tmp_path / "dense")
    unchanged()
    out = ["--out", tmp_path / "x.html"]
    refused(capsys, [tmp_path / "none", text, *out], "does not exist")
    refused(capsys, [text, text, *out], "not a folder")
    refused(capsys, [tmp_path, text, *out], "model.safetensors")
    refused(capsys, [tmp_path / "dense", text, *out], "no layer has groups")


def test_a_byte_outside_the_vocabulary_is_refused(tmp_path, capsys, unchanged):
    CoGAGPT(CONFIG.replace(vocab_size=100)).save_pretrained(tmp_path / "small")
    text = tmp_path / "text.txt"
    text.write_bytes(b"A" * 70 + b"z" + b"A" * 70)
    unchanged()
    refused(capsys, [tmp_path / "small", text, "--out", tmp_path / "x.html"], "byte 122 at offset 70", "100")


def test_windows_beyond_max_len_are_refused(tmp_path, text, capsys, unchanged):
    CoGAGPT(CONFIG.replace(max_len=100)).save_pretrained(tmp_path / "short")
    unchanged()
    refused(
        capsys, [tmp_path / "short", text, "--window-index", 3, "--out", tmp_path / "x.html"], "max_len=100"
    )


def test_the_command_itself(folder, text):
    out = text.parent / "made.html"
    command = [
        sys.executable,
        str(EXPERIMENTS / "inspect_groups.py"),
        str(folder),
        str(text),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert out.is_file()
    done = subprocess.run([*command, "--layer", "0"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
