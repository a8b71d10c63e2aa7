"""What the training scripts share: errors, device, run folders, memory, one-line facts about the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

__all__ = [
    "FINISHED",
    "OTHER_FILES",
    "RUN_FILES",
    "StrictParser",
    "choose_device",
    "environment",
    "fail",
    "fresh_folder",
    "holds_run",
    "machine_line",
    "make_folder",
    "names_of",
    "peak_memory",
    "precision",
    "read_json",
    "replace_with",
    "reset_peak_memory",
    "write_json",
    "write_text",
]

FINISHED = "report.json"  # written last: a run that has it is complete
RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint", "checkpoint.old", FINISHED, "sample.txt")
OTHER_FILES = ("rows.jsonl", "loss.png", "positions.png", "groups.png", "compare.png")  # rows, plots


class StrictParser(argparse.ArgumentParser):
    """Raises ValueError on arguments it cannot read, so that every error is one line; no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def fail(message: object, code: int = 2) -> int:
    """Print one line on stderr; returns the exit code."""
    line = " ".join(str(message).split())
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
    return code


def names_of(text: str, field: str, known: Collection[str]) -> list[str]:
    """Names separated by commas. ValueError: an unknown one, or one twice."""
    found = [name.strip() for name in text.split(",")]
    for name in found:
        if name not in known:
            raise ValueError(f"{field}={name!r}: must be one of {', '.join(known)}")
        if found.count(name) > 1:
            raise ValueError(f"{field}={text!r}: names {name} twice")
    return found


# --- device ------------------------------------------------------------------------------------------------


def choose_device(name: str, graph: bool = False) -> torch.device:
    """ "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1". ValueError on what is not there.

    graph  a CUDA graph is wanted, so a CPU will not do
    """
    device: torch.device | None = None
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        with suppress(RuntimeError):
            device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r}: must be auto, cpu, cuda or cuda:INDEX")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device={name!r}: this machine has {count} CUDA devices")
    elif graph:
        raise ValueError(f"graph={graph}: needs a CUDA device, got {device}")
    return device


def precision(device: torch.device) -> AbstractContextManager:
    """bfloat16 autocast on CUDA, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the settings."""
    where = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return {
        "device": where,
        "precision": "bfloat16 autocast" if device.type == "cuda" else "float32",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def machine_line(where: dict[str, Any]) -> str:
    """What `environment` found, as the first line of a run's output."""
    return (
        f"device  {where['device']}, {where['precision']}, torch {where['torch']}, Python {where['python']}"
    )


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak, where the system allows it: the next arm of a comparison has its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # where it is not allowed, peak_memory stays that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most allocated on the GPU, or the most resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- folders and files -------------------------------------------------------------------------------------


def holds_run(folder: Path, names: Iterable[str] = RUN_FILES) -> bool:
    """Whether a run left anything of these names here."""
    return any((folder / name).exists() for name in names)


def make_folder(folder: Path, name: str = "out") -> None:
    """Create a folder that can be written to, or raise ValueError and leave nothing behind."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    made: list[Path] = []
    try:
        for one in reversed(missing):
            one.mkdir()
            made.append(one)
        probe = folder / f".write-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        for one in reversed(made):
            one.rmdir()
        rule = f"must be a folder that can be written to ({error})"
        raise ValueError(f"{name}={str(folder)!r}: {rule}") from error


def fresh_folder(folder: Path, file: str) -> None:
    """`make_folder`, and ValueError where the file is there already: results are not written over."""
    if (folder / file).exists():
        raise ValueError(f"out={str(folder)!r}: already holds {file}; use another --out")
    make_folder(folder)


def replace_with(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name in the same folder, then rename."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    write(temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    replace_with(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """ValueError when the file is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
