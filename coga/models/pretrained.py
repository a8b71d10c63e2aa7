"""Saving and loading: config.json beside model.safetensors, no pickle, nothing half-written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from coga.config import CoGAConfig

if TYPE_CHECKING:
    from coga.models.gpt import CoGAGPT

__all__ = ["load_pretrained", "replace_file", "save_pretrained"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def replace_file(path: Path, write) -> None:
    """Call write(temporary path), then rename: readers see the old file or the new one, never half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_pretrained(model: CoGAGPT, folder: str | Path) -> None:
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder={str(folder)!r}: cannot be created ({error})") from error
    tensors = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
    try:
        replace_file(folder / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
        replace_file(folder / CONFIG, lambda path: path.write_text(model.config.to_json(), encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"folder={str(folder)!r}: cannot be written to ({error})") from error


def load_pretrained(cls: type[CoGAGPT], folder: str | Path) -> CoGAGPT:
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"folder={str(folder)!r}: holds no {name}")
    try:
        config = CoGAConfig.from_json((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # what is no UTF-8 is a ValueError too
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS}: not a readable safetensors file ({error})") from error
    model = cls(config)
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise ValueError(
            f"{folder / WEIGHTS}: does not fit config.json (missing {missing or 'nothing'}, "
            f"not known {extra or 'nothing'})"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{folder / WEIGHTS}: {name} has shape {tuple(tensor.shape)}, "
                f"config.json asks for {tuple(own[name].shape)}"
            )
    kinds = {x.dtype for x in tensors.values() if x.is_floating_point()}
    if len(kinds) == 1:
        model = model.to(kinds.pop())
    with torch.no_grad():
        model.load_state_dict(tensors)
    return model.eval()
