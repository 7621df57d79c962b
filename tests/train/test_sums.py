"""What an epoch adds up, against sums of plain numbers."""

import pytest
import torch

from sdfast.ops.self_distillation import LossStats
from sdfast.train import sums
from sdfast.train.sums import EpochSums


def draw(kind, rows):
    """A batch's statistics, as `EpochSums` takes them and as (accuracy, α, agreement)."""
    state = torch.rand(5)
    alpha, _, accuracy, entropy, agreement = state.unbind()
    given = state if kind == "state" else LossStats(alpha, accuracy, entropy, agreement)
    return given, [float(accuracy), float(alpha), float(agreement)]


@pytest.mark.parametrize("kind", ["state", "stats"])
@pytest.mark.parametrize("masks", ["even", "uneven", "counts"])
@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("masked_rows", [2**20, 50])
def test_the_sums_of_an_epoch(kind, masks, clean, masked_rows, monkeypatch):
    monkeypatch.setattr(sums, "MASKED_ROWS", masked_rows)
    epoch, wanted = EpochSums(torch.device("cpu")), [0.0] * 7
    for _ in range(int(torch.randint(1, 150, ()))):
        rows = 12 if masks == "even" else int(torch.randint(1, 30, ()))
        kept = torch.rand(rows) < 0.5
        kept &= torch.rand(()) < 0.8  # some batches have no row that counts
        count = int(kept.sum())
        loss = torch.rand((), requires_grad=True)
        stats, means = draw(kind, rows)
        known = (torch.tensor(count // 2), torch.tensor(count)) if clean else None
        epoch.add(count if masks == "counts" else kept.reshape(-1, 3 if rows % 3 == 0 else 1), loss, stats, known)
        values = [1.0, loss.item(), *means]
        wanted = [total + count * value for total, value in zip(wanted, values, strict=False)] + [
            wanted[5] + clean * (count // 2), wanted[6] + clean * count,
        ]  # fmt: skip
    torch.testing.assert_close(epoch.total(), wanted, rtol=1e-12, atol=1e-9)
