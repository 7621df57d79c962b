"""What a recorded run must name: device, versions, commit; and the rates that its figures are held against."""

import datetime
import platform
import subprocess
import time

import torch

import sdfast


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
    """Bytes a second that a large copy moves, read and written bytes both counted: the median of nine."""
    source = torch.ones(megabytes << 18)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / sorted(seconds)[4]


def gemm_rate(size: int = 2048) -> float:
    """FLOPs a second of a large float32 matrix product: the median of nine."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(seconds)[4]


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
