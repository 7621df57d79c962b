import os

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
