"""Rows of an experiment: one JSON object a line in rows.jsonl, written whole or not at all.

A row is appended with a single write and flushed to disk. A line cut off by a crash is dropped when rows are
read, and the file is mended before the next one is added.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import environment, write_text

__all__ = ["ROWS", "append_row", "clean", "mean_spread", "provenance", "read_rows"]

ROWS = "rows.jsonl"


def clean(value: Any) -> Any:
    """Plain JSON: numbers of numpy and torch as Python's, what is not finite as null."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All whole rows of a folder, in the order they were written. ValueError on a line that is not a row."""
    path = folder / ROWS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # cut off while it was written
            raise ValueError(f"{path}: line {number} is no JSON") from error
        if row is not None and not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} holds no row")
        if row is not None:
            rows.append(row)
    return rows


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Add one row."""
    path = folder / ROWS
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        write_text(path, "".join(json.dumps(one) + "\n" for one in read_rows(folder)))
    line = (json.dumps(clean(row), allow_nan=False) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line)
        os.fsync(handle)
    finally:
        os.close(handle)


def provenance(device: torch.device) -> dict[str, Any]:
    """Machine, versions, date and command of a row."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    now = datetime.datetime.now(datetime.timezone.utc)
    command = shlex.join(["python", *sys.argv])
    where = environment(device)
    return {
        **where,
        "hardware": where["device"],
        "triton": triton,
        "date": now.isoformat(timespec="seconds"),
        "command": command,
    }


def mean_spread(values: list[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation of what is there (spread: None below two values)."""
    kept = [v for v in values if v is not None]
    if not kept:
        return None, None
    return float(np.mean(kept)), float(np.std(kept, ddof=1)) if len(kept) > 1 else None
