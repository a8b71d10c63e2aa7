"""Tables and pictures of an ablation, from its rows alone.

mean ± spread are over seeds (sample standard deviation); differences are arm minus reference within a seed,
so that what a seed's text and start have in common falls out. Below 0 the arm is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import write_text
from _plots import plt, save
from _rows import mean_spread
from rich.console import Console
from rich.table import Table

__all__ = ["number", "tables", "write"]

Row = dict[str, Any]
Cells = list[list[str]]  # the first line is the head
Arms = dict[str, dict[int, Row]]  # rows by arm and seed


def number(value: float | None, pattern: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, pattern)


def _by_arm(rows: Sequence[Row]) -> Arms:
    """Rows by arm and seed, in the order of the file; of a run that is there twice, the first."""
    found: Arms = {}
    for row in rows:
        found.setdefault(row["arm"], {}).setdefault(row["seed"], row)
    return found


def _spread(rows: Sequence[Row], name: str, pattern: str, scale: float = 1.0) -> str:
    mean, spread = mean_spread([row["metrics"].get(name) for row in rows])
    text = number(mean, pattern, scale)
    return text if spread is None else f"{text} ± {number(spread, pattern, scale)}"


def _flops(row: Row) -> float:
    return row["metrics"]["training_flops"] / row["tokens"]


# --- tables ------------------------------------------------------------------------------------------------


def _quality(arms: Arms) -> Cells:
    beyond = next(iter(next(iter(arms.values())).values()))["metrics"]["beyond"]
    head = ["arm", "runs", "diverged", "bits per byte", f"from position {beyond:,}", "worst rise (nats)"]
    cells = [head]
    for name, seeds in arms.items():
        rows = list(seeds.values())
        cells.append([
            name,
            str(len(rows)),
            str(sum(row["metrics"]["diverged"] for row in rows)),
            _spread(rows, "bits_per_byte", ".4f"),
            _spread(rows, "beyond_bits_per_byte", ".4f"),
            _spread(rows, "worst_rise", ".3f"),
        ])  # fmt: skip
    return cells


def differences(arm: dict[int, Row], reference: dict[int, Row], name: str) -> dict[int, float]:
    """arm - reference by seed, where both have the figure."""
    both = [(seed, row["metrics"][name], reference[seed]["metrics"][name])
            for seed, row in arm.items() if seed in reference]  # fmt: skip
    return {seed: mine - theirs for seed, mine, theirs in both if mine is not None and theirs is not None}


def _paired(arms: Arms, reference: str) -> Cells:
    seeds = sorted({seed for rows in arms.values() for seed in rows})
    head = [f"minus {reference}", "bits per byte", *[f"seed {seed}" for seed in seeds]]
    cells = [[*head, "beyond the window", *[f"seed {seed}" for seed in seeds]]]
    for name, rows in arms.items():
        if name == reference:
            continue
        line = [name]
        for figure in ("bits_per_byte", "beyond_bits_per_byte"):
            found = differences(rows, arms.get(reference, {}), figure)
            mean, spread = mean_spread(list(found.values()))
            line.append(number(mean, "+.4f") + ("" if spread is None else f" ± {number(spread, '.4f')}"))
            line += [number(found.get(seed), "+.4f") for seed in seeds]
        cells.append(line)
    return cells


def _groups_and_cost(arms: Arms) -> Cells:
    cells = [[
        "arm", "flips/100 steps", "prototype use", "worst layer", "dead", "coherence inside", "between",
        "tokens/s", "MFLOP/token", "peak MiB", "seconds",
    ]]  # fmt: skip
    for name, seeds in arms.items():
        rows = list(seeds.values())
        work = mean_spread([_flops(row) for row in rows])[0]
        cells.append([
            name,
            _spread(rows, "flip_rate_100", ".3f"),
            _spread(rows, "prototype_use", ".3f"),
            _spread(rows, "prototype_use_worst", ".3f"),
            _spread(rows, "dead_prototypes", ".1f"),
            _spread(rows, "coherence_inside", ".3f"),
            _spread(rows, "coherence_between", ".3f"),
            number(mean_spread([row["metrics"]["tokens_per_second"] for row in rows])[0], ",.0f"),
            number(work, ",.2f", 1e-6),
            number(mean_spread([row["metrics"]["peak_bytes"] for row in rows])[0], ",.0f", 2**-20),
            number(mean_spread([row["metrics"]["seconds"] for row in rows])[0], ",.1f"),
        ])  # fmt: skip
    return cells


def tables(rows: Sequence[Row], reference: str) -> dict[str, Cells]:
    """Title -> lines of cells."""
    arms = _by_arm(rows)
    found = {"Held out": _quality(arms)}
    if len(arms) > 1:
        found["Paired differences"] = _paired(arms, reference)
    return found | {"Groups and cost": _groups_and_cost(arms)}


def _print(found: dict[str, Cells]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe has no width to fit into
        console = Console(highlight=False, width=200)
    for title, (head, *lines) in found.items():
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
        for line in lines:
            table.add_row(*line)
        console.print(table)


def _markdown(found: dict[str, Cells], rows: Sequence[Row]) -> str:
    row = rows[-1]
    parts = ["# Ablation\n"]
    for title, (head, *lines) in found.items():
        rule = ["---", *["---:"] * (len(head) - 1)]
        parts.append(f"## {title}\n")
        parts += ["| " + " | ".join(line) + " |" for line in (head, rule, *lines)]
        parts.append("")
    machines = ", ".join(sorted({one["hardware"] for one in rows}))
    versions = f"torch {row['torch']}, triton {row['triton']}, Python {row['python']}"
    parts.append(f"{machines}; {row['precision']}; {versions}; {row['date']}; `{row['command']}`")
    return "\n".join(parts) + "\n"


# --- pictures ----------------------------------------------------------------------------------------------


def _colours(count: int) -> list[Any]:
    table = plt.get_cmap("tab10" if count <= 10 else "tab20")
    return [table(i % table.N) for i in range(count)]


def _legend(axis: Any) -> None:
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)  # beside the curves, not on them


def _bits(row: Row) -> np.ndarray:
    """By position; NaN where the run diverged."""
    return np.array(row["metrics"]["position_bits_per_byte"], dtype=float)


def _draw_positions(path: Path, arms: Arms, reference: str) -> None:
    """Means over seeds; below, paired differences to the reference with their range over seeds as a band."""
    paired = len(arms) > 1 and reference in arms
    shape = dict(figsize=(8, 7.5 if paired else 4.2), sharex=True, squeeze=False)
    figure, axes = plt.subplots(2 if paired else 1, 1, **shape)
    for (name, seeds), colour in zip(arms.items(), _colours(len(arms))):
        rows = list(seeds.values())
        edges = rows[0]["metrics"]["position_edges"]
        label = f"{name} ({_spread(rows, 'bits_per_byte', '.3f')})"
        mean = np.mean([_bits(row) for row in rows], 0)
        axes[0, 0].stairs(mean, edges, baseline=None, color=colour, lw=1.4, label=label)
        theirs = arms.get(reference, {})
        gaps = [_bits(row) - _bits(theirs[seed]) for seed, row in seeds.items() if seed in theirs]
        if paired and gaps:
            axes[1, 0].stairs(np.mean(gaps, 0), edges, baseline=None, color=colour, lw=1.6, label=name)
            low, high = np.min(gaps, 0), np.max(gaps, 0)
            axes[1, 0].stairs(high, edges, baseline=low, color=colour, alpha=0.15, fill=True)
    axes[0, 0].set(title="Bits per byte by position, held out", ylabel="bits per byte")
    if paired:
        axes[1, 0].set(title=f"minus {reference}, same seed (band: range over seeds)", ylabel="bits per byte")
    for axis in axes[:, 0]:
        # Where the first group is read.
        axis.axvline(rows[0]["metrics"]["beyond"], color="0.6", lw=1, ls="--")
        axis.set_xlim(0, edges[-1])
        _legend(axis)
    axes[-1, 0].set_xlabel("position in the context")
    save(figure, path)


def _draw_curves(path: Path, arms: Arms, curve: str, **labels: str) -> None:
    """A thin line a seed, a thick one for their mean; no picture where no arm has a curve."""
    figure, axis = plt.subplots(figsize=(8, 4.2))
    for (name, seeds), colour in zip(arms.items(), _colours(len(arms))):
        found = [
            np.array(row["curves"][curve], dtype=float) for row in seeds.values() if row["curves"][curve]
        ]
        for one in found:
            axis.plot(one[:, 0], one[:, 1], color=colour, lw=0.6, alpha=0.5)
        whole = [one for one in found if len(one) == max(map(len, found))]  # a diverged run is shorter
        if whole:
            axis.plot(whole[0][:, 0], np.mean(whole, 0)[:, 1], color=colour, lw=1.6, marker=".", label=name)
    axis.set(xlabel="optimizer step", **labels)
    if axis.lines:
        _legend(axis)
        save(figure, path)
    plt.close(figure)


def write(folder: Path, rows: Sequence[Row], reference: str) -> None:
    """Print the tables; write them and the pictures into the folder."""
    found = tables(rows, reference)
    _print(found)
    write_text(folder / "table.md", _markdown(found, rows))
    arms = _by_arm(rows)
    _draw_positions(folder / "positions.png", arms, reference)
    _draw_curves(folder / "losses.png", arms, "loss", title="Training loss", ylabel="nats per byte")
    title = "Fixed held-out tokens that changed group"
    _draw_curves(folder / "flips.png", arms, "flip_rate_100", title=title, ylabel="share per 100 steps")
