"""Memory that kernels work in, kept by each thread between calls on the CPU.

Page faults of fresh memory cost as much as the products that are to be computed in it.
"""

from __future__ import annotations

import ctypes
import platform
import threading

import torch
from torch import Tensor

_KEPT_BYTES = 2**24
_threads = threading.local()
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def workspace(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``size`` uninitialised numbers; on the CPU up to 16 MiB are the thread's own, so nothing may outlive the call."""
    if device.type != "cpu" or size * dtype.itemsize > _KEPT_BYTES:
        return torch.empty(size, dtype=dtype, device=device)
    if getattr(_threads, "memory", None) is None:
        _threads.memory = torch.empty(_KEPT_BYTES, dtype=torch.uint8)
    return _threads.memory[: size * dtype.itemsize].view(dtype)


def keep_freed_memory() -> None:
    """Let this process keep what it frees, instead of handing it back and getting it again page by page.

    Large tensors that live for a step are otherwise fresh memory each time: a training step of wide layers on the CPU
    is a quarter slower for it. Peak memory grows a little, and does not fall again. Only where the C library is GNU's.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for option, value in ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, 2**31 - 1)):
            library.mallopt(option, value)
