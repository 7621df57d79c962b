"""What to build: the native CPU library always, the CUDA one where nvcc and a CUDA torch of the same major are present.

The secular solver joins them where pybind11 is. All else stands in pyproject.toml. Environment:

    SDFAST_NATIVE=0       a pure-Python package
    SDFAST_CUDA=1 / 0     demand / forbid the CUDA library (default: built where it can be; no GPU is asked for)
    SDFAST_PYTHONS        other interpreters to build the secular solver for, by name or path: "python3.12 python3.13"
    SDFAST_CUDA_ARCHS     compute capabilities, default "8.0;9.0;10.0;12.0+PTX"
    MAX_JOBS              parallel compilers (default: limited by cores and free memory)
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10: one build serves every later torch
FLAGS = ["-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
CPU_FLAGS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-Wno-psabi"]
CPU_FLAGS += ["-fvisibility=hidden", "-g0"]


def import_torch():
    """The torch to build against; under build isolation, that of the environment being installed into."""
    try:
        import torch
    except ImportError:
        sys.path.append(sysconfig.get_path("purelib"))
        try:
            import torch
        except ImportError:
            sys.exit(
                "sdfast: torch >= 2.10 is not installed in this environment, and its headers are needed to build. "
                "Install torch first, or set SDFAST_NATIVE=0 for a pure-Python package."
            )
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        sys.exit(f"sdfast: torch {torch.__version__} is too old, wanted >= 2.10 (or SDFAST_NATIVE=0)")
    return torch


def why_no_cuda(torch) -> str | None:
    """Why the CUDA library cannot be built here, or None."""
    if os.environ.get("SDFAST_CUDA") == "0":
        return "SDFAST_CUDA=0"
    if not list(ROOT.glob("csrc/*/*.cu")):
        return "no CUDA sources"
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "nvcc is not on the PATH"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    version = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if version is None or version[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc {version and version[1]} and torch's CUDA {torch.version.cuda} differ in their major version"
    return None


SECULAR_FLAGS = [*FLAGS[:2], "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fvisibility=hidden", "-pthread"]


def build_secular_solver(python: str, folder: Path) -> None:
    """The torch-free solver of `sdfast.hilbert` for one interpreter, of which only the headers are needed."""
    try:
        import pybind11
    except ImportError:
        print("sdfast: no native secular solver: pybind11 is not installed")
        return
    ask = "import sysconfig; print(sysconfig.get_path('include'), sysconfig.get_config_var('EXT_SUFFIX'), sep='\\n')"
    try:
        said = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"sdfast: SDFAST_PYTHONS: {python} cannot be run: {error}")
    include, suffix = said.splitlines()
    if not (Path(include) / "Python.h").exists():
        sys.exit(f"sdfast: SDFAST_PYTHONS: {python} has no headers: there is no {include}/Python.h")
    target = folder / f"_secular{suffix}"
    command = [os.environ.get("CXX", "g++"), *SECULAR_FLAGS, "-fPIC", "-shared", "-s", f"-I{include}"]
    command += [f"-I{pybind11.get_include()}", str(ROOT / "csrc/secular/bindings.cpp"), "-o", str(target)]
    print(f"sdfast: building {target.name}")
    subprocess.run(command, check=True)


def limit_jobs(gigabytes_per_job: float) -> None:
    """MAX_JOBS from the cores and the free memory: compilers that run out of memory take the machine with them."""
    jobs = os.cpu_count() or 1
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
        jobs = max(1, min(jobs, int(0.7 * free / gigabytes_per_job)))
    os.environ.setdefault("MAX_JOBS", str(jobs))


def native_libraries() -> dict:
    """The arguments of `setup` that build the native libraries."""
    if not {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"} & set(sys.argv):
        return {}  # a source distribution or its metadata: needs no torch
    if os.environ.get("SDFAST_NATIVE") == "0":
        print("sdfast: pure Python (SDFAST_NATIVE=0)")
        return {}
    torch = import_torch()
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    def sources(pattern: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))

    headers = sources("csrc/*/*.h") + sources("csrc/*/*.cuh")
    common = {"depends": headers, "py_limited_api": True}
    extensions = [
        CppExtension(
            "sdfast._C_cpu", sources("csrc/*/cpu.cpp"), extra_compile_args=FLAGS + CPU_FLAGS, extra_link_args=["-s"],
            **common,
        )
    ]  # fmt: skip
    reason = why_no_cuda(torch)
    if reason and os.environ.get("SDFAST_CUDA") == "1":
        sys.exit(f"sdfast: SDFAST_CUDA=1, but {reason}")
    if reason is None:
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("SDFAST_CUDA_ARCHS", "8.0;9.0;10.0;12.0+PTX")
        arguments = {"cxx": [*FLAGS, "-DUSE_CUDA"], "nvcc": [*FLAGS, "-DUSE_CUDA", "--expt-relaxed-constexpr"]}
        name, files = f"sdfast._C_cu{torch.version.cuda.split('.')[0]}", sources("csrc/*/cuda.cu")
        extensions.append(CUDAExtension(name, files, extra_compile_args=arguments, extra_link_args=["-s"], **common))

    class BuildLibraries(BuildExtension.with_options(no_python_abi_suffix=True)):  # they fit every Python
        def run(self) -> None:
            """The libraries, then the solver for this Python and for the others that are named."""
            super().run()
            for python in (sys.executable, *os.environ.get("SDFAST_PYTHONS", "").split()):
                build_secular_solver(python, Path(self.get_ext_fullpath("sdfast._secular")).parent)

    limit_jobs(4.0 if reason is None else 1.0)
    print(f"sdfast: building {', '.join(e.name for e in extensions)} for torch >= 2.10; CUDA: {reason or 'yes'}")
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel}}


class AnyPythonWheel(bdist_wheel):
    """A wheel for every Python 3: torch loads its libraries. The secular solver alone is one Python's, by its name."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag of the platform alone."""
        return "py3", "none", super().get_tag()[2]


setup(**native_libraries())
