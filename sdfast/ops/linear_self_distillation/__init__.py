"""`linear_self_distillation_loss`: self-distillation from hidden states, without the logits of the whole batch."""

import torch
from torch import Tensor

from sdfast import _checks, _dispatch
from sdfast.ops import linear_chunks
from sdfast.ops.linear_self_distillation.op import LinearSelfDistillation
from sdfast.ops.linear_self_distillation.reference import linear_self_distillation_reference
from sdfast.ops.self_distillation import arguments
from sdfast.ops.self_distillation.arguments import AdaptiveAlpha, ClipLabel, LossStats
from sdfast.ops.self_distillation.description import LOSSES, REDUCTIONS, Description

__all__ = ["linear_self_distillation_loss"]


def linear_self_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    alpha: float | Tensor | AdaptiveAlpha,
    *,
    bias: Tensor | None = None,
    label_fn: str | ClipLabel = "hardmax",
    temperature: float = 1.0,
    loss: str = "cross_entropy",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    chunk_rows: int | None = None,
    workspace: int = linear_chunks.WORKSPACE,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """`self_distillation_loss` of a linear classifier's logits, of which only a chunk of rows exists at a time.

    Equals, and differentiates as::

        self_distillation_loss(torch.nn.functional.linear(hidden, weight, bias), labels, alpha, …)

    with the logits of bfloat16 and float16 in float32. Per chunk: one matrix product makes the logits, the loss's
    kernel turns them into their gradient in place, and further products add it to the gradients of `hidden`, `weight`
    and `bias`, of those that require it. The sums over chunks are float32 for halves (float64 for float64).

    Args:
        hidden: (..., H) of float32, float64, bfloat16 or float16.
        weight: (C, H), and `bias` (C,), of the same dtype; under autocast all take its dtype, as a linear layer does.
        labels: (...) class indices. Probabilities would be the very rows × classes that this function avoids.
        alpha: Weight of the given label, as in `self_distillation_loss`. With `AdaptiveAlpha` the logits are made
            twice, once to count the batch's accuracy: one matrix product more.
        bias: (C,).
        label_fn: As in `self_distillation_loss`, and so are the next seven.
        temperature: Of the softmax.
        loss: ``"cross_entropy"``, ``"kl"``, ``"mse"`` or ``"brier"``.
        ignore_index: Rows with this label count for nothing.
        label_smoothing: Of the given label, before mixing.
        class_weight: (C,), with cross_entropy and kl only.
        row_weight: (...), a factor on each row's loss.
        reduction: ``"mean"``, ``"sum"``, or ``"none"``. With ``"none"`` (and float16) the backward makes the logits
            again, since the upstream gradients come into the gradient of the weight row by row.
        return_stats: Also return `LossStats`.
        chunk_rows: Rows of a chunk; ``None``: as many as `workspace` holds, on a CPU at most 512.
        workspace: Bytes that the chunk and the scratch beside it may take, whatever the number of rows.
        backend: ``None`` for the best one available, or ``"cpu"``, ``"triton"``, ``"reference"``. The reference makes
            all the logits.

    Returns:
        The loss, or (loss, stats), as `self_distillation_loss` returns them.

    Raises:
        TypeError: A tensor has a dtype that cannot be used, or is no tensor.
        ValueError: Shapes, devices or options do not fit, or the workspace is too small; the message says for what.
        IndexError: A label on the CPU is out of range. (On a GPU its row becomes NaN.)
        NotImplementedError: The backend asked for cannot serve the call; the message says why.
    """
    hidden, weight, bias = linear_chunks.autocast(hidden, weight, bias)
    linear_chunks.check_classifier(("hidden", "weight", "bias"), hidden, weight, bias)
    linear_chunks.check_sizes(chunk_rows, workspace)
    logits = linear_chunks.logits_stand_in(hidden, weight)
    rows = _checks.check_labels(logits, labels, False)
    if rows.dim() == 2:
        got = f"{_checks.dtype_name(labels)} of shape {_checks.shape_text(labels)}"
        raise ValueError(f"labels: got {got}, wanted {tuple(logits.shape[:-1])} class indices, not probabilities")
    arguments.check_options(loss, reduction, ignore_index, label_smoothing, class_weight is not None, rows.dim() == 2)
    label_code, label_parameter = arguments.label_function(label_fn, temperature, loss)
    if class_weight is not None:
        class_weight = _checks.check_weight("class_weight", class_weight, logits.shape[-1:], "(one a class)", logits)
    if row_weight is not None:
        row_weight = _checks.check_weight("row_weight", row_weight, logits.shape[:-1], "(one a row)", logits)
        row_weight = row_weight.reshape(-1)
    classes, width = weight.shape
    plan = linear_chunks.plan(classes, width, hidden.dtype, hidden.device.type, 1, chunk_rows, workspace)
    chosen = _dispatch.choose(backend, hidden.device.type, unserved=("cuda",))  # which writes in no place but its own
    flat = hidden.reshape(-1, width)

    if isinstance(alpha, AdaptiveAlpha) and (alpha.sync or chosen != "reference"):
        alpha = _counted_alpha(alpha, flat, weight, bias, rows, ignore_index, plan)
    mix, alpha_value, adaptive = arguments.mixing(alpha, logits, logits, rows, loss, ignore_index)
    if arguments.is_no_op(label_fn, temperature, loss, class_weight is not None):
        arguments.warn_no_op(plain=mix is None and not adaptive and alpha_value == 1)
    description = Description(
        alpha_value, adaptive, label_code, label_parameter, LOSSES[loss], REDUCTIONS[reduction], ignore_index,
        label_smoothing,
    )  # fmt: skip
    tensors = (flat, weight, bias, rows, mix, class_weight, row_weight)
    if chosen == "reference":
        arguments.check_values(rows, mix, weight.t(), loss, ignore_index)
        value, state = linear_self_distillation_reference(*tensors, description)
    else:
        value, state = LinearSelfDistillation.apply(chosen, *tensors, description, plan, return_stats)
    if reduction == "none" and hidden.dim() != 2:
        value = value.reshape(hidden.shape[:-1])
    if not return_stats:
        return value
    mean_alpha, _, accuracy, target_entropy, agreement = state.unbind()
    return value, LossStats(mean_alpha, accuracy, target_entropy, agreement)


def _counted_alpha(
    alpha: AdaptiveAlpha, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, plan
) -> Tensor:
    """1 − clip(ratio · accuracy, 0, 1) by a pass over the chunks' logits."""
    hidden, weight, bias = linear_chunks.Classifier(hidden, weight, bias).detached()
    counts = torch.ops.sdfast._linear_count_correct(hidden, weight, bias, labels, ignore_index, *plan)
    return arguments.alpha_of_counts(alpha, counts)
