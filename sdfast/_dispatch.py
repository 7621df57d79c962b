"""Picks the backend of an operation, or says in one sentence per backend why not.

A backend is one of four names. ``cpu`` and ``cuda`` are native C++ and CUDA, ``triton`` serves every device Triton does
(and the CPU in its interpreter), ``reference`` is plain PyTorch and serves everything. Choice depends on the device and
on what is installed, never on values, so it is the same while compiling.
"""

import importlib.util
import os

import torch

from sdfast import _native, _warnings

BACKENDS = ("cpu", "cuda", "triton", "reference")
DEVICES = ("cpu", "cuda", "xpu")


def functorch_is_active() -> bool:
    """Whether a torch.func transform surrounds the call: native operations have no rules for them."""
    return torch._C._are_functorch_transforms_active()


def _find_reason(backend: str, device_type: str) -> str | None:
    if backend == "cpu":
        return _native.CPU.reason if device_type == "cpu" else f"serves CPU tensors, not {device_type}"
    if backend == "cuda":
        return _native.CUDA.reason if device_type == "cuda" else f"serves CUDA tensors, not {device_type}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton serves CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before importing sdfast"
    return None


# Found once, at import: compiled code reads these tables, and what is installed does not change under a process.
_REASONS = {(backend, device): _find_reason(backend, device) for backend in BACKENDS for device in DEVICES}
_AUTOMATIC = {
    device: next(
        backend
        for backend in (("cpu", "reference") if device == "cpu" else ("cuda", "triton", "reference"))
        if _REASONS[backend, device] is None
    )
    for device in DEVICES
}
_warned: set[str] = set()


def why_not(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot serve tensors on `device_type`, or ``None`` where it can."""
    if backend == "reference":
        return None
    if device_type not in DEVICES:
        return f"serves {', '.join(DEVICES)} tensors, not {device_type}"
    return _REASONS[backend, device_type]


def automatic(device_type: str) -> str:
    """The backend that ``backend=None`` takes for tensors on `device_type`."""
    return _AUTOMATIC.get(device_type, "reference")


def _warn_of_reference(device_type: str) -> None:
    if device_type in _warned or os.environ.get("SDFAST_NATIVE") == "0":
        return
    _warned.add(device_type)
    reasons = "; ".join(f"{name}: {why_not(name, device_type)}" for name in BACKENDS[:-1])
    _warnings.warn_caller(f"sdfast runs its slow plain PyTorch reference on {device_type} ({reasons})")


def choose(backend: str | None, device_type: str, unserved: tuple[str, ...] = ()) -> str:
    """The backend to run: `backend` if it can serve the call, or the best one where it is ``None``.

    Args:
        backend: What the caller asked for.
        device_type: Of the tensors.
        unserved: Backends for which the operation has no kernel.

    Returns:
        The backend's name.

    Raises:
        ValueError: `backend` is no backend's name.
        NotImplementedError: `backend` cannot serve this call; the message says why.
    """
    if backend is None:
        if torch._C._are_functorch_transforms_active():
            return "reference"
        chosen = _AUTOMATIC.get(device_type, "reference")
        if chosen in unserved:
            chosen = "reference" if why_not("triton", device_type) else "triton"
        if chosen == "reference" and not torch.compiler.is_compiling():
            _warn_of_reference(device_type)
        return chosen
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted None or one of {', '.join(BACKENDS)}")
    reason = "this operation has no such kernel" if backend in unserved else why_not(backend, device_type)
    if reason is None and backend != "reference" and functorch_is_active():
        reason = "it has no rule for torch.func transforms; leave backend=None to take the reference"
    if reason is not None:
        raise NotImplementedError(f"backend={backend!r}: {reason}")
    return backend
