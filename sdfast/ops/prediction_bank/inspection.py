"""What a bank says of the labels: which are suspect, and how many."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sdfast import _checks, _dispatch

if TYPE_CHECKING:
    from sdfast.ops.prediction_bank.bank import PredictionBank

CHUNK_ENTRIES = 1 << 22  # of rows made dense at a time


class SuspectedLabels(NamedTuple):
    """The samples whose bank row disagrees most with their label, worst first.

    Attributes:
        indices: (n,) int64 samples.
        disagreement: (n,) max_{c≠y} t_c − t_y.
        predicted: (n,) int64, the class the bank believes in, other than the label.
    """

    indices: Tensor
    disagreement: Tensor
    predicted: Tensor


def checked_indices(bank: "PredictionBank", indices: Tensor) -> Tensor:
    """Indices of rows that exist: a negative one is an error, not a row counted from the end."""
    _checks.check_tensor("indices", indices)
    if indices.dtype not in _checks.INTEGRAL:
        raise TypeError(f"indices: got {_checks.dtype_name(indices)}, wanted an integer tensor of sample indices")
    indices = indices.long()
    bad = (indices < 0) | (indices >= bank.num_samples)
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or _dispatch.functorch_is_active():
        return torch.where(bad, bank.num_samples, indices)  # which the device refuses by itself
    if bad.any():
        raise IndexError(f"indices: got {int(indices[bad][0])}, wanted 0 <= index < {bank.num_samples}")
    return indices


def check_all_labels(bank: "PredictionBank", labels: Tensor) -> Tensor:
    """Labels of every sample as int64 on the bank's device."""
    _checks.check_tensor("labels", labels)
    if labels.dtype not in _checks.INTEGRAL:
        raise TypeError(f"labels: got {_checks.dtype_name(labels)}, wanted integer class indices")
    if tuple(labels.shape) != (bank.num_samples,):
        raise ValueError(f"labels: got shape {_checks.shape_text(labels)}, wanted ({bank.num_samples},), one a sample")
    labels = labels.to(bank.seen.device, torch.int64)
    row = _checks.first_row((labels < 0) | (labels >= bank.num_classes))
    if row is not None:
        raise IndexError(f"labels: row {row} is {int(labels[row])}, wanted 0 <= label < {bank.num_classes}")
    return labels


def _chunks(bank: "PredictionBank") -> Iterator[slice]:
    step = max(1, CHUNK_ENTRIES // bank.num_classes)
    for begin in range(0, bank.num_samples, step):
        yield slice(begin, min(begin + step, bank.num_samples))


@torch.no_grad()
def suspected_labels(bank: "PredictionBank", labels: Tensor, k: int) -> SuspectedLabels:
    """As `PredictionBank.suspected_labels` says."""
    labels = check_all_labels(bank, labels)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= bank.num_samples:
        raise ValueError(f"k: got {k!r}, wanted an integer from 1 to the {bank.num_samples} samples")
    if bank.num_classes == 1:
        raise ValueError("labels: a bank of one class can suspect none")
    scores, others = [], []
    for part in _chunks(bank):
        t = bank.probabilities(torch.arange(part.start, part.stop, device=labels.device))
        own = t.gather(1, labels[part, None])[:, 0]
        other = t.scatter(1, labels[part, None], -torch.inf).max(1)
        scores.append(other.values - own)
        others.append(other.indices)
    score = torch.cat(scores).masked_fill(bank.seen == 0, -torch.inf)
    order = score.sort(descending=True, stable=True).indices[: min(k, int((bank.seen > 0).sum()))]
    return SuspectedLabels(order, score[order], torch.cat(others)[order])


@torch.no_grad()
def noise_rate(bank: "PredictionBank", labels: Tensor) -> float:
    """As `PredictionBank.noise_rate` says."""
    labels = check_all_labels(bank, labels)
    wrong = seen = 0
    for part in _chunks(bank):
        t = bank.probabilities(torch.arange(part.start, part.stop, device=labels.device))
        known = bank.seen[part] > 0
        wrong += int((known & (t.argmax(1) != labels[part])).sum())
        seen += int(known.sum())
    return wrong / seen if seen else float("nan")
