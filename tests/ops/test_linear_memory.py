"""What both linear losses hold at a time: no rows × classes, whatever the rows."""

import gc

import pytest
import torch
from helpers import backends, interpreted
from linear_cases import FORMS, draw, loss_and_gradients

from benchmarks.harness import peak_bytes
from sdfast.ops import linear_chunks

BACKENDS = backends(without=("cuda",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_does_not_grow_with_the_rows(backend, form, reduction, dtype):
    """Beyond the hidden states' own gradient and a few numbers a row, 4,096 and 16,384 rows take the same."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    classes, width = 2000, 4
    if interpreted(backend):
        pytest.skip("Triton's interpreter makes copies of its own")
    peaks = []
    for rows in (4096, 16384):
        *tensors, labels = draw(rows, width, classes, dtype, bias=False)
        upstream = torch.ones(rows) if reduction == "none" else None

        def run(tensors=tensors, labels=labels, upstream=upstream):
            loss_and_gradients(form, *tensors, labels, upstream, reduction=reduction, backend=backend)

        run()
        own = rows * width * tensors[0].element_size()
        gc.collect()
        peaks.append(peak_bytes(run) - own)
    assert peaks[1] < 16384 * classes * tensors[0].element_size() / 2
    per_row = 200  # bytes: a teacher's hidden states, row factors, losses, labels' masks
    assert peaks[1] < peaks[0] + per_row * (16384 - 4096)


@pytest.mark.parametrize("workspace", [1 << 16, 1 << 20, 64 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_the_workspace_is_kept(form, dtype, workspace):
    torch.utils.deterministic.fill_uninitialized_memory = False
    rows, classes, width = 3000, 1000, 4
    *tensors, labels = draw(rows, width, classes, dtype, bias=False)

    def run():
        loss_and_gradients(form, *tensors, labels, workspace=workspace)

    run()
    gradients = rows * width * 4 + classes * width * 6
    gc.collect()
    assert peak_bytes(run) <= workspace + gradients + 200 * rows + (64 << 10)


def test_plans():
    """Chunks as large as the workspace allows; a CPU's stop where its matrix product has enough."""

    def plan(classes, dtype=torch.float32, device="cuda", buffers=1, chunk_rows=None, workspace=512 << 20):
        return linear_chunks.plan(classes, 4096, dtype, device, buffers, chunk_rows, workspace)

    for classes in (32000, 50257, 65536):
        assert plan(classes).chunk >= 2048
    assert plan(128256).chunk == (512 << 20) // (4 * 128256)
    assert plan(32000, buffers=2).chunk >= 2048
    assert plan(32000, torch.bfloat16).chunk == (512 << 20) // ((4 + 2) * 32000)
    assert plan(151936, torch.bfloat16, "cpu").chunk == 512
    assert plan(1000, chunk_rows=77).chunk == 77
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for device in ("cpu", "cuda"):
            for classes in (10, 1000, 151936):
                for buffers in (1, 2):
                    with pytest.raises(ValueError, match=r"one row of \d+ classes needs (\d+) bytes") as raised:
                        plan(classes, dtype, device, buffers, workspace=classes)
                    needed = int(str(raised.value).split()[-2])
                    assert plan(classes, dtype, device, buffers, workspace=needed).chunk == 1
                    with pytest.raises(ValueError, match="one row"):
                        plan(classes, dtype, device, buffers, workspace=needed - 1)
