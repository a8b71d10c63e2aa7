"""Cross-entropy of a linear head without holding the logits of a whole long sequence.

At 32,768 tokens and a vocabulary of 50K, float32 logits take 6.6 GB. Where torch has a chunked
`torch.nn.functional.linear_cross_entropy` (2.13) that is used; elsewhere, and under autocast, rows are
taken in chunks here, each recomputed in the backward pass, so that the peak is one chunk of logits whatever
the length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

__all__ = ["IGNORE", "chunk_sum", "linear_cross_entropy"]

IGNORE = -100
LOGITS_AT_ONCE = 2**27  # 512 MiB of float32; fewer chunks add up the weight's gradient fewer times


def chunk_sum(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Sum of the losses of some rows: what is computed at once, and what may be compiled."""
    logits = functional.linear(x, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")


def _torch_has_it(x: Tensor, weight: Tensor) -> bool:
    return (
        hasattr(functional, "linear_cross_entropy")
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)  # it sums in the dtype of its inputs
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
    )


def _sum(x: Tensor, weight: Tensor, target: Tensor, chunk: Callable) -> Tensor:
    rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
    if x.shape[0] <= rows:
        return chunk(x, weight, target)
    rows = 2 ** (rows.bit_length() - 1)  # lengths are often powers of two: chunks of one shape compile once
    if _torch_has_it(x, weight):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return functional.linear_cross_entropy(
            x, weight, target, reduction="sum", ignore_index=IGNORE, options=options
        )
    total = x.new_zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        total = total + checkpoint(
            chunk, x[part], weight, target[part], use_reentrant=False, preserve_rng_state=False
        )
    return total


def linear_cross_entropy(
    x_BTD: Tensor, weight_VD: Tensor, target_BT: Tensor, chunk: Callable = chunk_sum
) -> Tensor:
    """Mean of -log softmax(W x)[target] over targets that are not -100; 0 when there are none.

    chunk  `chunk_sum`, or that compiled
    """
    target = target_BT.flatten()
    return _sum(x_BTD.flatten(0, -2), weight_VD, target, chunk) / (target != IGNORE).sum().clamp_min(1)
