"""Picks the backend of an operation, or says in one sentence per backend why not.

A backend is one of four names. ``cpu`` and ``cuda`` are native C++ and CUDA, ``triton`` serves every device Triton does
(and the CPU in its interpreter), ``reference`` is plain PyTorch and serves everything. Choice depends on the device and
on what is installed, never on values, so it is the same while compiling.
"""

import importlib.util
import os
import warnings
from functools import cache

import torch

from sdfast import _native

BACKENDS = ("cpu", "cuda", "triton", "reference")


def functorch_is_active() -> bool:
    """Whether a torch.func transform surrounds the call: native operations have no rules for them."""
    return torch._C._are_functorch_transforms_active()


@cache
def why_not(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot serve tensors on `device_type`, or ``None`` where it can."""
    if backend == "cpu":
        return _native.CPU.reason if device_type == "cpu" else f"serves CPU tensors, not {device_type}"
    if backend == "cuda":
        return _native.CUDA.reason if device_type == "cuda" else f"serves CUDA tensors, not {device_type}"
    if backend == "triton":
        return _why_not_triton(device_type)
    return None


def _why_not_triton(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton serves CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before triton is imported"
    if device_type not in ("cpu", "cuda", "xpu"):
        return f"serves CUDA, ROCm and XPU tensors, not {device_type}"
    return None


@cache
def automatic(device_type: str) -> str:
    """The backend that ``backend=None`` takes for tensors on `device_type`."""
    order = ("cpu", "reference") if device_type == "cpu" else ("cuda", "triton", "reference")
    chosen = next(backend for backend in order if why_not(backend, device_type) is None)
    if chosen == "reference" and os.environ.get("SDFAST_NATIVE") != "0":
        reasons = "; ".join(f"{backend}: {why_not(backend, device_type)}" for backend in order[:-1])
        warnings.warn(f"sdfast runs its plain PyTorch reference on {device_type} ({reasons})", stacklevel=4)
    return chosen


def choose(backend: str | None, device_type: str) -> str:
    """The backend to run: `backend` if it can serve the call, or the best one where it is ``None``.

    Raises:
        ValueError: `backend` is no backend's name.
        NotImplementedError: `backend` cannot serve this call; the message says why.
    """
    if backend is None:
        return "reference" if functorch_is_active() else automatic(device_type)
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted None or one of {', '.join(BACKENDS)}")
    reason = why_not(backend, device_type)
    if reason is None and backend != "reference" and functorch_is_active():
        reason = "it has no rule for torch.func transforms; leave backend=None to take the reference"
    if reason is not None:
        raise NotImplementedError(f"backend={backend!r}: {reason}")
    return backend
