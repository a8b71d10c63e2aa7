"""Show the groups that a trained model makes of a text: in the terminal, and as one HTML page.

    python experiments/inspect_groups.py runs/first/checkpoint my_module.py
    python experiments/inspect_groups.py runs/first book.txt --layer 2 --window-index 3 --out groups.html

CHECKPOINT is a folder of `save_pretrained`, or a run folder of longctx.py. TEXT is read as bytes, from its
start to the end of the windows that are shown. The page holds up to 8 windows of every layer that has groups,
coloured by group, with the figures of `coga.grouping.metrics` beside contiguous, random and k-means groups of
the same content. `--compare` prints those figures for every layer. Bad input: one line on stderr, exit code
2, nothing written.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from _html import page
from _inspect import Caught, Structure, catch, glyphs, layer_report, mean_metrics, structure_of
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coga.models import CoGAGPT
from coga.models.pretrained import replace_file

SHOWN_TOKENS, SHOWN_WINDOWS = 8192, 8  # what keeps the page small
COLUMNS = [("inside", "inside"), ("between", "between"), ("silhouette", "silh.")]
COLUMNS += [("class ami", "class AMI"), ("class homogeneity", "class hom."), ("block ami", "block AMI")]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Show the groups that a trained model makes of a text.")
    parser.add_argument(
        "checkpoint", type=Path, help="folder of save_pretrained, or a run folder of longctx.py"
    )
    parser.add_argument("text", type=Path, help="file to read, as bytes")
    parser.add_argument("--layer", type=int, help="layer to print (default: the first that has groups)")
    parser.add_argument(
        "--window-index", type=int, help="window to print, from 0 (default: the last one shown)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("groups.html"), help="the page (default: groups.html)"
    )
    parser.add_argument("--structure", choices=("auto", "python", "prose"), default="auto",
                        help="what groups are compared with (default: Python for .py files)")  # fmt: skip
    parser.add_argument("--compare", action="store_true", help="print every layer beside the other groupings")
    return parser.parse_args(argv)


def model_folder(path: Path) -> Path:
    """The folder that holds the model: `path`, or its `checkpoint`."""
    if not path.is_dir():
        raise ValueError(
            f"checkpoint={str(path)!r}: {'is not a folder' if path.exists() else 'does not exist'}"
        )
    for folder in (path, path / "checkpoint"):
        if (folder / "model.safetensors").is_file():
            return folder
    raise ValueError(f"checkpoint={str(path)!r}: holds no model.safetensors, nor does its folder checkpoint")


def text_size(path: Path) -> int:
    """Bytes in the text; ValueError when there is nothing to read."""
    if not path.is_file():
        raise ValueError(f"text={str(path)!r}: {'is not a file' if path.exists() else 'does not exist'}")
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise ValueError(f"text={str(path)!r}: is empty")
    return size


def read_text(path: Path, length: int, vocab_size: int) -> bytes:
    """The first bytes of the text; ValueError on one that the model has no token for."""
    try:
        with path.open("rb") as file:
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"text={str(path)!r}: cannot be read ({error.strerror})") from error
    values = np.frombuffer(text, dtype=np.uint8)
    if int(values.max()) >= vocab_size:
        at = int((values >= vocab_size).argmax())
        rule = f"is outside the model's vocabulary of {vocab_size}"
        raise ValueError(f"text={str(path)!r}: byte {values[at]} at offset {at} {rule}")
    return text


def check_output(path: Path) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out={str(path)!r}: must end in .html")
    if path.is_dir():
        raise ValueError(f"--out={str(path)!r}: is a folder")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise ValueError(f"--out={str(path)!r}: cannot be written ({error.strerror})") from error


def choose(model: CoGAGPT, args: argparse.Namespace, size: int) -> tuple[int, int, int]:
    """(layer, window, bytes to read) after checking that the text holds that window."""
    layers = [model.config.layer(i) for i in range(model.config.n_layer)]
    grouped = [layer.index for layer in layers if layer.kind == "group"]
    if not grouped:
        raise ValueError(f"checkpoint: no layer has groups (layers={model.config.layers!r})")
    chosen = grouped[0] if args.layer is None else args.layer
    if chosen not in grouped:
        names = ", ".join(map(str, grouped))
        kind = (
            f"is {layers[chosen].kind!r} and has no groups" if 0 <= chosen < len(layers) else "does not exist"
        )
        raise ValueError(f"--layer={chosen}: {kind}; layers with groups: {names}")
    width = layers[chosen].window
    limit = min(size, model.config.max_len)
    windows = limit // width
    if windows == 0:
        raise ValueError(f"text: holds {size} bytes; layer {chosen} needs at least {width}, one window")
    window = min(windows, _count(width)) - 1 if args.window_index is None else args.window_index
    if not 0 <= window < windows:
        need = f"window {window} needs {(window + 1) * width}" if window > 0 else "windows count from 0"
        if (window + 1) * width > model.config.max_len:
            need += f", above max_len={model.config.max_len}"
        raise ValueError(
            f"--window-index={window}: must be in 0..{windows - 1} "
            f"({size} bytes make {windows} windows of {width}; {need})"
        )
    return chosen, window, min(limit, max(window + 1, _count(width)) * width)


def _count(width: int) -> int:
    """How many windows of this width the page holds."""
    return max(1, min(SHOWN_WINDOWS, SHOWN_TOKENS // width))


def shown_windows(width: int, total: int, start: int, end: int) -> list[int]:
    """Windows of a layer that lie within bytes start..end of the text, at least one."""
    first = min(start // width, total - 1)
    return list(range(first, max(first + 1, min(total, end // width))))


def looks_like_python(path: Path, choice: str) -> bool:
    return choice == "python" or (choice == "auto" and path.suffix in (".py", ".pyi", ".pyw"))


def build(
    model: CoGAGPT, found: list[Caught], text: bytes, structure: Structure, layer: int, window: int
) -> dict[str, Any]:
    """The data of the page: every layer's windows around the chosen one."""
    width = model.config.layer(layer).window
    count = _count(width)
    last = min(len(text) // width, max(count, window + 1))
    start, end = max(0, last - count) * width, last * width
    reports = []
    for one in found:
        total = len(one.index_NW)
        if total:
            windows = shown_windows(one.layer.window, total, start, end)
            report = layer_report(model.config, one, windows, structure)
            report["means"] = {name: mean_metrics(report, name) for name in report["windows"][0]["groupings"]}
            reports.append(report)
    spans = [(w["window"] * r["window_size"], r["window_size"]) for r in reports for w in r["windows"]]
    first, stop = min(at for at, _ in spans), max(at + size for at, size in spans)
    signs = glyphs(text)[first:stop]
    return {
        "layer": layer,
        "window": window,
        "start": first,
        "glyphs": [glyph for glyph, _ in signs],
        "kinds": "".join(kind for _, kind in signs),
        "classes": structure.classes[first:stop].tolist(),
        "names": list(structure.names),
        "class_title": structure.class_title,
        "block_title": structure.block_title,
        "layers": reports,
    }


def colour(rank: int, groups: int) -> str:
    """A pale background for black text, by the group's place on the colour wheel."""
    hue = 6 * rank / groups
    share = 1 - abs(hue % 2 - 1)
    weak, strong = (188, 250) if rank % 2 else (158, 218)
    middle = round(weak + share * (strong - weak))
    red, green, blue = [
        (strong, middle, weak), (middle, strong, weak), (weak, strong, middle),
        (weak, middle, strong), (middle, weak, strong), (strong, weak, middle),
    ][int(hue)]  # fmt: skip
    return f"#101010 on #{red:02x}{green:02x}{blue:02x}"


def print_window(console: Console, data: dict[str, Any]) -> None:
    """The chosen window, coloured, then its groups."""
    report = next(r for r in data["layers"] if r["layer"] == data["layer"])
    view = next(w for w in report["windows"] if w["window"] == data["window"])["groupings"][report["own"]]
    start = data["window"] * report["window_size"] - data["start"]
    styles = [colour(rank, report["groups"]) for rank in view["hue"]]
    body = Text()
    signs = list(zip(data["glyphs"][start:], data["kinds"][start:], view["index"]))
    for glyph, kind, group in signs:
        body.append(glyph, styles[group])
        if kind == "n":
            body.append("\n")
    console.print(f"\nlayer {report['layer']}, window {data['window']}: {report['own']} groups\n")
    console.print(body)
    table = Table(box=None, pad_edge=False)
    for title in ("group", "size", "coherence"):
        table.add_column(title, justify="right")
    table.add_column("members, in order", no_wrap=True, overflow="ellipsis", ratio=1)
    for group in range(report["groups"]):
        members = "".join(glyph for glyph, _, g in signs if g == group).replace(" ", "␣")
        value = view["coherence"][group]
        row = Text(f" {group} ", styles[group])
        size = view["index"].count(group)
        table.add_row(row, str(size), "-" if value is None else f"{value:.3f}", Text(members))
    console.print()
    console.print(table)


def print_figures(console: Console, data: dict[str, Any], every_layer: bool) -> None:
    """Figures of the model's groups beside the other groupings, averaged over the windows of the page."""
    for report in data["layers"]:
        if not every_layer and report["layer"] != data["layer"]:
            continue
        count = len(report["windows"])
        use = "" if report["use"] is None else f", prototype use {report['use']:.3f}"
        console.print(f"\nlayer {report['layer']}, mean of {count} window{'s' * (count > 1)}{use}")
        table = Table(box=None, pad_edge=False)
        table.add_column("grouping")
        for _, title in COLUMNS:
            table.add_column(title, justify="right")
        for name, means in report["means"].items():
            values = [means[key] for key, _ in COLUMNS]
            own = name == report["own"]
            row = ["-" if value is None else f"{round(value, 3) + 0:.3f}" for value in values]
            table.add_row(f"{name} (model)" if own else name, *row, style="bold" if own else None)
        console.print(table)
    console.print(f"\nclass: {data['class_title']}; block: {data['block_title']}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    console = Console(highlight=False, markup=False, emoji=False)
    try:
        folder, size = model_folder(args.checkpoint), text_size(args.text)
        check_output(args.out)
        model = CoGAGPT.from_pretrained(folder)
        layer, window, length = choose(model, args, size)
        text = read_text(args.text, length, model.config.vocab_size)
        console.print(
            f"checkpoint {folder}  layers {model.config.layers!r}  "
            f"text {args.text} ({size} bytes, {length} read)",
            soft_wrap=True,
        )
        found = catch(model, torch.tensor(list(text)))
        structure = structure_of(text, looks_like_python(args.text, args.structure))
        data = build(model, found, text, structure, layer, window)
        facts = [
            ("checkpoint", str(folder)),
            ("text", f"{args.text} ({size} bytes, read as {structure.kind})"),
            ("layers", model.config.layers),
            ("steps trained", str(int(model.step_count))),
        ]
        document = page(data, f"Groups in {args.text.name}", facts)
        replace_file(args.out, lambda path: path.write_text(document, encoding="utf-8"))
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"inspect_groups.py: {message}", file=sys.stderr)
        return 2
    print_window(console, data)
    print_figures(console, data, args.compare)
    console.print(f"page: {args.out} ({args.out.stat().st_size / 1024:.0f} KiB)", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
