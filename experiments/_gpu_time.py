"""Time on a GPU: medians of CUDA events, and calls recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["median_ms", "recorded", "roofs"]


def median_ms(run: Callable[[], Any], repeats: int = 15, warmup: int = 3) -> float:
    """Median time of a call in milliseconds."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def recorded(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """`run` as a CUDA graph, after calls that compile what has to be compiled."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def roofs(dtype: torch.dtype) -> tuple[float, float]:
    """What this GPU reaches: FLOP/s of a product of two 8192 x 8192 matrices, B/s of a copy of 1 GiB."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    product = 2 * 8192**3 / median_ms(lambda: a @ b)
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / median_ms(lambda: target.copy_(source))
    return 1e3 * product, 1e3 * copied
