"""What a recorded run must name: device, versions, commit; and the rates that its figures are held against."""

import datetime
import os
import platform
import subprocess
import time

import torch

import sdfast
from benchmarks.harness import DEVICE
from sdfast._devices import processor_name


def device_name() -> str:
    """The device as a folder name, such as ``amd-epyc-2-cores``."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{processor_name()} {torch.get_num_threads()} cores"
    return "-".join(name.lower().replace("(r)", "").replace("@", "").split())


def copy_rate(megabytes: int = 512) -> float:
    """Bytes a second that a large copy moves, read and written bytes both counted."""
    source = torch.ones(megabytes << 18, device=DEVICE)
    target = torch.zeros_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source))


def gemm_rate(dtype: torch.dtype = torch.float32) -> float:
    """FLOPs a second of a large matrix product of random numbers."""
    size = 2048 if DEVICE.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: torch.mm(a, b))


def seconds(step) -> float:
    """The median of nine; on a GPU of ten steps each, so that waiting for it costs little."""
    steps = 10 if DEVICE.type == "cuda" else 1
    times = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / steps)
    return sorted(times)[4]


def environment(command: str) -> dict:
    """Everything beside the figures themselves."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sdfast": sdfast.__version__,
        "commit": os.environ.get("SDFAST_COMMIT") or _commit(),
        "copy_bytes_per_second": copy_rate(),
        "gemm_flops_per_second": gemm_rate(),
        **({"bfloat16_gemm_flops_per_second": gemm_rate(torch.bfloat16)} if DEVICE.type == "cuda" else {}),
    }


def _commit() -> str:
    """Of the working tree, where git knows it."""
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"
