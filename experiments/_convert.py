"""Ways to read a `full` model: as it is, through its window only, or through groups; and what each loses.

    loss    -ln p of held-out bytes in nats, mean over the second half of the context, where the far field is
            most of the past

Nothing is trained: the layers keep their weights, group summaries get a far bias of 0 (a dense model has no
opinion on them), prototypes are centres of k-means over the content of some training text, the weights of the
index query are fitted there, and the refinement of groups starts as a residual of zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _plots import plt, save
from _script import read_as
from torch import Tensor

from coga.config import GROUPINGS, CoGAConfig
from coga.models import CoGAGPT

__all__ = ["Reading", "figures", "parse_reading", "plot_finetune", "plot_table", "readings", "table"]

DENSE = ("full", "near")


@dataclass(frozen=True)
class Reading:
    """name: "full", "near" or a grouping; then group size R and opened groups K (0 for the dense ones)."""

    name: str
    group_size: int = 0
    opened: int = 0

    @property
    def text(self) -> str:
        return self.name if self.name in DENSE else f"{self.name}:{self.group_size}:{self.opened}"

    def changes(self, window: int, capacity: float, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the configuration, the pattern of layers among them; `fields`: of all readings of groups.

        With nothing opened, summaries are all there is to read.
        """
        if self.name == "full":
            return {"layers": "full"}
        if self.name == "near":
            return {"layers": "near", "window": window}
        return {
            "layers": str(self.group_size),
            "window": window,
            "grouping": self.name,
            "open_groups": self.opened,
            "capacity_factor": capacity,
            **({} if self.opened else {"summaries": True}),
            **fields,
            "far_warmup": 0,  # a reading is of the whole far field, wherever the checkpoint's schedule stood
        }

    def config(
        self, config: CoGAConfig, window: int, capacity: float, fields: Mapping[str, Any]
    ) -> CoGAConfig:
        """ValueError where the reading does not fit the model."""
        return config.replace(**self.changes(window, capacity, fields))

    def model(
        self,
        model: CoGAGPT,
        window: int,
        capacity: float,
        far_bias: float,
        fields: Mapping[str, Any],
        text_BT: Tensor | None = None,
    ) -> CoGAGPT:
        """A copy of the model under this reading; a text is what prototypes and heads are found in."""
        return read_as(model, far_bias=far_bias, text_BT=text_BT, **self.changes(window, capacity, fields))


def parse_reading(text: str) -> Reading:
    """ "near", "full" or GROUPING:R:K."""
    name, *rest = text.split(":")
    if name in DENSE and not rest:
        return Reading(name)
    if name in GROUPINGS and len(rest) == 2 and all(part.isascii() and part.isdigit() for part in rest):
        return Reading(name, int(rest[0]), int(rest[1]))
    raise ValueError(f"finetune_arm={text!r}: must be near, full or GROUPING:R:K ({', '.join(GROUPINGS)})")


def readings(groupings: Sequence[str], sizes: Sequence[int], opened: Sequence[int]) -> list[Reading]:
    """Dense ones first, then every combination."""
    grouped = [Reading(name, size, k) for name in groupings for size in sizes for k in opened]
    return [*map(Reading, DENSE), *grouped]


def figures(loss_T: Tensor) -> dict[str, float]:
    """Of the loss by position: nats over the second half, bits per byte there and overall."""
    half = float(loss_T[len(loss_T) // 2 :].mean())
    return {
        "nats_second_half": half,
        "bits_per_byte_second_half": half / math.log(2),
        "bits_per_byte": float(loss_T.mean()) / math.log(2),
    }


def _cells(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in rows}


def table(rows: Sequence[dict[str, Any]], key: str = "nats_second_half") -> str:
    """A row a grouping, a column for each (R, K); dense readings have one figure."""
    grouped = [row for row in rows if row["group_size"]]
    columns = sorted({(row["group_size"], row["opened"]) for row in grouped})
    names = list(dict.fromkeys(row["name"] for row in grouped))
    cells = _cells(rows)
    lines = ["| read as | " + " | ".join(f"R={r} K={k}" for r, k in columns or [(0, 0)]) + " |"]
    lines.append("|" + "---|" * (1 + max(1, len(columns))))
    for name in DENSE:
        lines.append(f"| {name} | {cells[name][key]:.4f} |" + " |" * (len(columns) - 1))
    for name in names:
        found = [cells.get(Reading(name, r, k).text) for r, k in columns]
        shown = ["" if one is None else f"{one[key]:.4f}" for one in found]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plot_table(path: Path, rows: Sequence[dict[str, Any]], window: int) -> None:
    """Loss against opened groups, a panel a group size, dense and window-only reading as lines."""
    grouped = [row for row in rows if row["group_size"]]
    sizes = sorted({row["group_size"] for row in grouped}) or [0]
    cells = _cells(rows)
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(4 * len(sizes) + 1.5, 3.8), sharey=True, squeeze=False
    )
    for axis, size in zip(axes[0], sizes):
        for name in dict.fromkeys(row["name"] for row in grouped):
            kept = sorted(
                (row["opened"], row["nats_second_half"])
                for row in grouped
                if (row["name"], row["group_size"]) == (name, size)
            )
            axis.plot(*(zip(*kept) if kept else ([], [])), "o-", ms=4, label=name)
        for name, style in zip(DENSE, ("-", "--")):
            axis.axhline(cells[name]["nats_second_half"], color="0.4", ls=style, lw=1, label=name)
        axis.set(title=f"groups of {size}", xlabel="opened groups K")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("nats per byte, second half of the context")
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.suptitle(f"A dense model read through groups, without training (W={window})", y=1.02)
    save(figure, path)


def plot_finetune(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Before and after fine-tuning on the same batches, an arm and the full control."""
    figure, axis = plt.subplots(figsize=(2.5 + 1.6 * len(rows), 3.8))
    place = np.arange(len(rows))
    for shift, key, label in ((-0.19, "before", "zero-shot"), (0.19, "after", "fine-tuned")):
        values = [row[key]["nats_second_half"] for row in rows]
        axis.bar(place + shift, values, 0.36, label=label)
        for x, value in zip(place + shift, values):
            axis.text(x, value, f"{value:.4f}", ha="center", va="bottom", fontsize=8)
    values = [row[key]["nats_second_half"] for row in rows for key in ("before", "after")]
    room = max(max(values) - min(values), 1e-3)
    axis.set_ylim(max(0, min(values) - room), max(values) + 0.3 * room)
    axis.set_xticks(place, [row["arm"] for row in rows])
    axis.set(ylabel="nats per byte, second half", title=f"Fine-tuned for {rows[0]['steps']} steps")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    axis.grid(alpha=0.3, axis="y")
    save(figure, path)
