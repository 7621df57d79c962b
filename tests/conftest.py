import importlib
import importlib.util
import os
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_seed_and_poison(request):
    """Every test draws its own inputs, and finds NaN in memory that nobody wrote."""
    seed = int.from_bytes(os.urandom(4), "little")
    request.node.add_report_section("setup", "seed", f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


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
