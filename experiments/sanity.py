"""Look inside a trained model: attention entropy, reciprocity, what latents must hold, gradients by part.

    python experiments/sanity.py --checkpoint runs/arms/mha
    python experiments/sanity.py --checkpoint runs/arms/gumbel --data my_module.py --n 4096 --out runs/look

CHECKPOINT is a folder of `save_pretrained`, or a run folder of longctx.py, of any pattern of layers. What
each figure means, and exactly what the latents rebuild, is in `_sanity.py` and printed. For "how wide a
latent do full keys and values need", give an `mha` checkpoint.

DIR gets config.json, rows.jsonl (one row), entropy.png, reciprocity.png, reconstruction.png and
gradients.png. Exit codes: 0 done, 1 a figure that is not finite, 2 bad input (one line, nothing written).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _arms import parse_integers
from _common import choose_device, peak_memory
from _plots import plt, save
from _rows import append_row, provenance
from _sanity import entropies, gradient_norms, rebuilt, reciprocities, watch
from _script import at_least, file_hash, load_model, model_folder, open_folder, parser, run_script, show
from tqdm import tqdm

from coga.data import contexts, load_corpus
from coga.models import CoGAGPT

__all__ = ["main"]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0], "runs/sanity")
    add = made.add_argument
    add("--checkpoint", type=Path, metavar="DIR", required=True, help="the model")
    add(
        "--data",
        default="python",
        help="'python' (the standard library's source), or a file or folder of text",
    )
    add("--n", type=int, default=1024, help="tokens of a context (1024)")
    add("--contexts", type=int, default=2, help="held-out contexts (2)")
    add("--queries", type=int, default=128, help="queries a context whose entropy is taken (128)")
    add("--band", type=int, help="reach of reciprocity in tokens (the model's band)")
    add(
        "--widths",
        default="4,8,16,32,64,128,256",
        help="latent widths C; those above the source's are left out",
    )
    return made.parse_args(argv)


def check(args: argparse.Namespace) -> tuple[CoGAGPT, list[int]]:
    at_least(args, 2, "n")
    at_least(args, 1, "contexts", "queries")
    at_least(args, 0, "seed")
    widths = sorted(parse_integers(args.widths, "widths", 1))
    model = load_model(args.checkpoint)
    if args.n > model.config.max_len:
        raise ValueError(f"n={args.n}: must be at most max_len={model.config.max_len}")
    if args.band is not None and args.band < 2:
        raise ValueError(f"band={args.band}: must be at least 2")
    return model, widths


def measure(model: CoGAGPT, tokens: Any, targets: Any, args: argparse.Namespace, widths: list[int]) -> dict:
    """Everything of one row."""
    seen = watch(model, tokens)
    refuse = FloatingPointError(f"checkpoint={str(args.checkpoint)!r}: gives figures that are not finite")
    if not all(bool(one.x_BTD.isfinite().all()) for one in seen):
        raise refuse
    band = max(2, model.config.band) if args.band is None else args.band
    layers = []
    for index, one in enumerate(tqdm(seen, desc="layers", unit="layer", leave=False)):
        entropy, sink = entropies(one, args.queries)
        width = model.config.d_model if one.kind == "mha" else one.module.layer.latent_dim
        kept = [w for w in widths if w < width] + [width]
        what, errors = rebuilt(one, kept)
        layers.append({
            "layer": index, "kind": one.kind, "entropy": entropy, "sink": sink,
            "reciprocity": reciprocities(one, band),
            "rebuilt": what, "widths": kept, "errors": errors,
        })  # fmt: skip
    found = {"band": band, "layers": layers, "gradients": gradient_norms(model, tokens, targets)}
    values = [x for layer in layers for x in layer["entropy"]] + [found["gradients"]["loss"]]
    values += [part["gradient"] for part in found["gradients"]["parts"].values()]
    if not all(math.isfinite(x) for x in values):
        raise refuse
    return found


# --- what is shown -----------------------------------------------------------------------------------------


def _mean(values: list[float | None]) -> str:
    kept = [v for v in values if v is not None]
    return f"{np.mean(kept):.3f}" if kept else "-"


def print_tables(row: dict[str, Any]) -> None:
    print(
        f"\nlayer kind   entropy H/ln(i)  sink mass  reciprocity (0 < i-j < {row['band']})   mean over heads"
    )
    for one in row["layers"]:
        sink = "-" if one["sink"] is None else _mean(one["sink"])
        print(f"{one['layer']:5d} {one['kind']:6s} {_mean(one['entropy']):>15s} {sink:>10s} "
              f"{_mean(one['reciprocity']):>12s}")  # fmt: skip
    for what in dict.fromkeys(one["rebuilt"] for one in row["layers"]):
        print(f"\nrelative error of {what}, by latent width C:")
        for one in row["layers"]:
            if one["rebuilt"] == what:
                cells = " ".join(f"C={w}: {e:.3f}" for w, e in zip(one["widths"], one["errors"]["both"]))
                print(f"  layer {one['layer']}: {cells}")
    print(f"\none training step, loss {row['gradients']['loss']:.4f} nats a token")
    print(f"{'part':12s} {'elements':>10s} {'|gradient|':>12s} {'|g|/|parameters|':>17s}   without gradient")
    for name, part in row["gradients"]["parts"].items():
        ratio = f"{part['gradient'] / part['parameters']:.2e}" if part["parameters"] else "-"
        none = ", ".join(part["without"]) or "-"
        print(f"{name:12s} {part['elements']:10,d} {part['gradient']:12.3e} {ratio:>17s}   {none}")


def _heads(path: Path, row: dict[str, Any], key: str, title: str, low: float) -> None:
    """A value for each layer and head."""
    layers = row["layers"]
    image = np.array([[np.nan if x is None else x for x in one[key]] for one in layers])
    figure, axis = plt.subplots(figsize=(2.6 + 0.5 * image.shape[1], 1.6 + 0.45 * image.shape[0]))
    colours = "viridis" if low == 0 else "coolwarm"
    drawn = axis.imshow(image, vmin=low, vmax=1, cmap=colours, aspect="auto")
    for (y, x), value in np.ndenumerate(image):
        pale = value > 0.6 if low == 0 else abs(value) < 0.6
        axis.text(x, y, f"{value:.2f}", ha="center", va="center", color="k" if pale else "w", fontsize=7)
    axis.set_xticks(range(image.shape[1]))
    axis.set_yticks(range(len(layers)), [f"{one['layer']} ({one['kind']})" for one in layers])
    axis.set(xlabel="head", ylabel="layer")
    axis.set_title(title, fontsize=9)
    figure.colorbar(drawn, ax=axis)
    save(figure, path)


def _reconstruction(path: Path, row: dict[str, Any]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
    for axis, name in zip(axes, ("keys", "values", "both")):
        for one in row["layers"]:
            axis.plot(one["widths"], one["errors"][name], "o-", ms=4, label=f"{one['layer']} ({one['kind']})")
        axis.set_xscale("log", base=2)
        axis.set(title=name, xlabel="latent width C")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error")
    axes[-1].legend(title="layer", loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.suptitle("\n".join(dict.fromkeys(one["rebuilt"] for one in row["layers"])), fontsize=9, y=1.02)
    save(figure, path)


def _gradients(path: Path, row: dict[str, Any]) -> None:
    """Norms by part, then by part and layer."""
    found = row["gradients"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 1.5 + 0.3 * len(found["parts"])))
    names = list(found["parts"])
    left.barh(names, [found["parts"][name]["gradient"] for name in names])
    left.set_xscale("log")
    left.invert_yaxis()
    left.set(title="gradient norm (no bar: zero)", xlabel="norm")
    left.grid(alpha=0.3, axis="x")
    kept = list(found["layers"])
    image = np.array([[np.nan if x is None else x for x in found["layers"][name]] for name in kept])
    with np.errstate(divide="ignore"):
        drawn = right.imshow(np.where(image > 0, np.log10(image), np.nan), aspect="auto", cmap="viridis")
    right.set_yticks(range(len(kept)), kept)
    right.set_xticks(range(image.shape[1]))
    right.set(title="log10 by layer (white: none or zero)", xlabel="layer")
    figure.colorbar(drawn, ax=right)
    figure.tight_layout()
    save(figure, path)


def plot_all(folder: Path, row: dict[str, Any]) -> None:
    _heads(folder / "entropy.png", row, "entropy", "attention entropy H/ln(i)", 0)
    _heads(folder / "reciprocity.png", row, "reciprocity", "reciprocity of pre-mask scores", -1)
    _reconstruction(folder / "reconstruction.png", row)
    _gradients(folder / "gradients.png", row)


def body(argv: list[str] | None) -> None:
    args = arguments(argv)
    model, widths = check(args)
    device = choose_device(args.device)
    corpus = load_corpus(args.data, length=args.n)
    if model.config.vocab_size < corpus.vocab_size:
        rule = f"must be at least the text's {corpus.vocab_size}"
        raise ValueError(f"vocab_size={model.config.vocab_size}: {rule}")
    folder = model_folder(args.checkpoint)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device")}
    settings |= {"checkpoint": str(folder), "weights": file_hash(folder / "model.safetensors")}
    settings |= {"widths": widths, "sha256": corpus.sha256}
    show("sanity.py", settings, device, args.out)
    layers = [model.config.layer(i).kind for i in range(model.config.n_layer)]
    print(f"text    {corpus.describe()}\nmodel   layers={model.config.layers!r} ({len(layers)})", flush=True)
    outputs = ("entropy.png", "reciprocity.png", "reconstruction.png", "gradients.png")
    rows = open_folder(args.out, "sanity.py", settings, args.resume, outputs)
    if not rows:
        began = time.monotonic()
        tokens, targets = (x.to(device) for x in contexts(corpus, args.n, args.contexts))
        found = measure(model.to(device), tokens, targets, args, widths)
        row = {"seed": args.seed, "n": args.n, "settings": settings, **found}
        row |= {"seconds": time.monotonic() - began, "peak_bytes": peak_memory(device)}
        rows.append({**row, **provenance(device)})
        append_row(args.out, rows[0])
    plot_all(args.out, rows[0])
    print_tables(rows[0])
    print(f"everything is in {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Run with these arguments; returns the exit code."""
    return run_script(body, argv)


if __name__ == "__main__":
    sys.exit(main())
