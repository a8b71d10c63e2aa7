"""Tables of training runs, one column a run, through rich."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_tables"]

SHOWN = 8  # rows of the table by position


def _number(value: float | None, pattern: str, unit: str = "") -> str:
    return "-" if value is None else format(value, pattern) + unit


def _rows(report: dict[str, Any]) -> dict[str, str]:
    get = report.get
    return {
        "bits per byte, held out": _number(report["bits_per_byte"], ".4f"),
        "unigram byte entropy": _number(report["unigram_bits_per_byte"], ".4f"),
        "flip rate between the last probes": _number(get("flip_rate"), ".3f"),
        "prototype use (perplexity / G)": _number(get("prototype_use"), ".3f"),
        "coherence inside groups": _number(get("inside"), ".3f"),
        "coherence between groups": _number(get("between"), ".3f"),
        "peak memory": _number(report["peak_bytes"] / 2**30, ".2f", " GiB"),
        "training tokens/s at full length": _number(get("tokens_per_second"), ",.0f"),
        "decode state, bytes per token": f"{report['state_bytes_per_token']:,.0f}",
        "multi-head attention, bytes per token": f"{report['mha_bytes_per_token']:,.0f}",
        "multi-head attention / decode state": f"{report['state_ratio']:.1f}",
        "parameters": f"{report['parameters']:,}",
    }


def print_tables(reports: Mapping[str, dict[str, Any]]) -> None:
    """Overall figures, then bits per byte by position."""
    console = Console(highlight=False)
    if not console.is_terminal:
        # A pipe has no width to fit into.
        console = Console(highlight=False, width=48 + 16 * len(reports))
    table = Table(title=None, show_header=len(reports) > 1)
    table.add_column("")
    for name in reports:
        table.add_column(name, justify="right")
    columns = [_rows(report) for report in reports.values()]
    for name in columns[0]:
        table.add_row(name, *[column[name] for column in columns])
    console.print(table)
    table = Table()
    table.add_column("position in the context")
    for name in reports:
        table.add_column("bits per byte" if len(reports) == 1 else name, justify="right")
    edges = next(iter(reports.values()))["position_edges"]
    parts = len(edges) - 1
    # Neighbouring buckets share a row where there are many.
    step = -(-parts // SHOWN)
    for first in range(0, parts, step):
        last = min(first + step, parts)
        cells = []
        for report in reports.values():
            sizes = [edges[i + 1] - edges[i] for i in range(first, last)]
            bits = report["position_bits_per_byte"][first:last]
            cells.append(f"{sum(s * b for s, b in zip(sizes, bits)) / sum(sizes):.4f}")
        table.add_row(f"{edges[first]:,} - {edges[last] - 1:,}", *cells)
    console.print(table)
