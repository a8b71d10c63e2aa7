"""Draw what one token reads: near tokens, and the members of the groups it opens. Makes docs/mechanism.png.

    python experiments/draw_mechanism.py --out docs/mechanism.png

The groups in the picture are real: a k-means grouping of the latents of an untrained model reading this file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from _common import fail, replace_with
from matplotlib.patches import FancyBboxPatch, Rectangle

from coga import CoGAConfig
from coga.models import CoGAGPT

COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44"]
INK, PALE, ACCENT = "#222222", "#e4e4e4", "#aa3377"
W, R, T, K = 16, 4, 88, 3


def real_groups() -> tuple[torch.Tensor, torch.Tensor]:
    """Group of every token of the closed windows, and the groups that the last token opens."""
    how = dict(grouping="kmeans", selection="members", open_groups=K)
    config = CoGAConfig.preset("tiny", layers=str(R), n_layer=1, window=W, band=8, **how)
    model = CoGAGPT(config).eval()
    text = torch.tensor([list(Path(__file__).read_bytes()[:T])])
    out = model(text, return_grouping=True)
    grouping = out.grouping[0]
    attention = model.blocks[0].attention
    x = model.blocks[0].attention_norm(model.embedding(text))
    context = model.call_context(torch.arange(T), None, 0, training=False)
    table = context.tables[attention.projections.rotary]
    q = attention.projections.queries(x, table)
    latent = attention.projections.latents(x, table)
    _, far = attention._groups(x, q, latent, context)
    return grouping.index_BNW[0], far.open_BTK[0, -1]


def draw(path: Path) -> None:
    index, opened = real_groups()
    query = T - 1
    near_from = (query // W - 1) * W
    far_windows = query // W - 1
    figure, axes = plt.subplots(figsize=(13, 5.2))
    axes.set_xlim(-1.5, T + 0.5)
    axes.set_ylim(-4.1, 6.4)
    axes.axis("off")
    for t in range(T):
        window = t // W
        colour = COLOURS[int(index[window, t % W])] if window < far_windows else PALE
        if near_from <= t <= query:
            colour = "#bbbbbb"
        axes.add_patch(Rectangle((t + 0.08, 0), 0.84, 1, facecolor=colour, edgecolor="none"))
    axes.add_patch(Rectangle((query + 0.08, 0), 0.84, 1, facecolor=ACCENT, edgecolor="none"))
    for window in range((T + W - 1) // W):
        left, right = window * W, min((window + 1) * W, T)
        axes.plot([left + 0.1, right - 0.1], [-0.35, -0.35], color=INK, lw=1)
        name = f"window {window}" if right - left > 6 else ""
        state = "" if right - left == W else " (open)"
        axes.text((left + right) / 2, -0.95, name + state, ha="center", fontsize=9, color=INK)
    chosen = set(opened.tolist())
    for window in range(far_windows):
        for group in range(W // R):
            number = window * (W // R) + group
            x = window * W + (group + 0.5) * W * R / W
            is_open = number in chosen
            axes.add_patch(
                FancyBboxPatch(
                    (x - 1.2, 2.6),
                    2.4,
                    0.9,
                    boxstyle="round,pad=0.12",
                    facecolor=COLOURS[group],
                    edgecolor=ACCENT if is_open else "none",
                    lw=2.5,
                    alpha=1.0 if is_open else 0.3,
                )
            )
            for place in (index[window] == group).nonzero()[:, 0].tolist():
                axes.plot(
                    [window * W + place + 0.5, x],
                    [1.05, 2.45],
                    color=COLOURS[group],
                    lw=1.2 if is_open else 0.6,
                    alpha=0.9 if is_open else 0.35,
                )
                if is_open:
                    axes.add_patch(
                        Rectangle(
                            (window * W + place + 0.08, 0),
                            0.84,
                            1,
                            facecolor="none",
                            edgecolor=ACCENT,
                            lw=2,
                        )
                    )
    axes.annotate(
        "",
        xy=(near_from, 1.5),
        xytext=(query + 1, 1.5),
        arrowprops={"arrowstyle": "<->", "color": "#777777"},
    )
    axes.text((near_from + query) / 2, 1.75, "near: read token by token", ha="center", fontsize=10)
    axes.text(
        far_windows * W / 2,
        5.3,
        f"far: groups of {R} tokens by content, formed when their window has closed",
        ha="center",
        fontsize=10,
    )
    axes.text(
        far_windows * W / 2,
        4.3,
        f"outlined: the {K} groups that this token opens, those with the members that match it best",
        ha="center",
        fontsize=10,
        color=ACCENT,
    )
    axes.text(query + 0.6, -1.75, "this token", ha="right", fontsize=10, color=ACCENT)
    axes.text(
        T / 2,
        -3.4,
        "one softmax over:  near tokens  +  members of the opened groups  +  a sink",
        ha="center",
        fontsize=11,
        color=INK,
    )
    figure.tight_layout()
    replace_with(path, lambda temporary: figure.savefig(temporary, dpi=130))
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/mechanism.png"))
    out = parser.parse_args().out
    if not (out.suffix == ".png" and out.parent.is_dir()) or out.is_dir():
        sys.exit(fail(f"out={str(out)!r}: must be a .png file in an existing folder"))
    draw(out)
