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


@triton.jit
def _rows_kernel(x_ptr, L, N: tl.constexpr):
    n, column = tl.arange(0, 2)[:, None], tl.arange(0, N)[None, :]
    tl.store(x_ptr + n * L + column, tl.zeros((2, N), tl.float32), mask=column < N)


@pytest.mark.parametrize("width", [4, 3])
def test_a_row_whose_padding_is_the_next_one_is_seen(width):
    """Zeros over zeros: nothing shows in the values."""
    x = torch.zeros(2 * 4)
    if width == 4:
        _rows_kernel[(1,)](x, width, N=4)
    else:
        with pytest.raises(InterpreterError, match="two values for one place"):
            _rows_kernel[(1,)](x, width, N=4)


@triton.jit
def _wide_kernel(x_ptr, y_ptr):
    tl.store(y_ptr.to(tl.pointer_type(tl.int64)), tl.load(x_ptr))


def test_an_element_that_only_begins_in_the_view_is_seen():
    with pytest.raises(InterpreterError, match="store of bytes"):
        _wide_kernel[(1,)](torch.ones(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)[:1])


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
