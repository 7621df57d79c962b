import contextlib
import hashlib
import importlib
import importlib.util
import os
import random
import sys

import numpy as np
import pytest
import torch
from helpers import device_of

from sdfast import _dispatch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with which cuBLAS repeats its bits


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests that name no backend make their tensors; cpu or cuda")


@pytest.fixture(autouse=True)
def _fresh_seed_and_poison(request):
    """Every test draws its own inputs, and finds NaN in memory that nobody wrote; where its backend's device is."""
    seed = seed_of_test(request.node)
    request.node.add_report_section("setup", "seed", f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    torch.utils.deterministic.fill_uninitialized_memory = True
    device = device_of_test(request.node)
    torch.use_deterministic_algorithms(True, warn_only=device != "cpu")  # a few of torch's own have no such form there
    with contextlib.nullcontext() if device == "cpu" else torch.device(device):
        yield
    torch.use_deterministic_algorithms(False)


def seed_of_test(item):
    """Another one each time; with SDFAST_TEST_SEED set, a run's draws can be had again."""
    given = os.environ.get("SDFAST_TEST_SEED")
    drawn = os.urandom(4) if given is None else hashlib.sha256(f"{given} {item.nodeid}".encode()).digest()[:4]
    return int.from_bytes(drawn, "little")


def device_of_test(item):
    """The device of the backend that its parameters name, or of the command line."""
    backend = backend_of_test(item)
    return item.config.getoption("--device") if backend is None else device_of(backend)


def backend_of_test(item):
    return item.callspec.params.get("backend") if hasattr(item, "callspec") else None


def pytest_collection_modifyitems(items):
    """Tests of a GPU's backend are marked, and skipped where it cannot run."""
    for item in items:
        backend = backend_of_test(item)
        on_gpu = isinstance(backend, str) and device_of(backend) == "cuda"
        if on_gpu:
            item.add_marker(pytest.mark.cuda)
        if not item.get_closest_marker("cuda"):
            continue
        reason = None if torch.cuda.is_available() else "no NVIDIA GPU here"
        if reason is None and on_gpu:
            reason = _dispatch.why_not(backend, "cuda")
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def torchvision_datasets():
    """torchvision.datasets, whatever torch it was built for.

    A torchvision built for a CUDA torch cannot load its operators beside a CPU-only torch, and its import stops where
    it describes two of them. Reading files needs none, so the tests declare the two. The package never does.
    """
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        return importlib.import_module("torchvision.datasets")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            pytest.skip(f"torchvision does not load beside torch {torch.__version__}: {error}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    datasets = importlib.import_module("torchvision.datasets")
    datasets.operators_for_the_import = library  # which end with it
    return datasets
