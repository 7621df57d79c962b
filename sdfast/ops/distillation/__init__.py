"""`distillation_loss`, the fused loss of learning from a teacher."""

from torch import Tensor

from sdfast import _checks, _dispatch
from sdfast.ops.distillation import arguments
from sdfast.ops.distillation.arguments import LogProbabilities, Teacher, TopK
from sdfast.ops.distillation.description import DIVERGENCES, REDUCTIONS, Description
from sdfast.ops.distillation.op import distillation
from sdfast.ops.distillation.reference import distillation_reference

__all__ = ["LogProbabilities", "TopK", "distillation_loss"]


def distillation_loss(
    logits: Tensor,
    teacher_logits: Teacher,
    labels: Tensor | None = None,
    *,
    alpha: float | Tensor | None = None,
    temperature: float = 4.0,
    teacher_temperature: float | None = None,
    divergence: str = "kl",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Loss of the logits against a teacher's probabilities and, where there are labels, against them, in one pass.

    Equals, for a row with p = softmax(logits / T), q = softmax(teacher_logits / T) and T the temperature::

        alpha * cross_entropy(logits, label) + (1 - alpha) * T**2 * D(q, p)

    where D is, with m = (p + q) / 2:

    ===========  =============================================================
    kl           KL(q ‖ p) = Σ_c q_c (log q_c − log p_c)
    reverse_kl   KL(p ‖ q) = Σ_c p_c (log p_c − log q_c)
    js           ½ Σ_c q_c (log q_c − log m_c) + ½ Σ_c p_c (log p_c − log m_c)
    ===========  =============================================================

    The reduction is over *rows*, as torch's ``kl_div(reduction="batchmean")``: ``"mean"`` divides by the number of rows
    kept, never by the number of classes, which ``kl_div(reduction="mean")`` does. T² keeps the size of the gradient
    when the temperature changes.

    Args:
        logits: (..., C) of float32, float64, bfloat16 or float16, classes last. Halves accumulate in float32.
        teacher_logits: (..., C) logits of any floating dtype; or `LogProbabilities`, or `TopK`. Never differentiated.
        labels: (...) class indices, or (..., C) probabilities, for the cross entropy at temperature 1.
        alpha: Weight of the label's cross entropy, within [0, 1]: a number, a 0-d or a (...) tensor. ``None``: 0.5
            with labels, 0 without. A tensor on a GPU is not checked. A row with α = 1 has the very bits of
            ``self_distillation_loss(logits, labels, 1.0)`` and does not look at its teacher.
        temperature: T, of the student, and of the teacher unless it has its own; positive.
        teacher_temperature: Of the teacher's logits alone. The factor stays the square of `temperature`.
        divergence: ``"kl"``, ``"reverse_kl"`` or ``"js"``.
        ignore_index: Rows with this index label count for nothing, in neither term.
        label_smoothing: Of the label: (1 − s) y + s / C.
        row_weight: (...), a factor on each row's loss that changes no denominator.
        reduction: ``"mean"`` over the rows kept, ``"sum"``, or ``"none"`` for (...) losses. A batch with no row kept
            has loss 0.
        backend: ``None`` for the best one available, or ``"cpu"``, ``"triton"``, ``"reference"``.

    Returns:
        The loss, float64 for float64 logits and float32 otherwise. Differentiable once with respect to the logits.
        ``backend="reference"`` can be differentiated again, and is what runs under torch.func transforms.

    Raises:
        TypeError: A tensor has a dtype that cannot be used, or is no tensor.
        ValueError: Shapes, devices or options do not fit; the message names the argument.
        IndexError: A label or an index on the CPU is out of range. (On a GPU its row becomes NaN.)
        NotImplementedError: The backend asked for cannot serve the call; the message says why.

    Reference:
        Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    _checks.check_logits(logits)
    flat = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    arguments.check_options(divergence, reduction, ignore_index, label_smoothing)
    student_temperature = arguments.check_temperature("temperature", temperature)
    own_temperature = student_temperature
    if teacher_temperature is not None:
        own_temperature = arguments.check_temperature("teacher_temperature", teacher_temperature)
    teacher = arguments.teacher_rows(teacher_logits, teacher_temperature, logits)
    label_rows = arguments.label_rows(logits, labels, ignore_index, label_smoothing)
    mix, alpha_value = arguments.mixing(alpha, logits, labels is not None)
    if row_weight is not None:
        row_weight = _checks.check_weight("row_weight", row_weight, logits.shape[:-1], "(one a row)", logits)
        row_weight = row_weight.reshape(-1)

    description = Description(
        alpha_value, student_temperature, own_temperature, DIVERGENCES[divergence], teacher.form,
        REDUCTIONS[reduction], ignore_index, float(label_smoothing),
    )  # fmt: skip
    rows_in = (flat, teacher.values, teacher.indices, teacher.tail, label_rows, mix, row_weight)
    chosen = _dispatch.choose(backend, logits.device.type, unserved=("cuda",))
    if chosen == "reference":
        arguments.check_values(label_rows, mix, teacher, flat, ignore_index)
        value, _ = distillation_reference(*rows_in, description)
    else:
        value = distillation(chosen, *rows_in, description)
    return value.reshape(logits.shape[:-1]) if reduction == "none" and logits.dim() != 2 else value
