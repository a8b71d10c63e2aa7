"""The watch over addresses (`addresses.py`) sees what it should, run by `test_triton_select.py`."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _copy_kernel(x_ptr, y_ptr, read, written, N: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(x_ptr + n, mask=n < read, other=0.0)
    tl.store(y_ptr + n, x, mask=(n < written) & (tl.program_id(0) == 0))


@pytest.mark.parametrize(("read", "written", "word"), [(12, 12, None), (13, 12, "load"), (12, 13, "store")])
def test_one_element_beyond_the_view_is_seen(read, written, word):
    """Both views have memory of their own storages behind them."""
    x, y = torch.randn(1, 16)[:, :12], torch.zeros(16)[:12]
    if word is None:
        _copy_kernel[(1,)](x, y, read, written, N=16)
        assert torch.equal(x[0], y)
    else:
        with pytest.raises(InterpreterError, match=f"{word} of bytes"):
            _copy_kernel[(1,)](x, y, read, written, N=16)
