"""``sdfast doctor``: what is installed, what runs where, and what to install for more."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import sdfast
from sdfast import _dispatch, _native
from sdfast.hilbert import secular
from sdfast.ops.self_distillation import AdaptiveAlpha, self_distillation_loss

PACKAGES = ("numpy", "torch", "triton", "scikit-learn", "tqdm", "matplotlib", "cupy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Prints the findings; 0 where all that is installed works, 1 where something installed is broken."""
    findings = examine()
    print(json.dumps(findings) if arguments.json else describe(findings))
    return 1 if findings["broken"] else 0


def examine() -> dict[str, Any]:
    """Everything the command says, as plain values.

    Returns:
        ``versions``, ``cuda_of_torch``, ``devices``, ``libraries``, ``secular_solver`` (of `sdfast.hilbert`),
        ``operations`` (per device the automatic backend, and per backend ``"works"`` or why not), ``broken`` (what is
        installed and fails) and ``advice``.
    """
    libraries = [_library(library) for library in (_native.CPU, _native.CUDA)]
    solver = _secular_solver()
    devices = _devices()
    operations = {
        name: {device_type: _operation(check, device_type) for device_type in sorted({d["type"] for d in devices})}
        for name, check in OPERATIONS.items()
    }
    broken = [library["reason"] for library in (*libraries, solver) if library["broken"]]
    for name, by_device in operations.items():
        for device_type, found in by_device.items():
            broken += [
                f"{name} on {device_type}, backend {backend}: {result}"
                for backend, result in found["backends"].items()
                if result.startswith("fails")
            ]
    return {
        "versions": _versions(),
        "cuda_of_torch": torch.version.cuda,
        "devices": devices,
        "libraries": libraries,
        "secular_solver": solver,
        "operations": operations,
        "broken": broken,
        "advice": _advice(devices),
    }


