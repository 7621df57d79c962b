"""What the arguments of `distillation_loss` may be: the teacher's forms, the checks, the normal forms."""

from typing import NamedTuple

import torch
from torch import Tensor

from sdfast import _checks
from sdfast.ops.distillation.description import DIVERGENCES, REDUCTIONS, TEACHER_FORMS
from sdfast.ops.self_distillation.description import accumulation_dtype


class LogProbabilities(NamedTuple):
    """A teacher given by log-probabilities, already at its temperature; taken as they are, not normalised again.

    Log-probabilities at temperature 1 are logits too: to soften them, pass the bare tensor.

    Attributes:
        values: (..., C), log q.
    """

    values: Tensor


class TopK(NamedTuple):
    """A teacher given by its k likeliest classes of each row, and the mass of all others.

    Attributes:
        values: (..., k) log-probabilities, already at the teacher's temperature, of the listed classes.
        indices: (..., k) int64, the listed classes, no class twice.
        tail_mass: (...) probability of all other classes together, in [0, 1]; ``None``: what the listed ones leave,
            1 − Σ exp(values), at least 0; values that sum to more than 1.1 are no distribution and refused.
        tail: How the mass is spread over the other classes. ``"bucket"``: in proportion to the student's own
            probabilities (without gradient through the share), which makes the divergence exactly that of the k + 1
            outcomes "one of the listed classes" and "any other": nothing is taught about the order among the others.
            ``"uniform"``: equally.
    """

    values: Tensor
    indices: Tensor
    tail_mass: Tensor | None = None
    tail: str = "bucket"


Teacher = Tensor | LogProbabilities | TopK


def check_options(divergence: str, reduction: str, ignore_index: int, label_smoothing: float) -> None:
    """Refuses options that do not exist."""
    if type(divergence) is not str or divergence not in DIVERGENCES:
        _checks.check_option("divergence", divergence, DIVERGENCES)
    if type(reduction) is not str or reduction not in REDUCTIONS:
        _checks.check_option("reduction", reduction, REDUCTIONS)
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, wanted an integer")
    if not _checks.is_number(label_smoothing) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing!r}, wanted a number in [0, 1]")


def check_temperature(name: str, temperature: float) -> float:
    """A temperature whose square and reciprocal are normal float32 numbers."""
    if not _checks.is_number(temperature) or not 1e-10 <= temperature <= 1e10:
        raise ValueError(f"{name}: got {temperature!r}, wanted a number > 0, between 1e-10 and 1e10")
    return float(temperature)


def label_rows(logits: Tensor, labels: Tensor | None, ignore_index: int, label_smoothing: float) -> Tensor | None:
    """Labels as (N,) int64 or (N, C) probabilities, or ``None``, with the options that belong to them."""
    if labels is None:
        if label_smoothing:
            raise ValueError(f"label_smoothing: got {label_smoothing!r}, but there are no labels to smooth")
        if ignore_index != -100:
            raise ValueError(f"ignore_index: got {ignore_index!r}, but there are no labels")
        return None
    rows = _checks.check_labels(logits, labels, False)
    if rows.dim() == 2 and ignore_index != -100:
        raise ValueError(f"ignore_index: got {ignore_index!r}, but labels that are not indices ignore no row")
    return rows


def mixing(alpha: float | Tensor | None, logits: Tensor, labelled: bool) -> tuple[Tensor | None, float]:
    """(tensor α or None, number α) of the weight of the labels."""
    if not labelled:
        if alpha is not None:
            raise ValueError(f"alpha: got {_text(alpha)}, but there are no labels to give that weight; pass labels")
        return None, 0.0
    if alpha is None:
        return None, 0.5
    if isinstance(alpha, Tensor):
        shape = () if alpha.dim() == 0 else tuple(logits.shape[:-1])
        meaning = "(or one a row)" if alpha.dim() == 0 else "(one a row)"
        checked = _checks.check_weight("alpha", alpha, shape, meaning, logits)
        return checked if alpha.dim() == 0 else checked.reshape(-1), 1.0
    if torch.compiler.is_compiling() and not isinstance(alpha, str):
        # A number in the graph is a new graph per number; as a tensor it is an input. Its value cannot be checked here.
        return logits.new_ones((), dtype=accumulation_dtype(logits.dtype)) * alpha, 1.0
    if not _checks.is_number(alpha):
        raise TypeError(f"alpha: got {type(alpha).__name__}, wanted a number or a tensor")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}, wanted within [0, 1]")
    return None, float(alpha)


def _text(alpha: object) -> str:
    return f"a tensor of shape {_checks.shape_text(alpha)}" if isinstance(alpha, Tensor) else repr(alpha)


class TeacherRows(NamedTuple):
    """A teacher as the operations take it, detached."""

    form: int
    values: Tensor  # (N, C) or (N, k)
    indices: Tensor | None = None  # (N, k)
    tail: Tensor | None = None  # (N,)


