"""Memory that kernels work in, kept by each thread between calls on the CPU.

Page faults of fresh memory cost as much as the products that are to be computed in it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_KEPT_BYTES = 2**24
_threads = threading.local()


def workspace(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``size`` uninitialised numbers; on the CPU up to 16 MiB are the thread's own, so nothing may outlive the call."""
    if device.type != "cpu" or size * dtype.itemsize > _KEPT_BYTES:
        return torch.empty(size, dtype=dtype, device=device)
    if getattr(_threads, "memory", None) is None:
        _threads.memory = torch.empty(_KEPT_BYTES, dtype=torch.uint8)
    return _threads.memory[: size * dtype.itemsize].view(dtype)
