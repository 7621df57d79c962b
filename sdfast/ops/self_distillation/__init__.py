"""`self_distillation_loss`, the fused loss of learning from labels mixed with one's own predictions."""

from torch import Tensor

from sdfast import _checks, _dispatch
from sdfast.ops.prediction_bank import op as prediction_bank  # a module: the two folders import each other
from sdfast.ops.prediction_bank.bank import BankRows
from sdfast.ops.self_distillation import arguments
from sdfast.ops.self_distillation.arguments import AdaptiveAlpha, ClassPrior, ClipLabel, LossStats
from sdfast.ops.self_distillation.description import ADAPTIVE, AS_STATE, PLAIN, WANT_STATS, unpacked
from sdfast.ops.self_distillation.op import self_distillation
from sdfast.ops.self_distillation.reference import self_distillation_reference
from sdfast.ops.self_distillation.weights import (
    GeneralizedCrossEntropy,
    RowWeight,
    SmallLoss,
    row_weights,
)

__all__ = [
    "AdaptiveAlpha",
    "ClassPrior",
    "ClipLabel",
    "GeneralizedCrossEntropy",
    "LossStats",
    "SmallLoss",
    "self_distillation_loss",
]


def self_distillation_loss(
    logits: Tensor,
    labels: Tensor,
    alpha: float | Tensor | AdaptiveAlpha,
    *,
    source: Tensor | ClassPrior | BankRows | None = None,
    label_fn: str | ClipLabel = "hardmax",
    temperature: float = 1.0,
    mixing: str = "arithmetic",
    target_temperature: float = 1.0,
    loss: str = "cross_entropy",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    row_weight: RowWeight = None,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """Loss of the logits against labels mixed with the model's own predictions, in one fused pass.

    Equals, with y the one-hot or given label distribution and s the source (the logits themselves by default)::

        target = (alpha * y + (1 - alpha) * h(s)).detach()
        row_weight * loss(logits, target)

    where `loss` is, for a row of C classes with p = softmax(logits), w the class weights:

    ===============  =============================================
    cross_entropy    −Σ_c w_c ŷ_c log p_c
    kl               Σ_c w_c ŷ_c (log ŷ_c − log p_c)
    mse              1/C Σ_c (logits_c − ŷ_c)²
    brier            Σ_c (p_c − ŷ_c)²
    ===============  =============================================

    With α = 1 it is plain training: the same as `torch.nn.functional.cross_entropy` or ``mse_loss``.

    Args:
        logits: (..., C) of float32, float64, bfloat16 or float16, classes last. Halves accumulate in float32.
        labels: (...) class indices, or (..., C) probabilities, taken as they are, as in torch; for mse also any real
            (..., C) targets, or (...) floats where C = 1.
        alpha: Weight of the given label: a float, a 0-d or a (...) tensor, or `AdaptiveAlpha`. Within [0, 1], but any
            number with mse, where the theory of optimal mixing wants it. A tensor on a GPU is not checked.
        source: (..., C) logits to learn from instead of the model's own: a teacher's, or those of an earlier epoch.
            Always detached. Probabilities p are the logits ``p.log()`` of a softmax at temperature 1. Or
            ``bank.rows(indices)`` of a `sdfast.PredictionBank`: the running mean of past predictions, read and
            written. Or a `ClassPrior`.
        label_fn: h, what becomes of the source. ``"hardmax"``: one-hot at its largest entry (the first, on ties).
            ``"softmax"``: softmax(s / temperature). ``"identity"`` and `ClipLabel` go with mse only.
        temperature: Of the source's softmax; positive. The model's own softmax has none, and no T² factor is applied.
        mixing: ``"arithmetic"``, the mean above, or ``"geometric"``: y^α · h(s)^(1−α), normalised, the mean of the
            logits. That wants ``label_fn="softmax"`` and labels without zeros: `label_smoothing`, or probabilities.
        target_temperature: Sharpens the mixed target: ŷ^(1/T), normalised. In (0, 1]; not with mse.
        loss: ``"cross_entropy"``, ``"kl"``, ``"mse"`` or ``"brier"``.
        ignore_index: Rows with this index label count for nothing.
        label_smoothing: Of y, before mixing: (1 − s) y + s / C.
        class_weight: (C,), with cross_entropy and kl only.
        row_weight: (...), a constant factor on each row's loss that changes no denominator. Or a rule that makes it on
            the device: `GeneralizedCrossEntropy` (``"gce"`` for its default), p_label^q, or `SmallLoss`, which keeps a
            share of the rows. The loss returned is the weighted one: p_label^q · (−log p_label), say.
        reduction: ``"mean"`` over the rows kept (with `class_weight` and index labels divided by Σ class_weight[label],
            as in torch), ``"sum"``, or ``"none"`` for (...) losses. A batch with no row kept has loss 0.
        return_stats: Also return `LossStats`.
        backend: ``None`` for the best one available, or ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"``.

    Returns:
        The loss, float64 for float64 logits and float32 otherwise; with `return_stats` the pair (loss, stats).
        Differentiable once with respect to the logits. ``backend="reference"`` can be differentiated again, and is what
        runs under torch.func transforms.

    Raises:
        TypeError: A tensor has a dtype that cannot be used, or is no tensor.
        ValueError: Shapes, devices or options do not fit; the message names the argument.
        IndexError: A label or a bank's index on the CPU is out of range. (On a GPU its row becomes NaN.)
        NotImplementedError: The backend asked for cannot serve the call; the message says why.

    Note:
        With ``source=None``, softmax at temperature 1 and cross_entropy, kl or brier, and identity with mse, the own
        prediction has exactly zero gradient: p − αy − (1−α)p = α(p − y) is plain training at a smaller learning rate.
        Such a call warns once.

    Reference:
        Dong, Hou, Lu, Zhang 2019, "Distillation ≈ Early Stopping?", Algorithm 1.
    """
    if _checks.indices_beside_rows(logits, labels):  # the commonest call, known good at a glance
        flat, rows = logits, labels
    else:
        _checks.check_logits(logits)
        rows = _checks.check_labels(logits, labels, loss == "mse")
        flat = logits.reshape(-1, logits.shape[-1])
    codes, numbers, no_op = arguments.checked_options(
        loss, reduction, ignore_index, label_smoothing, label_fn, temperature, mixing, target_temperature,
        class_weight is not None, len(rows.shape) == 2,
    )  # fmt: skip
    weight = None
    if row_weight is not None:
        power, weight = row_weights(
            row_weight, logits, labels, rows, loss, ignore_index,
            lambda ranked: self_distillation_loss(
                ranked, labels, alpha, source=source, label_fn=label_fn, temperature=temperature, mixing=mixing,
                target_temperature=target_temperature, loss=loss, ignore_index=ignore_index,
                label_smoothing=label_smoothing, class_weight=class_weight, reduction="none", backend=backend,
            ),
        )  # fmt: skip
        if power:
            numbers = [*(numbers or PLAIN)[:-1], power]
    mix, alpha_value, adaptive = arguments.mixing(alpha, logits, flat, rows, loss, ignore_index)
    if source is not None:
        source = arguments.source_rows(source, logits, label_fn)
    elif no_op:
        arguments.warn_no_op(plain=mix is None and not adaptive and alpha_value == 1)
    if class_weight is not None:
        class_weight = _checks.check_weight("class_weight", class_weight, logits.shape[-1:], "(one a class)", logits)
    if adaptive:
        codes |= ADAPTIVE
    packed = (alpha_value, codes | WANT_STATS if return_stats else codes, ignore_index, numbers)
    rows_in = (flat, rows, mix, source, class_weight, weight)
    unserved = source.without_kernel(backend) if isinstance(source, BankRows) else ()
    chosen = _dispatch.choose(backend, logits.device.type, unserved)
    state: Tensor | None
    if chosen == "reference":
        arguments.check_values(rows, mix, flat, loss, ignore_index)
    if isinstance(source, BankRows):
        value, state = prediction_bank.prediction_bank_loss(chosen, *rows_in, packed)  # type: ignore[arg-type]
    elif chosen == "reference":
        value, state = self_distillation_reference(*rows_in, unpacked(*packed))  # type: ignore[arg-type]
    else:
        out = self_distillation(chosen, *rows_in, *packed)
        value, state = out if return_stats else (out, None)
    if reduction == "none" and logits.dim() != 2:
        value = value.reshape(logits.shape[:-1])
    if not return_stats:
        return value
    if return_stats is AS_STATE:
        return value, state  # type: ignore[return-value]
    mean_alpha, _, accuracy, target_entropy, agreement = state.unbind()  # type: ignore[union-attr]
    return value, LossStats(mean_alpha, accuracy, target_entropy, agreement)
