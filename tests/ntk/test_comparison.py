"""Guard (b) in one sum: no sample's wrong gradient hides behind another's."""

import pytest
import torch

from sdfast.ntk.comparison import loop_what_differs, shares_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", [None, 0, 1, 2])
@pytest.mark.parametrize("apart", [1.0, 1e3])
def test_a_wrong_sample_is_seen_wherever_its_entries_lie(dtype, wrong, apart):
    """Of an embedding each sample's gradient lies in rows of its own."""
    rows = torch.zeros(3, 30000, dtype=dtype)
    for sample, start in enumerate((0, 10000, 20000)):
        rows[sample, start : start + 5000] = torch.randn(5000, dtype=dtype) * apart**sample
    captured = rows.clone()
    if wrong is not None:
        captured[wrong] *= -1
    shares = shares_of({"weight": captured}, rows, torch.Generator().manual_seed(0))
    looped = {}
    loop_what_differs({"weight": shares @ rows}, {"weight": captured}, shares, looped)
    assert bool(looped) == (wrong is not None)
