"""A second CUDA stream for kernels that can run beside others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

__all__ = ["beside"]


@lru_cache(maxsize=64)
def _side(device: torch.device, main: int) -> torch.cuda.Stream:
    """The companion of a stream. Each has its own: see the note on memory below."""
    return torch.cuda.Stream(device)


@contextmanager
def beside(device: torch.device) -> Iterator[Callable[[], None]]:
    """Launch what is inside on a companion of the current stream; the caller calls what it gets to join them.

    Works inside CUDA graph capture. On other devices nothing happens. Memory: the companion starts by waiting
    for its stream, so what was allocated inside may be used and freed outside after the join without
    `record_stream`: whoever takes the memory next, on the companion, waits for that use.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    main = torch.cuda.current_stream(device)
    side = _side(device, main.cuda_stream)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)
