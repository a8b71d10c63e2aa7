"""Pictures of recall.py, from its rows: a heat map an arm, accuracy by class and length, by depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _arms import slug
from _plots import plt, save

__all__ = ["plot_all"]

KINDS = (("inside", "inside the window"), ("beyond", "beyond the window"),
         ("out_of_reach", "out of reach of local layers"))  # fmt: skip


def _heat(path: Path, row: dict[str, Any]) -> None:
    """Depth by length; cells out of reach of local layers are outlined."""
    image = np.array(row["needle"], dtype=float).T
    figure, axis = plt.subplots(figsize=(2.6 + 0.8 * image.shape[1], 1.6 + 0.42 * image.shape[0]))
    drawn = axis.imshow(image, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (y, x), value in np.ndenumerate(image):
        colour = "black" if value > 0.6 else "white"
        axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        if row["needle_out_of_reach"][x][y]:
            frame = plt.Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor="white", lw=0.8)
            axis.add_patch(frame)
    axis.set_xticks(range(len(row["lengths"])), [f"{n:,}" for n in row["lengths"]])
    axis.set_yticks(range(len(row["depths"])), [f"{d:.2f}" for d in row["depths"]])
    axis.set(xlabel="length in tokens (the first is the trained one)", ylabel="depth of the needle")
    axis.set_title(f"{row['arm']}: needles found\n(framed: out of reach of local layers)", fontsize=9)
    figure.colorbar(drawn, ax=axis, label="accuracy")
    save(figure, path)


def _figure(title: str, panels: int) -> tuple[Any, Any]:
    figure, axes = plt.subplots(1, panels, figsize=(4.2 * panels, 3.8), squeeze=False, sharey=True)
    figure.suptitle(title, y=1.02)
    for axis in axes[0]:
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy")
    return figure, axes[0]


def _mqar(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    figure, axes = _figure("Associative recall by length", len(KINDS))
    for axis, (kind, title) in zip(axes, KINDS):
        for row in rows:
            kept = [(one["length"], one[kind]) for one in row["mqar"] if one[kind] is not None]
            axis.plot(*(zip(*kept) if kept else ([], [])), "o-", ms=4, label=row["arm"])
        axis.axhline(rows[0]["chance"], color="0.5", ls=":", label="chance")
        axis.axvline(rows[0]["n"], color="0.7", lw=1, ls="--", label="trained length")
        axis.set_xscale("log", base=2)
        axis.set(title=title, xlabel="length in tokens")
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    save(figure, path)


def _depth(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    first, last = rows[0]["lengths"][0], rows[0]["lengths"][-1]
    shown = [0, -1] if first != last else [0]
    figure, axes = _figure("Needles found by depth", len(shown))
    for axis, place in zip(axes, shown):
        for row in rows:
            axis.plot(row["depths"], row["needle"][place], "o-", ms=4, label=row["arm"])
        axis.axhline(rows[0]["chance"], color="0.5", ls=":", label="chance")
        axis.set(title=f"{rows[0]['lengths'][place]:,} tokens", xlabel="depth (1: right before the question)")
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    save(figure, path)


def plot_all(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        _heat(folder / f"heat-{slug(row['arm'])}.png", row)
    _mqar(folder / "mqar.png", rows)
    _depth(folder / "depth.png", rows)
