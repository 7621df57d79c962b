"""Finds and loads the native libraries next to this file, and remembers why one did not load."""

import os
from pathlib import Path
from typing import NamedTuple

import torch


class NativeLibrary(NamedTuple):
    """A native library: its file name, and why it is not loaded (``None`` where it is)."""

    name: str
    reason: str | None

    @property
    def loaded(self) -> bool:
        """Whether its kernels are registered with torch."""
        return self.reason is None


def _load(name: str, unavailable: str | None = None) -> NativeLibrary:
    if unavailable is not None:
        return NativeLibrary(name, unavailable)
    if os.environ.get("SDFAST_NATIVE") == "0":
        return NativeLibrary(name, "SDFAST_NATIVE=0 is set")
    path = Path(__file__).parent / name
    if not path.exists():
        tool = "a C++ compiler" if name == "_C_cpu.so" else "nvcc"
        return NativeLibrary(name, f"{name} is not installed: build it with {tool}, see 'Install' in the README")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return NativeLibrary(name, f"{name} cannot be loaded: {error.__cause__ or error}")
    return NativeLibrary(name, None)


def _load_cuda() -> NativeLibrary:
    if torch.version.cuda is None:
        return _load("_C_cuda.so", "this torch is built without CUDA")
    # Never across CUDA majors: a library built against another one fails at its first launch, not at load.
    return _load(f"_C_cu{torch.version.cuda.split('.')[0]}.so")


CPU = _load("_C_cpu.so")
CUDA = _load_cuda()
