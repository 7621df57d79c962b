"""Bad input: one line that names the argument, what came and what is wanted; and the bank left as it was."""

import copy

import pytest
import torch
from helpers import backends

import sdfast
from sdfast import PredictionBank, elr_loss, self_distillation_loss

ALL = ["reference", *backends(without=("cuda", "triton"))]  # those look at no value
LOGITS, LABELS, INDICES = torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), torch.tensor([3, 0, 2, 1])


def both(backend, indices=INDICES, labels=LABELS, bank=None):
    bank = PredictionBank(6, 5) if bank is None else bank
    logits = LOGITS.clone().requires_grad_()
    yield lambda: self_distillation_loss(logits, labels, 0.5, source=bank.rows(indices), backend=backend)
    yield lambda: elr_loss(logits, labels, bank.rows(indices), backend=backend)


@pytest.mark.parametrize("bad", [-1, 6, 2**40])
@pytest.mark.parametrize("backend", ALL)
def test_an_index_out_of_range(backend, bad):
    bank = PredictionBank(6, 5)
    before = copy.deepcopy(bank)
    indices = INDICES.clone()
    indices[2] = bad
    for call in both(backend, indices, bank=bank):
        with pytest.raises(IndexError, match=rf"^indices: row 2 is {bad}, wanted 0 <= index < 6$"):
            call()
    assert torch.equal(bank.seen, before.seen)
    ignored = LABELS.clone()
    ignored[2] = -100
    for call in both(backend, indices, ignored):
        assert call().isfinite()


@pytest.mark.parametrize("backend", ALL)
def test_an_index_twice_where_it_is_forbidden(backend):
    bank = PredictionBank(6, 5, unique=True)
    for call in both(backend, torch.tensor([3, 0, 2, 0]), bank=bank):
        with pytest.raises(ValueError, match=r"^indices: rows 1 and 3 are both 0, in a bank with unique=True$"):
            call()
    assert bank.seen.sum() == 0
    for call in both(backend, bank=bank):
        assert call().isfinite()


