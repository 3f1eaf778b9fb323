"""Kernels in C for the CPU, compiled on first use where there is a compiler.

The library is kept in the user's cache folder under a name that holds what it was made from. Without a compiler, or
with ``PENSTOCK_NATIVE=0`` in the environment, the PyTorch forms run instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

_log = logging.getLogger("penstock.ops")
_FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared",
          "-fPIC"]  # fmt: skip
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=256")  # GCC 12 takes narrower ones for processors newer than itself


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled ``name``.c beside this file, or ``None`` where it cannot be had."""
    if os.environ.get("PENSTOCK_NATIVE") == "0" or platform.system() != "Linux":
        return None
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None or gemm() is None:
        _log.debug("no C compiler or no BLAS: %s runs in PyTorch", name)
        return None
    source = Path(__file__).with_name(f"{name}.c")
    made_from = (
        source.read_bytes()
        + source.with_name("blas.h").read_bytes()
        + repr((compiler, _FLAGS, platform.processor(), _processor())).encode()
    )
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "penstock"
    built = folder / f"{name}-{hashlib.sha256(made_from).hexdigest()[:16]}.so"
    try:
        if not built.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                part = Path(scratch) / "library.so"
                subprocess.run(
                    [compiler, *_FLAGS, str(source), "-o", str(part), "-lm"], check=True, capture_output=True
                )
                part.replace(built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError) as error:
        _log.debug("%s could not be built (%s): it runs in PyTorch", name, error)
        return None


@cache
def gemm() -> int | None:
    """The address of PyTorch's own ``sgemm_``, or ``None`` if it has none."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(path)).sgemm_, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def can_run(name: str, x: torch.Tensor) -> bool:
    """Whether the kernel ``name`` is there for tensors like ``x``: on the CPU, float32 or (computed so) below."""
    return x.device.type == "cpu" and x.dtype != torch.float64 and _is_there(name)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_there(name: str) -> bool:
    return library(name) is not None


def _processor() -> str:
    """What ``-march=native`` depends on: a cache folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
