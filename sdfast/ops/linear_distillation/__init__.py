"""`linear_distillation_loss`: distillation from hidden states, without the logits of the whole batch."""

import torch
from torch import Tensor

from sdfast import _checks, _dispatch
from sdfast.ops import linear_chunks
from sdfast.ops.distillation import arguments
from sdfast.ops.distillation.description import DIVERGENCES, REDUCTIONS, TEACHER_FORMS, Description
from sdfast.ops.linear_distillation.op import LinearDistillation
from sdfast.ops.linear_distillation.reference import linear_distillation_reference

__all__ = ["linear_distillation_loss"]


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    alpha: float | Tensor | None = None,
    temperature: float = 4.0,
    teacher_temperature: float | None = None,
    divergence: str = "kl",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    workspace: int = linear_chunks.WORKSPACE,
    backend: str | None = None,
) -> Tensor:
    """`distillation_loss` of two linear classifiers' logits, of which only a chunk of rows exists at a time.

    Equals, and differentiates in `hidden`, `weight` and `bias` as::

        distillation_loss(
            torch.nn.functional.linear(hidden, weight, bias),
            torch.nn.functional.linear(teacher_hidden, teacher_weight, teacher_bias), labels, …)

    with the logits of bfloat16 and float16 in float32. The sums over chunks are float32 for halves (float64 for
    float64). The teacher is never differentiated; its width and its dtype are its own.

    Args:
        hidden: (..., H) of float32, float64, bfloat16 or float16.
        weight: (C, H), and `bias` (C,), of the same dtype; under autocast all take its dtype, as a linear layer does.
        teacher_hidden: (..., H'), for the same rows.
        teacher_weight: (C, H'), and `teacher_bias` (C,), of the teacher's dtype.
        labels: (...) class indices. Probabilities would be the very rows × classes that this function avoids.
        bias: (C,).
        teacher_bias: (C,).
        alpha: Weight of the label's cross entropy, as in `distillation_loss`, and so are the next seven.
        temperature: T.
        teacher_temperature: Of the teacher alone.
        divergence: ``"kl"``, ``"reverse_kl"`` or ``"js"``.
        ignore_index: Rows with this label count for nothing, in neither term.
        label_smoothing: Of the label.
        row_weight: (...), a factor on each row's loss.
        reduction: ``"mean"`` over the rows kept, ``"sum"``, or ``"none"``. With ``"none"`` (and float16) the backward
            makes the logits again, since the upstream gradients come into the gradient of the weight row by row.
        chunk_rows: Rows of a chunk; ``None``: as many as `workspace` holds, on a CPU at most 512.
        workspace: Bytes that the chunks and the scratch beside them may take, whatever the number of rows.
        backend: ``None`` for the best one available, or ``"cpu"``, ``"triton"``, ``"reference"``. The reference makes
            all the logits.

    Returns:
        The loss, as `distillation_loss` returns it.

    Raises:
        TypeError: A tensor has a dtype that cannot be used, or is no tensor.
        ValueError: Shapes, devices or options do not fit, or the workspace is too small; the message says for what.
        IndexError: A label on the CPU is out of range. (On a GPU its row becomes NaN.)
        NotImplementedError: The backend asked for cannot serve the call; the message says why.
    """
    hidden, weight, bias = linear_chunks.autocast(hidden, weight, bias)
    linear_chunks.check_classifier(("hidden", "weight", "bias"), hidden, weight, bias)
    teacher_hidden, teacher_weight, teacher_bias = linear_chunks.autocast(teacher_hidden, teacher_weight, teacher_bias)
    names = ("teacher_hidden", "teacher_weight", "teacher_bias")
    linear_chunks.check_classifier(names, teacher_hidden, teacher_weight, teacher_bias)
    _check_teacher(hidden, weight, teacher_hidden, teacher_weight)
    linear_chunks.check_sizes(chunk_rows, workspace)
    logits = linear_chunks.logits_stand_in(hidden, weight)
    arguments.check_options(divergence, reduction, ignore_index, label_smoothing)
    student_temperature = own_temperature = arguments.check_temperature("temperature", temperature)
    if teacher_temperature is not None:
        own_temperature = arguments.check_temperature("teacher_temperature", teacher_temperature)
    rows = arguments.label_rows(logits, labels, ignore_index, label_smoothing)
    if rows is not None and labels is not None and rows.dim() == 2:
        got = f"{_checks.dtype_name(labels)} of shape {_checks.shape_text(labels)}"
        raise ValueError(f"labels: got {got}, wanted {tuple(logits.shape[:-1])} class indices, not probabilities")
    mix, alpha_value = arguments.mixing(alpha, logits, labels is not None)
    if row_weight is not None:
        row_weight = _checks.check_weight("row_weight", row_weight, logits.shape[:-1], "(one a row)", logits)
        row_weight = row_weight.reshape(-1)
    classes, width = weight.shape
    widest = max(width, teacher_weight.shape[1])
    halves = [t.dtype for t in (hidden, teacher_hidden) if t.dtype in (torch.bfloat16, torch.float16)]
    dtype = halves[0] if halves and hidden.dtype != torch.float64 else hidden.dtype
    plan = linear_chunks.plan(classes, widest, dtype, hidden.device.type, 2, chunk_rows, workspace)
    chosen = _dispatch.choose(backend, hidden.device.type, unserved=("cuda",))

    description = Description(
        alpha_value, student_temperature, own_temperature, DIVERGENCES[divergence], TEACHER_FORMS["logits"],
        REDUCTIONS[reduction], ignore_index, float(label_smoothing),
    )  # fmt: skip
    teacher = (teacher_hidden.detach().reshape(-1, teacher_weight.shape[1]), teacher_weight.detach())
    tensors = (
        hidden.reshape(-1, width), weight, bias, *teacher, None if teacher_bias is None else teacher_bias.detach(),
        rows, mix, row_weight,
    )  # fmt: skip
    if chosen == "reference":
        whole = arguments.TeacherRows(TEACHER_FORMS["logits"], teacher_weight)
        arguments.check_values(rows, mix, whole, weight.t(), ignore_index)
        value, _ = linear_distillation_reference(*tensors, description)
    else:
        value = LinearDistillation.apply(chosen, *tensors, description, plan)
    return value.reshape(hidden.shape[:-1]) if reduction == "none" and hidden.dim() != 2 else value


def _check_teacher(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> None:
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        got, wanted = _checks.shape_text(teacher_hidden), tuple(hidden.shape[:-1])
        raise ValueError(f"teacher_hidden: got shape {got}, wanted the rows {wanted} of hidden")
    if teacher_weight.shape[0] != weight.shape[0]:
        got = _checks.shape_text(teacher_weight)
        raise ValueError(f"teacher_weight: got shape {got}, wanted {weight.shape[0]} classes as weight")
    if teacher_hidden.device != hidden.device:
        raise ValueError(f"teacher_hidden: is on {teacher_hidden.device}, wanted {hidden.device} as hidden")
