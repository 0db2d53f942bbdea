"""Whether a tensor is served by a Triton kernel or by its plain PyTorch twin."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Return whether Triton can be imported (CPU builds of PyTorch come without it)."""
    return importlib.util.find_spec("triton") is not None


def uses_triton(x: Tensor, *sizes: int) -> bool:
    """Return whether the kernels serve x: 16-bit floats on CUDA, every one of sizes a power of two."""
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and is_half and has_triton() and all(size & (size - 1) == 0 for size in sizes)