@pytest.mark.parametrize("backend", ALL)
def test_a_bad_label_leaves_the_bank_alone(backend):
    bank = PredictionBank(6, 5)
    for call in both(backend, labels=torch.tensor([0, 1, 5, 3]), bank=bank):
        with pytest.raises(IndexError, match="labels: row 2 is 5"):
            call()
    assert bank.seen.sum() == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: b.rows([1, 2]), TypeError, "indices: got list, wanted a torch.Tensor"),
        (lambda b: b.rows(torch.rand(4)), TypeError, "indices: got float32, wanted an integer tensor"),
        (lambda b: b.rows(torch.ones(4, dtype=torch.bool)), TypeError, "indices: got bool"),
        (lambda b: b.rows(INDICES.to("meta")), ValueError, "indices: is on meta, wanted cpu as the bank"),
        (lambda b: elr_loss(LOGITS, LABELS, INDICES), TypeError, "rows: got Tensor, wanted bank.rows(indices)"),
        (lambda b: elr_loss(LOGITS, LABELS, b.rows(INDICES[:3])), ValueError, "indices: got shape (3,), wanted (4,)"),
        (lambda b: elr_loss(LOGITS[:, :4], LABELS, b.rows(INDICES)), ValueError,
         "rows: the bank has 5 classes, the logits 4"),
        (lambda b: elr_loss(LOGITS, LABELS, b.rows(INDICES), strength=-1.0), ValueError, "strength: got -1.0"),
        (lambda b: elr_loss(LOGITS, LABELS, b.rows(INDICES), strength=float("nan")), ValueError, "strength: got nan"),
        (lambda b: elr_loss(LOGITS, LABELS, b.rows(INDICES), clamp=0.5), ValueError, "clamp: got 0.5"),
        (lambda b: elr_loss(LOGITS, LABELS, b.rows(INDICES), reduction="max"), ValueError, "reduction: got 'max'"),
        (lambda b: elr_loss(LOGITS, LABELS[:3], b.rows(INDICES)), ValueError, "labels: got int64 of shape (3,)"),
        (lambda b: self_distillation_loss(LOGITS, LABELS, 0.5, source=b), TypeError,
         "source: got PredictionBank, wanted a tensor, bank.rows(indices) of a sdfast.PredictionBank or a sdfast.Cl"),
        (lambda b: self_distillation_loss(LOGITS, LABELS, 0.5, source=b.rows(INDICES[None])), ValueError,
         "indices: got shape (1, 4), wanted (4,)"),
        (lambda b: self_distillation_loss(LOGITS, LOGITS, 0.5, source=b.rows(INDICES), loss="mse", label_fn="identity"),
         ValueError, "label_fn: got 'identity', but a bank holds probabilities"),
        (lambda b: self_distillation_loss(LOGITS, LOGITS, 0.5, source=b.rows(INDICES), loss="mse",
                                          label_fn=sdfast.ClipLabel(0.1)), ValueError, "label_fn: got ClipLabel"),
        (lambda b: PredictionBank(0, 5), ValueError, "num_samples: got 0, wanted at least 1"),
        (lambda b: PredictionBank(5.0, 5), TypeError, "num_samples: got float, wanted an integer"),
        (lambda b: PredictionBank(5, 5, 1.0), ValueError, "momentum: got 1.0, wanted a number in [0, 1)"),
        (lambda b: PredictionBank(5, 5, momentum="half"), ValueError, "momentum: got 'half'"),
        (lambda b: PredictionBank(5, 5, dtype=torch.float16), TypeError, "dtype: got torch.float16"),
        (lambda b: PredictionBank(5, 5, order="write"), ValueError, "order: got 'write', wanted one of"),
        (lambda b: PredictionBank(5, 5, warm_up=-1), ValueError, "warm_up: got -1, wanted at least 0"),
        (lambda b: PredictionBank(5, 5, top_k=5), ValueError, "top_k: got 5, wanted fewer than the 5 classes"),
        (lambda b: b.suspected_labels(LABELS, 2), ValueError, "labels: got shape (4,), wanted (6,), one a sample"),
        (lambda b: b.suspected_labels(torch.full((6,), 5), 2), IndexError, "labels: row 0 is 5, wanted 0 <= label < 5"),
        (lambda b: b.suspected_labels(torch.zeros(6).long(), 7), ValueError, "k: got 7"),
        (lambda b: b.noise_rate(torch.zeros(6)), TypeError, "labels: got float32"),
        (lambda b: b.suspected_labels(torch.zeros(6).long(), True), ValueError, "k: got True"),
        (lambda b: b.probabilities(torch.tensor([2, -1])), IndexError, "indices: got -1, wanted 0 <= index < 6"),
        (lambda b: b.rows(torch.tensor([6])).probabilities(), IndexError, "indices: got 6, wanted 0 <= index < 6"),
        (lambda b: b.probabilities(torch.rand(2)), TypeError, "indices: got float32, wanted an integer tensor"),
        (lambda b: PredictionBank(5, 5, bias_correction="no"), TypeError, "bias_correction: got 'no', wanted True or"),
        (lambda b: PredictionBank(5, 5, unique=1), TypeError, "unique: got 1, wanted True or False"),
        (lambda b: b.load_state_dict({**b.state_dict(), "_extra_state": {"momentum": 0.9}}), ValueError,
         "state: got {'momentum': 0.9}, wanted the settings"),
        (lambda b: b.start_from(LABELS), ValueError, "labels: got shape (4,)"),
        (lambda b: PredictionBank(5, 5, device="gpu"), ValueError, "device: got 'gpu', wanted a torch.device or its"),
        (lambda b: PredictionBank(5, 5, device=3.5), ValueError, "device: got 3.5, wanted a torch.device or its name"),
        (lambda b: b.load_state_dict(PredictionBank(7, 5).state_dict()), ValueError,
         "num_samples: the saved bank has 7, this one 6"),
        (lambda b: b.load_state_dict(PredictionBank(6, 4).state_dict()), ValueError,
         "num_classes: the saved bank has 4, this one 5"),
        (lambda b: PredictionBank(6, 5, top_k=2).load_state_dict(PredictionBank(6, 9, top_k=2).state_dict()),
         ValueError, "num_classes: the saved bank has 9, this one 5"),
        (lambda b: b.load_state_dict(PredictionBank(6, 5, dtype=torch.float64).state_dict()), ValueError,
         "dtype: the saved bank has float64, this one float32, which would round its rows"),
    ],
)  # fmt: skip
def test_a_sentence_that_names_the_argument(call, error, message):
    with pytest.raises(error) as caught:
        call(PredictionBank(6, 5))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_state_that_is_refused_changes_nothing():
    """Neither rows nor counts: torch would have copied what fits before it complained."""
    bank, other = PredictionBank(6, 5), PredictionBank(6, 5, 0.5)
    other.predictions.fill_(0.2)
    other.seen.fill_(3)
    with pytest.raises(ValueError, match=r"momentum: the saved bank has 0\.5, this one 0\.9"):
        bank.load_state_dict(other.state_dict())
    assert bank.seen.sum() == 0
    assert bank.predictions.sum() == 0


def test_a_wider_bank_takes_the_rows_of_a_narrower_one():
    narrow, wide = PredictionBank(6, 5, dtype=torch.bfloat16), PredictionBank(6, 5, dtype=torch.float64)
    narrow.predictions.copy_(torch.rand(6, 5))
    wide.load_state_dict(narrow.state_dict())
    assert torch.equal(wide.predictions, narrow.predictions.double())
    with pytest.raises(ValueError, match="dtype: the saved bank has float64, this one bfloat16, which would round"):
        narrow.load_state_dict(wide.state_dict())
