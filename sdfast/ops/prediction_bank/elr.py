"""`elr_loss`: cross entropy with early-learning regularisation on a prediction bank."""

from torch import Tensor

from sdfast import _checks, _dispatch
from sdfast.ops.prediction_bank.bank import BankRows, check_rows
from sdfast.ops.prediction_bank.op import prediction_bank_loss
from sdfast.ops.self_distillation import arguments
from sdfast.ops.self_distillation.description import (
    LABEL_FUNCTIONS,
    LOSSES,
    MIXINGS,
    REDUCTIONS,
    packed_codes,
    packed_numbers,
)


def elr_loss(
    logits: Tensor,
    labels: Tensor,
    rows: BankRows,
    *,
    strength: float = 7.0,
    clamp: float = 1e-4,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Early-learning regularisation: cross entropy that is held to what the model believed before it memorised.

    Equals, with p = softmax(logits) clamped to [clamp, 1 − clamp] in the second term, and t the bank's row::

        F.cross_entropy(logits, labels) + strength * log(1 − ⟨t, p⟩)

    Its gradient in the logits is p − y + strength · p ⊙ (⟨t, p⟩ − t) / (1 − ⟨t, p⟩), without the terms of t where p is
    cut off. The second term has no lower bound but log(clamp): a falling loss says little. What goes into the bank is
    p, cut off and normalised as the original does. Of a sample not seen yet t is 0, which leaves plain cross entropy.

    The defaults are the paper's values for CIFAR-100 (strength 7, momentum 0.9) on a bank that is read before it is
    written and bias corrected. The authors' code is reached by a bank of ``momentum=0.7, order="write_then_read",
    bias_correction=False`` and ``strength=3.0``, their values for CIFAR-10.

    Args:
        logits: (..., C) of float32, float64, bfloat16 or float16, classes last.
        labels: (...) class indices, or (..., C) probabilities.
        rows: ``bank.rows(indices)`` of a `sdfast.PredictionBank`.
        strength: λ, non-negative; 0 is cross entropy that fills the bank.
        clamp: In [0, 0.5): where p is cut off for the second term and the bank; 0 never does.
        ignore_index: Rows with this index label count for nothing, in the bank too.
        label_smoothing: Of the labels, in the cross entropy.
        class_weight: (C,), in the cross entropy.
        row_weight: (...), a factor on each row's loss that changes no denominator.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in `sdfast.self_distillation_loss`.
        backend: ``None`` for the best one available, or ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"``.

    Returns:
        The loss, float64 for float64 logits and float32 otherwise.

    Raises:
        TypeError: A tensor has a dtype that cannot be used, or is no tensor; `rows` is no handle of a bank.
        ValueError: Shapes, devices or options do not fit; the message names the argument.
        IndexError: A label or an index on the CPU is out of range. (On a GPU its row becomes NaN.)
        NotImplementedError: The backend asked for cannot serve the call, or a torch.func transform surrounds it.

    Reference:
        Liu, Niles-Weed, Razavian, Fernandez-Granda 2020, "Early-Learning Regularization Prevents Memorization of Noisy
        Labels", equation 6.
    """
    flat = logits
    if not _checks.indices_beside_rows(logits, labels):
        _checks.check_logits(logits)
        labels = _checks.check_labels(logits, labels, regression=False)
        flat = logits.reshape(-1, logits.shape[-1])
    arguments.check_options(
        "cross_entropy", reduction, ignore_index, label_smoothing, class_weight is not None, labels.dim() == 2
    )
    check_rows("rows", rows, logits)
    if not _checks.is_number(strength) or not 0 <= strength <= _checks.LARGEST:
        raise ValueError(f"strength: got {strength!r}, wanted a finite number >= 0")
    if not _checks.is_number(clamp) or not 0 <= clamp < 0.5:
        raise ValueError(f"clamp: got {clamp!r}, wanted a number in [0, 0.5)")
    if class_weight is not None:
        class_weight = _checks.check_weight("class_weight", class_weight, logits.shape[-1:], "(one a class)", logits)
    if row_weight is not None:
        row_weight = _checks.check_weight("row_weight", row_weight, logits.shape[:-1], "(one a row)", logits)
        row_weight = row_weight.reshape(-1)
    codes = packed_codes(
        LABEL_FUNCTIONS["hardmax"], LOSSES["cross_entropy"], REDUCTIONS[reduction], MIXINGS["arithmetic"]
    )
    loss = (1.0, codes, ignore_index, packed_numbers(1.0, label_smoothing, 1.0, 0.0))
    chosen = _dispatch.choose(backend, logits.device.type, rows.without_kernel(backend))
    if chosen == "reference":
        arguments.check_values(labels, None, flat, "cross_entropy", ignore_index)
    value, _ = prediction_bank_loss(chosen, flat, labels, None, rows, class_weight, row_weight, loss, strength, clamp)
    return value.reshape(logits.shape[:-1]) if reduction == "none" and logits.dim() != 2 else value
