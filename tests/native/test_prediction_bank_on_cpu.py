"""The CUDA kernels of the prediction bank, their own source run on the CPU: the tests of all backends, and their own.

As in test_cuda_on_cpu: this proves indexing, masks, barriers and formulas; not what nvcc makes of them, the
memory model or speed. The emulated operation stands in for the CPU's, so that whatever calls that runs the CUDA source.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import hypothesis
import pytest
import torch
from helpers import DTYPES
from ops import test_prediction_bank as common
from ops import test_prediction_bank_options as reshaped

from sdfast import PredictionBank, elr_loss, self_distillation_loss
from sdfast.ops.prediction_bank import op

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "prediction_bank_on_cpu.so"
    root = Path(torch.__file__).parent
    subprocess.run(
        [compiler, "-O1", "-std=c++17", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000",
         f"-I{root / 'include'}", str(HERE / "prediction_bank_on_cpu.cpp"), "-o", str(library), f"-L{root / 'lib'}",
         "-ltorch_cpu"],
        check=True,
    )  # fmt: skip
    operations = torch.library.Library("sdfast_emulated_bank", "DEF")
    operations.define(str(torch.ops.sdfast._prediction_bank.default._schema).removeprefix("sdfast::"))
    torch.ops.load_library(library)
    return operations, ctypes.CDLL(str(library)).sdfast_emulated_launches


@pytest.fixture
def emulated(built, monkeypatch):
    """The count of launches, with the emulated operation in the CPU's place."""
    operation = torch.ops.sdfast_emulated_bank._prediction_bank.default
    monkeypatch.setitem(op._EAGER, "cpu", operation._op)
    monkeypatch.setitem(op._EXPORTED, "cpu", operation)
    return built[1]


def test_any_call_matches_the_reference(emulated):
    before = emulated()

    @hypothesis.settings(max_examples=250, deadline=None, derandomize=False)
    @hypothesis.given(common.cases())
    def check(case):
        hypothesis.assume(case.bank.top_k is None)
        case.check("cpu")

    check()
    assert emulated() > before


# Every team size and its borders: 1-4 pieces a row, a part of a warp, a warp, four warps, a block; aligned and not.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 3, 8, 31, 64, 129, 1000, 1028, 4096, 9000])
def test_every_row_length(emulated, classes, dtype):
    for options in ({"label_fn": "softmax", "temperature": 0.5}, {"strength": 7.0}, {"reduction": "none"}):
        bank = common.fill(PredictionBank(9, classes, order="write_then_read"))
        rows = max(5, min(40, 6000 // classes))
        logits, labels = 3 * torch.randn(rows, classes, dtype=torch.float64), torch.randint(classes, (rows,))
        common.Case(logits, labels, torch.randint(9, (rows,)), bank, 0.4, options, dtype).check("cpu")


def test_what_all_backends_are_held_to(emulated):
    before = emulated()
    for momentum in (0.0, 0.6, 0.99):
        common.test_the_mean_is_bias_corrected("cpu", momentum)
    common.test_the_order_of_reading_and_writing("cpu")
    common.test_temperature_acts_on_the_logarithm("cpu")
    common.test_of_duplicates_all_read_and_the_last_writes("cpu")
    for bad in (torch.nan, torch.inf, -torch.inf):
        common.test_rows_that_are_not_finite_leave_the_bank_alone("cpu", bad)
    common.test_writing_needs_gradients_and_training_mode_and_a_fresh_handle("cpu")
    common.test_warm_up_counts_each_samples_own_predictions("cpu")
    common.test_previous_epoch_mode("cpu")
    common.test_elr_is_the_authors_code("cpu")
    common.test_elr_gradient_is_the_formula("cpu")
    common.test_nothing_kept_gives_zero_and_writes_nothing("cpu")
    common.test_leading_dimensions("cpu")
    for dtype in (torch.float32, torch.float64):
        common.test_denormal_probabilities_have_logarithms("cpu", dtype)
    assert emulated() - before > 100


@pytest.mark.parametrize("options", reshaped.OPTIONS.values(), ids=list(reshaped.OPTIONS))
@pytest.mark.parametrize("classes", [10, 300, 3000])
def test_reshaped_targets_and_row_weights(emulated, classes, options):
    before = emulated()
    for dtype, order in ((torch.float32, "read_then_write"), (torch.float64, "write_then_read")):
        reshaped.check("cpu", dtype, order, None, classes, options)
    assert emulated() > before


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(emulated, reduction):
    common.test_gradcheck("cpu", reduction)


@pytest.mark.parametrize(("rows", "classes"), [(60, 10), (60, 700), (40, 3000)])  # one block, teams of a warp, blocks
def test_duplicates_across_teams_and_blocks(emulated, rows, classes):
    for order in ("read_then_write", "write_then_read"):
        bank = common.fill(PredictionBank(9, classes, 0.7, torch.float64, order))
        logits, labels = torch.randn(rows, classes, dtype=torch.float64), torch.randint(classes, (rows,))
        common.Case(logits, labels, torch.randint(9, (rows,)), bank, 0.4, {"label_fn": "softmax"}).check("cpu")
        assert (bank._claims == 0).all()


@pytest.mark.parametrize("rows", [5, 9000])  # of one block, and of many
def test_indices_out_of_range_and_forbidden_duplicates_poison_their_rows(emulated, rows):
    given = torch.tensor([0, -1, 5, 6, 2**40])
    labels = torch.tensor([0, 1, 2, 3, -100]).repeat(rows // 5)
    logits, indices = torch.randn(rows, 5).requires_grad_(), given.repeat(rows // 5)
    poisoned = [False, True, False, True, False] * (rows // 5)
    for loss in (
        lambda held: self_distillation_loss(logits, labels, 0.5, source=held, reduction="none", backend="cpu"),
        lambda held: elr_loss(logits, labels, held, reduction="none", backend="cpu"),
    ):
        bank = PredictionBank(6, 5)
        value = loss(bank.rows(indices))
        assert value.isnan().tolist() == poisoned
        assert torch.autograd.grad(value.sum(), logits)[0].isnan().all(-1).tolist() == poisoned
        assert bank.seen.tolist() == [1, 0, 0, 0, 0, 1]
        unique = PredictionBank(6, 5, unique=True)
        value = loss(unique.rows(indices.clamp(0, 5)))
        last = {0: rows - 4, 5: rows - 2}
        assert [i for i in range(rows) if not value[i].isnan() and labels[i] != -100] == sorted(last.values())
        with torch.no_grad():
            loss(unique.rows(indices))
        assert (bank._claims == 0).all()
        assert (unique._claims == 0).all()


@pytest.mark.parametrize(("rows", "classes", "wanted"), [(128, 10, 1), (128, 100, 1), (700, 30, 2)])
def test_launches(emulated, rows, classes, wanted):
    bank = PredictionBank(1000, classes)
    logits, labels, indices = torch.randn(rows, classes), torch.randint(classes, (rows,)), torch.randperm(1000)[:rows]
    before = emulated()
    elr_loss(logits.requires_grad_(), labels, bank.rows(indices), backend="cpu")
    assert emulated() - before == wanted
