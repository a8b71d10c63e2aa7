"""Triton kernels on a CPU, in child Pythons: `interpreted/check_*.py` run in the interpreter, with
TRITON_INTERPRET=1, `compiled/check_*.py` compile for a GPU that is not there.

The variable must be set before a kernel is defined and changes what `backend="triton"` means, and the
compiler is told of a GPU: neither reaches the process that runs the other tests.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _in_a_child(path: Path, interpret: bool) -> None:
    """Fails with the output of the tests in `path`."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed here")
    env = os.environ | {
        "TRITON_INTERPRET": str(int(interpret)),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", str(path)]
    root = HERE.parents[1]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{path.name}:\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


@pytest.fixture
def interpreted():
    """Runs `interpreted/<name>.py` in the Triton interpreter."""
    return lambda name: _in_a_child(HERE / "interpreted" / f"{name}.py", True)


@pytest.fixture
def compiled():
    """Runs `compiled/<name>.py`, whose kernels are compiled and not launched."""
    return lambda name: _in_a_child(HERE / "compiled" / f"{name}.py", False)
