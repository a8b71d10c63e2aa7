"""Speed of attention modules over the dense module, from the rows of `bench_attention.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _plots import plt, save

__all__ = ["dense_times", "plot_speed"]


def dense_times(rows: list[dict[str, Any]]) -> dict[tuple, float]:
    """Milliseconds of the faster dense backend by (run, length, pass), launched or recorded, whichever is
    faster: rows of one run are compared."""
    best: dict[tuple, float] = {}
    for row in rows:
        if row["implementation"].startswith("sdpa"):
            key = row.get("commit"), row["length"], row["pass"]
            best[key] = min(best.get(key, float("inf")), row["ms"], row.get("launched_ms") or float("inf"))
    return best


def plot_speed(rows: list[dict[str, Any]], path: Path) -> None:
    """Dense time over own time against length: above 1 is faster than dense."""
    best = dense_times(rows)
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        dense = best.get((row.get("commit"), row["length"], row["pass"]))
        if not row["implementation"].startswith("sdpa") and dense:
            name = f"{row['implementation']} {row['setting']}", row["pass"]
            lines.setdefault(name, {})[row["length"]] = dense / row["ms"]  # of two runs the later
    if len({len(points) for points in lines.values()}) > 1:  # a setting timed at one length is no line
        lines = {name: points for name, points in lines.items() if len(points) > 1}
    figure, axis = plt.subplots(figsize=(6, 4))
    names = sorted({name for name, _ in lines})
    for (name, kind), points in sorted(lines.items()):
        color, style = f"C{names.index(name)}", "-" if kind == "fwd+bwd" else "--"
        lengths = sorted(points)
        label = f"{name}, {'forward + backward' if kind == 'fwd+bwd' else 'forward'}"
        axis.plot(lengths, [points[n] for n in lengths], style, color=color, marker="o", ms=4, label=label)
    axis.axhline(1, color="0.6", lw=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    ticks = sorted({n for points in lines.values() for n in points})
    axis.set_xticks(ticks, [f"{n // 1024}K" for n in ticks])
    axis.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    axis.set_xlabel("tokens of a sequence")
    axis.set_ylabel("times as fast as dense attention")
    axis.grid(alpha=0.3)
    if lines:
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    save(figure, path)
