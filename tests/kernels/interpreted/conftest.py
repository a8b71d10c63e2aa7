"""Every kernel that a check runs in the interpreter is watched for addresses outside of its tensors."""

from __future__ import annotations

import pytest
from addresses import addresses_checked


@pytest.fixture(autouse=True)
def _inside_of_the_tensors():
    with addresses_checked():
        yield
