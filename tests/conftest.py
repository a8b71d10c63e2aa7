"""Settings of every test: few threads, fixed seeds, `gpu` tests skipped where there is no CUDA device."""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(1)
# Read once, at the first product on a GPU: without it deterministic mode refuses cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