def teacher_rows(teacher: Teacher, teacher_temperature: float | None, logits: Tensor) -> TeacherRows:
    """The teacher as rows beside the logits; its gradient is never taken."""
    if isinstance(teacher, Tensor):
        return TeacherRows(TEACHER_FORMS["logits"], _checks.rows_beside("teacher_logits", teacher, logits))
    if not isinstance(teacher, (LogProbabilities, TopK)):
        wanted = "a tensor of logits, sdfast.LogProbabilities or sdfast.TopK"
        raise TypeError(f"teacher_logits: got {type(teacher).__name__}, wanted {wanted}")
    if teacher_temperature is not None:
        raise ValueError(
            f"teacher_temperature: got {teacher_temperature!r}, but only a teacher's logits have one; probabilities "
            "are taken as they are"
        )
    if isinstance(teacher, LogProbabilities):
        return TeacherRows(TEACHER_FORMS["log_probabilities"], _checks.rows_beside("values", teacher.values, logits))
    return _top_k_rows(teacher, logits)


def _top_k_rows(teacher: TopK, logits: Tensor) -> TeacherRows:
    values, indices, tail_mass, tail = teacher
    _checks.check_floating("values", values)
    _checks.check_tensor("indices", indices)
    _checks.check_option("tail", tail, ("bucket", "uniform"))
    leading, classes = logits.shape[:-1], logits.shape[-1]
    if indices.dtype not in _checks.INTEGRAL:
        raise TypeError(f"indices: got {_checks.dtype_name(indices)}, wanted int64 classes")
    if values.dim() != logits.dim() or values.shape[:-1] != leading or not 1 <= values.shape[-1] <= classes:
        wanted = f"({', '.join(map(str, (*leading, 'k')))}) with 1 <= k <= {classes}"
        raise ValueError(
            f"values: got shape {_checks.shape_text(values)}, wanted {wanted} for logits {_checks.shape_text(logits)}"
        )
    if indices.shape != values.shape:
        got, wanted = _checks.shape_text(indices), _checks.shape_text(values)
        raise ValueError(f"indices: got shape {got}, wanted {wanted} as the values")
    for name, tensor in (("values", values), ("indices", indices)):
        if tensor.device != logits.device:
            raise ValueError(f"{name}: is on {tensor.device}, wanted {logits.device} as the logits")
    k = values.shape[-1]
    if tail_mass is None:
        # A NaN is left to the values, to make its row's loss NaN.
        listed = values.detach().to(accumulation_dtype(logits.dtype)).exp().sum(-1).nan_to_num(nan=1.0)
        mass = (1 - listed).clamp(min=0) if k < classes else torch.zeros_like(listed)
        # More than rounding explains is no distribution (probabilities in place of their logarithms): refused as such.
        mass = torch.where(listed > 1.1, 1 - listed, mass)
    elif k == classes:
        raise ValueError(f"tail_mass: given, but all {classes} classes are listed: no other has any mass")
    else:
        _checks.check_tensor("tail_mass", tail_mass)
        mass = _checks.check_weight("tail_mass", tail_mass.detach(), leading, "(one a row)", logits)
    form = TEACHER_FORMS[f"top_k_{tail}"]
    indices = indices.reshape(-1, k).to(torch.int64).contiguous()
    return TeacherRows(form, values.detach().reshape(-1, k), indices, mass.reshape(-1).contiguous())


def check_values(labels: Tensor | None, alpha: Tensor | None, teacher: TeacherRows, flat: Tensor, ignore: int) -> None:
    """The reference's check of what it reads: on the CPU, where looking costs nothing and no transform forbids it."""
    if flat.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    classes = flat.shape[-1]
    if labels is not None and labels.dim() == 1:
        row = _checks.first_row(((labels < 0) | (labels >= classes)) & (labels != ignore))
        if row is not None:
            raise IndexError(
                f"labels: row {row} is {int(labels[row])}, wanted 0 <= label < {classes} or ignore_index={ignore}"
            )
    if alpha is not None:
        alphas = alpha.reshape(-1)
        row = _checks.first_row(~((alphas >= 0) & (alphas <= 1)))
        if row is not None:
            raise ValueError(f"alpha: row {row} is {float(alphas[row]):g}, wanted within [0, 1]")
    if teacher.indices is not None and teacher.tail is not None:
        kept = torch.ones_like(flat[:, 0], dtype=torch.bool)
        if labels is not None and labels.dim() == 1:
            kept = labels != ignore
        _check_top_k_values(teacher.indices, teacher.tail, kept, classes)


def _check_top_k_values(indices: Tensor, tail: Tensor, kept: Tensor, classes: int) -> None:
    bad = ((indices < 0) | (indices >= classes)) & kept[:, None]
    row = _checks.first_row(bad.any(-1))
    if row is not None:
        index = int(indices[row][bad[row]][0])
        raise IndexError(f"indices: row {row} lists {index}, wanted 0 <= index < {classes}")
    ordered = indices.sort(-1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & kept[:, None]
    row = _checks.first_row(repeated.any(-1))
    if row is not None:
        raise ValueError(f"indices: row {row} lists {int(ordered[row, 1:][repeated[row]][0])} twice")
    row = _checks.first_row(~((tail >= 0) & (tail <= 1)) & kept)
    if row is not None:
        raise ValueError(f"tail_mass: row {row} is {float(tail[row]):g}, wanted within [0, 1]")
