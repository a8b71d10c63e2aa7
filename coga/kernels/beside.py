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
def beside(device: torch.device) -> Iterator[Callable[[], Callable[[], None]]]:
    """Launch what is inside on a companion of the current stream.

        with beside(device) as mark:
            a = ...
            a_ready = mark()
        ...
        a_ready()               # from here on, the current stream may read a

    The last mark must be waited for. Works inside CUDA graph capture; on other devices nothing happens.
    Memory: the companion starts by waiting for its stream, so what was allocated inside may be used and freed
    outside, after the wait, without `record_stream`: whoever takes the memory next, on the companion, waits
    for that use.
    """
    if device.type != "cuda":
        yield lambda: lambda: None
        return
    main = torch.cuda.current_stream(device)
    side = _side(device, main.cuda_stream)
    side.wait_stream(main)

    def mark() -> Callable[[], None]:
        event = side.record_event()
        return lambda: main.wait_event(event)

    with torch.cuda.stream(side):
        yield mark
