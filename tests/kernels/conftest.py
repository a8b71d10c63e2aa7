"""Triton kernels on a CPU: `interpreted/check_*.py` run in a child Python with TRITON_INTERPRET=1.

The variable must be set before a kernel is defined and changes what `backend="triton"` means, so it never
reaches the process that runs the other tests.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def interpreted():
    """Runs `interpreted/<name>.py` in the Triton interpreter and fails with its output."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed here")

    def run(name: str) -> None:
        env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-x"]
        command.append(str(HERE / "interpreted" / f"{name}.py"))
        root = HERE.parents[1]
        done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, (
            f"{name} in the interpreter:\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
        )

    return run
