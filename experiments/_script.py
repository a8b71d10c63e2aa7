"""What recall.py, convert.py and sanity.py share: arguments, one-line errors, a folder of rows.

A folder belongs to one script with one set of settings, kept in its config.json. Nothing is written before
all checks have passed; a folder that holds anything of the same names is refused unless it is the same run
(`--resume`), and then what its rows already say is not computed again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from _common import (
    StrictParser,
    environment,
    fail,
    holds_run,
    machine_line,
    make_folder,
    read_json,
    write_json,
)
from _rows import ROWS, clean, read_rows
from _settings import override
from torch import Tensor

from coga.data import Corpus, batches
from coga.models import CoGAGPT, fit_groups
from coga.models.prototypes import fit_prototypes

__all__ = [
    "add_speed",
    "add_model_arguments",
    "at_least",
    "file_hash",
    "load_model",
    "model_changes",
    "model_folder",
    "open_folder",
    "parser",
    "positive",
    "prototype_text",
    "read_as",
    "run_script",
    "share_of_peak",
    "show",
]

PROTOTYPE_TOKENS = 2**16  # weights of heads from a single context of 16K tokens may be those of an odd text


def parser(description: str, out: str) -> argparse.ArgumentParser:
    """With what every script has."""
    made = StrictParser(description=description)
    made.add_argument("--seed", type=int, default=0, help="of weights, noise and batches (0)")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:INDEX")
    made.add_argument(
        "--out", type=Path, default=Path(out), metavar="DIR", help=f"folder of the rows ({out})"
    )
    made.add_argument("--resume", action="store_true", help="go on with the rows in the folder")
    return made


def add_model_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--preset", default="tiny", help="tiny, small, gpt2 (tiny)")
    made.add_argument("--set", type=override, action="append", default=[], metavar="FIELD=VALUE",
                      help="a field of CoGAConfig")  # fmt: skip


def add_speed(made: argparse.ArgumentParser) -> None:
    """For scripts that train with `_fit.fit`."""
    made.add_argument(
        "--compile", action="store_true", help="compile the blocks for training (torch.compile)"
    )
    made.add_argument(
        "--graph", action="store_true", help="record the training step as a CUDA graph (GPU only)"
    )


def model_changes(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Fields of the configuration that were asked for: --set, and options of these names."""
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return {**given, **dict(args.set)}


def at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """ValueError on an option below `least`."""
    for name in names:
        value = getattr(args, name)
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")


def positive(args: argparse.Namespace, *names: str) -> None:
    """ValueError on an option that is not a finite number above 0."""
    for name in names:
        value = getattr(args, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value}: must be a finite number above 0")


def share_of_peak(args: argparse.Namespace, name: str) -> None:
    """ValueError on a last learning rate, over its peak, that is not between 0 and 1."""
    value = getattr(args, name)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}: must be a share of the peak, between 0 and 1")


# --- checkpoints -------------------------------------------------------------------------------------------


def model_folder(path: Path) -> Path:
    """The folder that holds the model: `path`, or its `checkpoint`. ValueError where there is none."""
    if not path.is_dir():
        state = "is not a folder" if path.exists() else "does not exist"
        raise ValueError(f"checkpoint={str(path)!r}: {state}")
    for folder in (path, path / "checkpoint"):
        if (folder / "model.safetensors").is_file():
            return folder
    raise ValueError(f"checkpoint={str(path)!r}: holds no model.safetensors, nor does its folder checkpoint")


def load_model(path: Path) -> CoGAGPT:
    return CoGAGPT.from_pretrained(model_folder(path))


def prototype_text(corpus: Corpus, n: int, seed: int) -> Tensor:
    """Contexts of the training text, (B, n), for `read_as` to find prototypes in."""
    return batches(corpus, n, max(1, PROTOTYPE_TOKENS // n), seed, 0)[0]


def read_as(
    model: CoGAGPT, layers: str, far_bias: float, text_BT: Tensor | None = None, **changes: Any
) -> CoGAGPT:
    """A copy under another pattern, group summaries with this bias; what is fresh is what groups add.

    text_BT  where learned groupings find their prototypes (k-means), and selections their heads; None, or too
             short for it: random ones, and all heads alike
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        other = model.with_layers(layers, **changes)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("far_bias_H"):
                parameter.fill_(far_bias)
    windows = [layer.window for layer in map(other.config.layer, range(other.config.n_layer)) if layer.groups]
    if text_BT is not None and windows and text_BT.shape[1] >= max(windows):
        text_BT = text_BT.to(other.embedding.weight.device)
        fit = fit_groups if text_BT.shape[1] > 2 * max(windows) else fit_prototypes
        fit(other, text_BT, other.config.seed)
    return other


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# --- the folder --------------------------------------------------------------------------------------------


def show(script: str, settings: dict[str, Any], device: torch.device, out: Path) -> None:
    """The configuration, on stdout."""
    print(machine_line(environment(device)))
    print(f"config  {script} {json.dumps(settings)}")
    print(f"out     {out}", flush=True)


def open_folder(
    folder: Path,
    script: str,
    settings: dict[str, Any],
    resume: bool,
    outputs: Iterable[str] = (),
    later: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Claim the folder; the rows it already holds. ValueError, with nothing written, where it is not free.

    outputs  further names the script writes there; on a first run none of them may exist
    later    settings that older runs do not name, and what they were there
    """
    content = clean({"script": script, "settings": settings})
    config = folder / "config.json"
    taken = [name for name in (ROWS, "config.json", *outputs) if (folder / name).exists()]
    rows: list[dict[str, Any]] = []
    if resume and config.exists():
        found = read_json(config)
        if not isinstance(found, dict) or found.get("script") != script:
            raise ValueError(f"out={str(folder)!r}: its config.json is not one of {script}")
        theirs = found.get("settings")
        if isinstance(theirs, dict):
            theirs = {**(later or {}), **theirs}
        differ = [k for k, v in content["settings"].items() if (theirs or {}).get(k) != v]
        if differ or not isinstance(theirs, dict) or set(theirs) != set(content["settings"]):
            name = differ[0] if differ else "settings"
            raise ValueError(
                f"{name}={content['settings'].get(name)!r}: the run to resume has "
                f"{(theirs or {}).get(name)!r}; use its settings or another --out"
            )
        rows = read_rows(folder)
    elif taken or holds_run(folder):
        hint = "holds no config.json of this run" if resume else "use --resume or another --out"
        raise ValueError(f"out={str(folder)!r}: already holds {', '.join(taken) or 'a run'}; {hint}")
    make_folder(folder)
    if not config.exists():
        write_json(config, content)
    return rows


def run_script(body: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    """Exit code: 0 done, 1 a loss that is not finite, 2 bad input, 130 stopped by Ctrl-C."""
    try:
        body(argv)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    except FloatingPointError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        print("stopped; rows that were written stay, go on with --resume", file=sys.stderr)
        return 130
    return 0
