"""What every test runs under: one thread of linear algebra, and denormal numbers as Python knows them."""

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch or numpy: the tensors are tiny
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # before anything imports Ray, which reads it once


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none, before its fixtures: `-m slow` selects such tests too."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(autouse=True)
def _keep_denormal_numbers() -> Iterator[None]:
    """Undo what a Dist on the CPU does to the whole process, so that no test depends on which ran before it."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
