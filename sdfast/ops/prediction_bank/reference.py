"""The definition of a loss on a prediction bank in plain PyTorch. No speed tricks: every backend is judged by this."""

import torch
from torch import Tensor

from sdfast.ops.prediction_bank.description import BankDescription
from sdfast.ops.prediction_bank.storage import Storage, read_rows, sparse_rows
from sdfast.ops.self_distillation.description import REDUCTIONS, Description
from sdfast.ops.self_distillation.reference import batch_accuracy, self_distillation_reference


def prediction_bank_reference(
    logits: Tensor,  # (N, C)
    labels: Tensor,  # (N,) int64, or (N, C) probabilities
    alpha: Tensor | None,  # () or (N,)
    indices: Tensor,  # (N,) int64
    storage: Storage,
    class_weight: Tensor | None,  # (C,)
    row_weight: Tensor | None,  # (N,)
    description: Description,
    bank: BankDescription,
) -> tuple[Tensor, Tensor]:
    """Returns (loss, state) as the self-distillation reference does, and writes the batch's predictions to the bank."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    dtype, classes, samples = logits.dtype, logits.shape[-1], len(storage.seen)
    kept = labels != description.ignore_index if labels.dim() == 1 else torch.ones_like(indices, dtype=torch.bool)
    found = (indices >= 0) & (indices < samples)
    index = torch.where(kept & found, indices, 0)
    # The last row of the batch that has an index.
    place = torch.arange(1, len(indices) + 1, device=indices.device)
    ours = kept & found
    last = place.new_zeros(samples).scatter_reduce(0, index, torch.where(ours, place, 0), "amax")
    wrong = kept & ~found if not bank.unique else kept & (~found | (last[index] != place))

    observed = _observation(torch.where(kept[:, None], logits, 0).detach(), bank.clamp)  # (N, C)
    seen = storage.seen[index]
    old = read_rows(storage.predictions[index], storage.classes[index] if storage.sparse else None, classes, dtype)
    weight = observation_weight(seen, bank).to(dtype)[:, None]
    # A weight of 1 must not leave 0 * inf of what the row held.
    new = torch.where(weight == 1, observed, old + weight * (observed - old))
    finite = observed.isfinite().all(-1)

    usable = seen >= (bank.warm_up if bank.write_first else max(1, bank.warm_up))
    if bank.write_first:
        usable = usable & (finite | (seen > 0))
    believed = torch.where(finite[:, None], new, old) if bank.write_first else old
    believed = torch.where(usable[:, None], believed, 0)
    # Written before the loss: a checkpoint's recomputation stops at the last tensor that the loss saves.
    if bank.update:
        writes = ours & finite & ~wrong & (last[index] == place)
        if torch.compiler.is_compiling():
            writes = writes & torch.ops.sdfast._bank_is_written(storage.seen)
        _write(storage, index[writes], new[writes])

    a = _row_alphas(logits, labels, alpha, description)
    a = torch.where(wrong, torch.nan, torch.where(usable, a, 1.0))
    source = torch.where(usable[:, None], believed.log(), 0)
    loss = description._replace(adaptive=False, reduction=REDUCTIONS["none"])
    value, _ = self_distillation_reference(logits, labels, a, source, class_weight, row_weight, loss)
    value = value + _regulariser(logits, believed, kept, row_weight, bank)
    with torch.no_grad():
        _, state = self_distillation_reference(
            logits, labels, a, source, class_weight, row_weight,
            description._replace(adaptive=False, reduction=REDUCTIONS["mean"]),
        )  # fmt: skip
    if description.reduction != REDUCTIONS["none"]:
        mean = description.reduction == REDUCTIONS["mean"]
        value = value.sum() / (state[1] if mean else 1)
        state = state if mean else torch.cat([state[:1], state.new_ones(1), state[2:]])
    else:
        state = torch.cat([state[:1], state.new_ones(1), state[2:]])
    return value, state


def observation_weight(seen: Tensor, bank: BankDescription) -> Tensor:
    """What a sample's next prediction weighs against the mean of the `seen` before it, in float64."""
    if not bank.bias_correction:
        return torch.full_like(seen, 1 - bank.momentum, dtype=torch.float64)
    return (1 - bank.momentum) / (1 - bank.momentum ** (seen.double() + 1))


def clamped(probabilities: Tensor, clamp: float) -> Tensor:
    """Probabilities cut off as early-learning regularisation does."""
    return probabilities.clamp(clamp, 1 - clamp) if clamp else probabilities


def _observation(logits: Tensor, clamp: float) -> Tensor:
    """What a row of logits adds to the bank."""
    p = clamped(logits.softmax(-1), clamp)
    return p / p.sum(-1, keepdim=True) if clamp else p


def _row_alphas(logits: Tensor, labels: Tensor, alpha: Tensor | None, description: Description) -> Tensor:
    if description.adaptive:
        correct, count = batch_accuracy(logits.detach(), labels, description.ignore_index)
        alpha = 1 - (description.alpha_value * correct.to(logits.dtype) / count.clamp(min=1)).clamp(0, 1)
    elif alpha is None:
        alpha = logits.new_full((), description.alpha_value)
    return alpha.to(logits.dtype).expand(len(logits))


def _regulariser(
    logits: Tensor, believed: Tensor, kept: Tensor, row_weight: Tensor | None, bank: BankDescription
) -> Tensor | float:
    """The term strength · log(1 − ⟨t, p⟩) of each row, p clamped."""
    if bank.strength == 0:
        return 0.0
    p = clamped(torch.where(kept[:, None], logits, 0).softmax(-1), bank.clamp)
    rows = bank.strength * (1 - (believed.detach() * p).sum(-1)).log()
    return torch.where(kept, rows if row_weight is None else rows * row_weight, 0)


@torch.no_grad()
def _write(storage: Storage, index: Tensor, rows: Tensor) -> None:
    if storage.sparse:
        values, classes = sparse_rows(rows, storage.classes.shape[-1])
        storage.classes[index] = classes
        rows = values
    storage.predictions[index] = rows.to(storage.predictions.dtype)
    storage.seen[index] += 1
