"""What every test runs under: one thread of linear algebra, and denormal numbers as Python knows them."""

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch or numpy: the tensors are tiny


@pytest.fixture(autouse=True)
def _keep_denormal_numbers() -> Iterator[None]:
    """Undo what a Dist on the CPU does to the whole process, so that no test depends on which ran before it."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
