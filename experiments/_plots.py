"""Pictures of training runs: loss, bits per byte by position, the groups of one window.

Runs are drawn together when several are given; a single run is drawn the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from _common import replace_with
from _inspect import Caught
from matplotlib.ticker import MaxNLocator

__all__ = ["plot_groups", "plot_loss", "plot_positions", "plot_runs", "plt", "save"]

PER_ROW = 32  # characters of a window in one line of the group map


def save(figure: Any, path: Path) -> None:
    """Write a figure whole or not at all, and close it."""
    replace_with(path, lambda temporary: figure.savefig(temporary, dpi=130, bbox_inches="tight"))
    plt.close(figure)


def _draw_loss(axis: Any, runs: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    for name, records in runs.items():
        axis.plot([r["step"] for r in records], [r["bits_per_byte"] for r in records], label=name, lw=1.2)
    for records in list(runs.values())[:1]:
        short = [r["step"] for r in records if r["phase"] == "warm-up"]
        if short and len(short) < len(records):
            axis.axvline(short[-1] + 0.5, color="0.6", lw=1, ls="--")
            axis.annotate(
                " full length",
                (short[-1] + 0.5, 0.97),
                xycoords=("data", "axes fraction"),
                va="top",
                color="0.4",
            )
    axis.set(xlabel="optimizer step", ylabel="training loss (bits per byte)", title="Loss")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if len(runs) > 1:
        axis.legend()


def _draw_positions(axis: Any, reports: Mapping[str, dict[str, Any]]) -> None:
    for name, report in reports.items():
        edges, bits = report["position_edges"], report["position_bits_per_byte"]
        axis.stairs(bits, edges, baseline=None, label=f"{name} ({report['bits_per_byte']:.3f})", lw=1.6)
    entropy = next(iter(reports.values()))["unigram_bits_per_byte"]
    axis.axhline(entropy, color="0.5", ls=":", label=f"unigram entropy ({entropy:.3f})")
    axis.set(xlabel="position in the context", ylabel="bits per byte (held out)")
    axis.set_title("Bits per byte by position")
    axis.grid(alpha=0.3)
    if len(reports) > 1:  # beside the curves, not on them
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    else:
        axis.legend()


def plot_loss(path: Path, runs: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Training loss by step; `runs` maps a name to its lines of metrics.jsonl."""
    figure, axis = plt.subplots(figsize=(7, 4))
    _draw_loss(axis, runs)
    save(figure, path)


def plot_positions(path: Path, reports: Mapping[str, dict[str, Any]]) -> None:
    """Held-out bits per byte by position in the context, beside the unigram entropy."""
    figure, axis = plt.subplots(figsize=(7, 4))
    _draw_positions(axis, reports)
    save(figure, path)


def plot_runs(
    path: Path, runs: Mapping[str, Sequence[dict[str, Any]]], reports: Mapping[str, dict[str, Any]]
) -> None:
    """Both of the above side by side, all runs together."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.2))
    _draw_loss(axes[0], runs)
    _draw_positions(axes[1], reports)
    save(figure, path)


def _glyph(byte: int) -> str:
    return {10: "⏎", 9: "⇥"}.get(byte, chr(byte) if 32 <= byte < 127 else "·")


def plot_groups(path: Path, caught: Sequence[Caught], tokens: Sequence[int], window: int) -> None:
    """The characters of one closed window, coloured by group, a panel a layer with groups.

    window   of the layers drawn, -1 for the last
    """
    drawn = [one for one in caught if len(one.index_NW)]
    height = 0.6 + sum(0.5 + 0.26 * one.layer.window / PER_ROW for one in drawn)
    figure, axes = plt.subplots(max(1, len(drawn)), 1, squeeze=False, figsize=(9, height))
    if not drawn:
        axes[0, 0].text(0.5, 0.5, "no layer has a closed window of groups", ha="center", va="center")
        axes[0, 0].axis("off")
    for axis, one in zip(axes[:, 0], drawn):
        index = one.index_NW[window]
        width = len(index)
        first = (window % len(one.index_NW)) * width
        rows = -(-width // PER_ROW)
        colours = plt.get_cmap("hsv")(np.linspace(0, 1, one.layer.groups, endpoint=False)) * 0.55 + 0.45
        image = np.ones((rows * PER_ROW, 4))
        image[:width] = colours[index]
        axis.imshow(image.reshape(rows, PER_ROW, 4).clip(0, 1), aspect="auto")
        for i in range(width):
            glyph = _glyph(int(tokens[first + i])) if first + i < len(tokens) else ""
            axis.text(
                i % PER_ROW, i // PER_ROW, glyph, ha="center", va="center", fontsize=8, parse_math=False
            )
        axis.set(xticks=[], yticks=range(rows), yticklabels=[str(first + r * PER_ROW) for r in range(rows)])
        axis.tick_params(length=0, labelsize=7)
        layer = one.layer
        title = f"layer {layer.index}: {layer.groups} groups of {layer.group_size} ({layer.grouping})"
        axis.set_title(title, fontsize=9)
    figure.suptitle("One held-out window, coloured by group", fontsize=10)
    figure.tight_layout()
    save(figure, path)