def describe(findings: dict[str, Any]) -> str:
    """The findings as text for a terminal."""
    versions = [f"{name} {version or 'not installed'}" for name, version in findings["versions"].items()]
    lines = ["versions", *_indented(versions), "", "devices"]
    lines += _indented([f"{device['name']}: {device['description']}" for device in findings["devices"]])
    lines += ["", "native libraries"]
    lines += _indented([f"{library['name']}: {library['reason'] or 'loaded'}" for library in findings["libraries"]])
    solver = findings["secular_solver"]
    native = f"native, for this Python, {solver['python']}"
    without = f"NumPy: {solver['reason']}"
    lines += _indented([f"secular solver of sdfast.hilbert: {native if solver['loaded'] else without}"])
    for name, by_device in findings["operations"].items():
        for device_type, found in by_device.items():
            lines += ["", f"{name} on {device_type} takes: {found['automatic']}"]
            lines += _indented([f"{backend}: {result}" for backend, result in found["backends"].items()])
    if findings["advice"]:
        lines += ["", "for more", *_indented(findings["advice"])]
    lines += ["", *([f"BROKEN: {what}" for what in findings["broken"]] or ["all that is installed works"])]
    return "\n".join(lines)


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"sdfast": sdfast.__version__, "python": platform.python_version()}
    distributions = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        # The import name of cupy belongs to a distribution for each CUDA: cupy-cuda13x.
        candidates = [package, *distributions.get(package, [])]
        found[package] = next(filter(None, map(_version, candidates)), None)
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, str]]:
    threads = torch.get_num_threads()
    simd = torch.backends.cpu.get_cpu_capability()
    description = f"{platform.machine()}, {simd}, {threads} thread{'s' if threads != 1 else ''}"
    devices = [{"name": "cpu", "type": "cpu", "description": description}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        words = f"{found.name}, compute capability {found.major}.{found.minor}, {memory}"
        devices.append({"name": f"cuda:{index}", "type": "cuda", "description": words})
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type != "cuda":
        devices.append({"name": accelerator.type, "type": accelerator.type, "description": "accelerator of torch"})
    return devices


def _library(library: _native.NativeLibrary) -> dict[str, Any]:
    present = (Path(_native.__file__).parent / library.name).exists()
    switched_off = os.environ.get("SDFAST_NATIVE") == "0"
    broken = present and not library.loaded and not switched_off
    return {"name": library.name, "loaded": library.loaded, "reason": library.reason, "broken": broken}


def _secular_solver() -> dict[str, Any]:
    """The native secular solver is one Python's: whether it is this one's, and gives what the definition gives."""
    reason = secular.why_not_native()
    present = any((Path(_native.__file__).parent / f"_secular{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
    broken = present and reason is not None and os.environ.get("SDFAST_NATIVE") != "0"
    if reason is None:
        d, w = np.geomspace(1e-6, 1, 33), np.full((33, 2), 0.5)
        ours, wanted = (secular.solve_path(d, w, 4, backend=backend)[0] for backend in ("native", "array"))
        if ours.shape != wanted.shape or not np.allclose(ours, wanted, rtol=1e-9, atol=0):
            reason, broken = "sdfast._secular gives other multipliers than its NumPy definition", True
    python = sys.implementation.cache_tag
    return {"name": "_secular", "python": python, "loaded": reason is None, "reason": reason, "broken": broken}


def _operation(check: Callable[[str, str], str | None], device_type: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it takes the reference is said right here
        automatic = _dispatch.automatic(device_type)
    backends = {}
    for backend in _dispatch.BACKENDS:
        reason = _dispatch.why_not(backend, device_type)
        if reason is None:
            failure = check(backend, device_type)
            backends[backend] = "works" if failure is None else f"fails: {failure}"
        else:
            backends[backend] = f"no: {reason}"
    return {"automatic": automatic, "backends": backends}


def _check_self_distillation(backend: str, device_type: str) -> str | None:
    """Runs the loss and its gradient and compares them with the reference: what differs, or ``None``."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(33, 10, generator=generator).to(device_type)
    labels = torch.randint(10, (33,), generator=generator).to(device_type)
    results: list[Tensor] = []
    for name in ("reference", backend):
        leaf = logits.clone().requires_grad_()
        try:
            loss = cast(Tensor, self_distillation_loss(leaf, labels, AdaptiveAlpha(1.0), backend=name))
            results += torch.autograd.grad(loss, leaf)
        except (RuntimeError, ImportError, OSError) as error:
            return " ".join(str(error).split())[:300]
    error_size = float((results[1] - results[0]).abs().max())
    return None if error_size <= 1e-6 else f"its gradient is {error_size:.1e} off the reference's"


# Every operation, and how to try it on a backend and a device.
OPERATIONS: dict[str, Callable[[str, str], str | None]] = {"self_distillation_loss": _check_self_distillation}


def _advice(devices: list[dict[str, str]]) -> list[str]:
    advice = []
    if not _native.CPU.loaded and os.environ.get("SDFAST_NATIVE") == "0":
        advice.append("fast CPU kernels: unset SDFAST_NATIVE")
    elif not _native.CPU.loaded:
        advice.append("fast CPU kernels: install sdfast again where a C++17 compiler (g++) is on the PATH")
    if secular.why_not_native() is not None and os.environ.get("SDFAST_NATIVE") != "0":
        advice.append("fast rounds on kernels: install sdfast again by this Python, with pybind11 and a C++ compiler")
    on_cuda = any(device["type"] == "cuda" for device in devices)
    if torch.version.cuda is None and torch.version.hip is None:
        advice.append("NVIDIA GPUs: install a CUDA build of torch, then sdfast again")
    elif torch.version.cuda is not None and not on_cuda:
        advice.append("NVIDIA GPUs: torch has CUDA but sees no GPU; check the driver with nvidia-smi")
    if torch.version.cuda is not None and not _native.CUDA.loaded:
        major = torch.version.cuda.split(".")[0]
        advice.append(f"fast CUDA kernels: install sdfast again with nvcc of CUDA {major} on the PATH")
    if importlib.util.find_spec("triton") is None:
        advice.append("Triton kernels: pip install triton (CUDA builds of torch for Linux bring it)")
    if importlib.util.find_spec("matplotlib") is None:
        advice.append("pictures: pip install matplotlib")
    if importlib.util.find_spec("cupy") is None and on_cuda:
        advice.append("theory on the GPU: pip install 'sdfast[cuda]'")
    return advice
