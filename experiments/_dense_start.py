"""A start that arms share: the first steps of a run on a dense model, trained once and kept.

What differs between arms only in their groups has the same dense twin (layers `full`). Its weights and the
moments of AdamW are kept in a folder named after the twin and whatever else decides them, so that an arm that
comes later, or in another process, goes on from the same bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from _common import read_json, write_json
from _fit import Fitted, Moments
from _rows import clean
from _settings import GROUPS_ONLY
from safetensors.torch import load_file, save_file
from torch import Tensor

from coga import CoGAConfig
from coga.models import CoGAGPT

__all__ = ["dense_twin", "kept", "load_start", "save_start", "start_folder"]

MOMENTS, SUMMARY = "moments.safetensors", "summary.json"
SUMMARISED = ("steps", "losses", "grad_norms", "seconds", "tokens", "peak_bytes", "diverged")


def dense_twin(config: CoGAConfig) -> CoGAConfig:
    """The model with `full` layers, whatever belongs to groups at its default; `mha` models are their own."""
    if any(config.layer(i).kind == "mha" for i in range(config.n_layer)):
        return config
    default = {field.name: field.default for field in dataclasses.fields(CoGAConfig)}
    same = {name: default[name] for name in GROUPS_ONLY}
    return config.replace(**same, layers="full", window=max(1, config.band))


def start_folder(parent: Path, twin: CoGAConfig, **rest: Any) -> Path:
    """Where the start of this twin is kept; `rest`: what else decides it (seed, text, steps ...)."""
    text = twin.to_json() + json.dumps(clean(rest), sort_keys=True)
    return parent / hashlib.sha256(text.encode()).hexdigest()[:12]


def kept(folder: Path) -> bool:
    """Whether the folder holds a start."""
    return (folder / SUMMARY).is_file()


def save_start(folder: Path, model: CoGAGPT, fitted: Fitted) -> None:
    """Weights, moments and what was measured: the whole folder or nothing, whoever else is writing it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        fresh = Path(temporary) / "start"
        model.save_pretrained(fresh)
        moments = fitted.moments.items()
        flat = {f"{kind} {name}": x.contiguous() for name, one in moments for kind, x in one.items()}
        save_file(flat, fresh / MOMENTS)
        write_json(fresh / SUMMARY, clean({name: getattr(fitted, name) for name in SUMMARISED}))
        if not kept(folder) and folder.exists():  # what is left of a start that was not whole
            folder.rename(Path(temporary) / "stale")
        try:
            fresh.rename(folder)
        except OSError:
            if not kept(folder):  # else another process was first
                raise


def load_start(folder: Path) -> tuple[CoGAGPT, Moments, Fitted]:
    """Model (on the CPU), moments by parameter, what was measured."""
    moments: dict[str, dict[str, Tensor]] = {}
    for key, x in load_file(folder / MOMENTS).items():
        kind, name = key.split(" ", 1)
        moments.setdefault(name, {})[kind] = x
    found = Fitted(**read_json(folder / SUMMARY))
    found.losses = [(step, math.nan if loss is None else loss) for step, loss in found.losses]
    found.grad_norms = [math.nan if norm is None else norm for norm in found.grad_norms]
    return CoGAGPT.from_pretrained(folder), moments, found
