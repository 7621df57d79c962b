"""What a recorded run must name: device, versions, commit; and the rates that its figures are held against."""

import datetime
import platform
import subprocess
import time

import torch

import sdfast
from benchmarks.harness import DEVICE


def device_name() -> str:
    """The device as a folder name, such as ``amd-epyc-2-cores``."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{_processor()} {torch.get_num_threads()} cores"
    return "-".join(name.lower().replace("(r)", "").replace("@", "").split())


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def copy_rate(megabytes: int = 512) -> float:
    """Bytes a second that a large copy moves, read and written bytes both counted."""
    source = torch.ones(megabytes << 18, device=DEVICE)
    target = torch.zeros_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source))


def gemm_rate() -> float:
    """FLOPs a second of a large float32 matrix product."""
    size = 2048 if DEVICE.type == "cpu" else 8192
    a, b = torch.randn(size, size, device=DEVICE), torch.randn(size, size, device=DEVICE)
    return 2 * size**3 / seconds(lambda: torch.mm(a, b))


def seconds(step) -> float:
    """The median of nine."""
    times = []
    for _ in range(9):
        start = time.perf_counter()
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[4]


def environment(command: str) -> dict:
    """Everything beside the figures themselves."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sdfast": sdfast.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "copy_bytes_per_second": copy_rate(),
        "gemm_flops_per_second": gemm_rate(),
    }
