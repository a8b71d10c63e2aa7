"""Whether a kernel in Triton's interpreter stays inside the tensors it is given, and writes a place once.

A read beyond a tensor gives whatever lies there, and of two values for one place a GPU keeps either: the
result is often right all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from torch import Tensor


def _extent(x: Tensor) -> tuple[int, int]:
    """Addresses of its first byte and of the one after its last. Of the view: its storage may go on."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride())) if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + span * x.element_size()


@contextmanager
def addresses_checked() -> Iterator[None]:
    """Where its mask is true a load or store lies in one of the tensors of its launch, and a store has no two
    values for one place."""
    from triton.runtime import interpreter

    extents: list[tuple[int, int]] = []
    run, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def launch(executor, *args, **kwargs):
        extents[:] = [_extent(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        return run(executor, *args, **kwargs)

    def check(name, ptrs, mask):
        address = ptrs.data[mask.data.astype(bool)]  # masks are numbers where a scalar took part in one
        if address.size:
            begin, last = int(address.min()), int(address.max())
            end = last + ptrs.get_element_ty().primitive_bitwidth // 8
            inside = any(low <= begin and end <= high for low, high in extents)
            assert inside, f"{name} of bytes {begin} to {end}: in none of the tensors {extents}"
        return address

    def checked_load(self, ptrs, mask, *more, **named):
        check("load", ptrs, mask)
        return load(self, ptrs, mask, *more, **named)

    def checked_store(self, ptrs, value, mask, *more, **named):
        address = check("store", ptrs, mask)
        assert len(np.unique(address)) == address.size, "store: two values for one place"
        return store(self, ptrs, value, mask, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        yield
