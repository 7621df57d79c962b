"""What the arguments of `self_distillation_loss` may be: their small types, their checks, their normal forms."""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdfast import _checks, _warnings
from sdfast.ops.prediction_bank.bank import BankRows, check_rows
from sdfast.ops.self_distillation.description import (
    LABEL_FUNCTIONS,
    LOSSES,
    MIXINGS,
    REDUCTIONS,
    accumulation_dtype,
    packed_codes,
    packed_numbers,
)
from sdfast.ops.self_distillation.reference import batch_accuracy


@dataclass(frozen=True, init=False)
class AdaptiveAlpha:
    """α from the batch itself: 1 − α = clip(ratio · accuracy, 0, 1).

    The accuracy is that of the current logits against the given labels; the host never reads it.

    Args:
        ratio: λ of the paper, non-negative; 0 is plain training.
        sync: Take the accuracy over all processes of `group`, not of this one alone.
        group: A torch.distributed process group; ``None`` is the whole world. Only with `sync`.

    Raises:
        ValueError: `ratio` is negative or not finite, or `group` comes without `sync`.

    Reference:
        Dong, Hou, Lu, Zhang 2019, section 4.2.
    """

    ratio: float
    sync: bool
    group: Any

    def __init__(self, ratio: float, *, sync: bool = False, group: Any = None) -> None:
        if not _checks.is_number(ratio) or not 0 <= ratio < math.inf:
            raise ValueError(f"ratio: got {ratio!r}, wanted a finite number >= 0")
        if group is not None and not sync:
            raise ValueError("group: given without sync=True, which alone uses it")
        object.__setattr__(self, "ratio", float(ratio))
        object.__setattr__(self, "sync", sync)
        object.__setattr__(self, "group", group)


@dataclass(frozen=True)
class ClipLabel:
    """The label function h(x) = clamp(4x / (1 − 2ρ), −1, 1), for ±1 labels.

    Args:
        rho: The fraction of flipped labels, in [0, 0.5).

    Raises:
        ValueError: `rho` is outside [0, 0.5).

    Reference:
        Dong, Hou, Lu, Zhang 2019, Theorem 1.
    """

    rho: float

    def __post_init__(self) -> None:
        if not _checks.is_number(self.rho) or not 0 <= self.rho < 0.5:
            raise ValueError(f"rho: got {self.rho!r}, wanted a number in [0, 0.5)")


@dataclass(frozen=True, eq=False)
class ClassPrior:
    """One distribution over the classes as the source of every row: ŷ = α·y + (1 − α)·prior.

    Goes with ``label_fn="softmax"``. With the shares of the classes among the labels it is label smoothing towards them
    instead of towards 1 / C.

    Args:
        probabilities: (C,), non-negative, of sum 1. Looked at here, once; the losses never do.

    Raises:
        TypeError: `probabilities` is no floating tensor.
        ValueError: It is no distribution.
    """

    probabilities: Tensor

    def __post_init__(self) -> None:
        _checks.check_floating("probabilities", self.probabilities)
        if self.probabilities.dim() != 1 or len(self.probabilities) == 0:
            got = _checks.shape_text(self.probabilities)
            raise ValueError(f"probabilities: got shape {got}, wanted (classes,)")
        if not torch.compiler.is_compiling():
            least, total = (float(x) for x in (self.probabilities.min(), self.probabilities.double().sum()))
            if not (least >= 0 and abs(total - 1) < 1e-2):
                raise ValueError(f"probabilities: got a least of {least:g} and a sum of {total:g}, wanted >= 0 and 1")

    def logits(self, like: Tensor) -> Tensor:
        """Its logarithm, expanded to the shape of (..., C) logits.

        Raises:
            ValueError: The logits have other classes or another device.
        """
        if len(self.probabilities) != like.shape[-1] or self.probabilities.device != like.device:
            raise ValueError(
                f"source: got a ClassPrior of {len(self.probabilities)} classes on {self.probabilities.device}, wanted "
                f"{like.shape[-1]} on {like.device} as the logits"
            )
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        return self.probabilities.detach().to(wide).log().expand(like.shape)


class LossStats(NamedTuple):
    """What `return_stats` adds: 0-d tensors on the logits' device, over the rows that are not ignored.

    Attributes:
        alpha: The α used; its mean where α is per row.
        accuracy: Fraction of rows whose largest logit is the given label's.
        target_entropy: Mean entropy of the targets ŷ in nats; NaN where a target has a negative entry.
        agreement: Fraction of rows whose target ŷ still has its largest entry at the given label.
    """

    alpha: Tensor
    accuracy: Tensor
    target_entropy: Tensor
    agreement: Tensor


class Options(NamedTuple):
    """What the options of a call come to, whatever its tensors: parts of `description.Packed`, and a warning."""

    codes: int
    numbers: list[float] | None
    no_op: bool  # with source=None


def _check_and_pack(
    loss: str, reduction: str, ignore_index: int, label_smoothing: float, label_fn: str | ClipLabel, temperature: float,
    mixing: str, target_temperature: float, weighted: bool, soft: bool,
) -> Options:  # fmt: skip
    check_options(loss, reduction, ignore_index, label_smoothing, weighted, soft)
    code, parameter = label_function(label_fn, temperature, loss)
    mixing_code, power = MIXINGS["arithmetic"], 1.0
    reshaped = mixing != "arithmetic" or target_temperature != 1
    if reshaped:
        mixing_code, power = target_shape(mixing, target_temperature, label_fn, loss, label_smoothing, soft)
    return Options(
        packed_codes(code, LOSSES[loss], REDUCTIONS[reduction], mixing_code),
        packed_numbers(parameter, label_smoothing, power, 0.0),
        not reshaped and is_no_op(label_fn, temperature, loss, weighted),
    )


_remembered = functools.lru_cache(maxsize=256, typed=True)(_check_and_pack)  # typed: True is no number


def checked_options(*options: Any) -> Options:
    """The options checked and packed, once for each combination; their order as `_check_and_pack` has it."""
    if torch.compiler.is_compiling():
        return _check_and_pack(*options)
    try:
        return _remembered(*options)
    except TypeError:  # one cannot be hashed, or is refused: then again, by its name
        return _check_and_pack(*options)


def check_options(
    loss: str, reduction: str, ignore_index: int, label_smoothing: float, weighted: bool, soft: bool
) -> None:
    """Refuses options that do not exist or do not go together.

    Args:
        loss: As in `self_distillation_loss`.
        reduction: As there.
        ignore_index: As there.
        label_smoothing: As there.
        weighted: Whether there is a class_weight.
        soft: Whether the labels are rows, and not indices.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: An option does not exist, or does not go with another.
    """
    if type(loss) is not str or loss not in LOSSES:
        _checks.check_option("loss", loss, LOSSES)
    if type(reduction) is not str or reduction not in REDUCTIONS:
        _checks.check_option("reduction", reduction, REDUCTIONS)
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, wanted an integer")
    if not _checks.is_number(label_smoothing) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing!r}, wanted a number in [0, 1]")
    if weighted and loss not in ("cross_entropy", "kl"):
        raise ValueError(f"class_weight: goes with loss='cross_entropy' or 'kl' only, got loss={loss!r}")
    if soft:
        if ignore_index != -100:
            raise ValueError(f"ignore_index: got {ignore_index!r}, but labels that are not indices ignore no row")
        if label_smoothing and loss == "mse":
            raise ValueError("label_smoothing: with loss='mse' it wants index labels, got real targets")


def label_function(label_fn: str | ClipLabel, temperature: float, loss: str) -> tuple[int, float]:
    """(code, parameter) of h: the parameter is the softmax's temperature or the clip's ρ."""
    if isinstance(label_fn, ClipLabel):
        code, parameter = LABEL_FUNCTIONS["clip"], float(label_fn.rho)
    elif label_fn in ("softmax", "hardmax", "identity"):
        code, parameter = LABEL_FUNCTIONS[label_fn], temperature
    else:
        wanted = "'hardmax', 'softmax', 'identity' or sdfast.ClipLabel(rho)"
        raise ValueError(f"label_fn: got {label_fn!r}, wanted {wanted}")
    if loss != "mse" and code >= LABEL_FUNCTIONS["identity"]:
        raise ValueError(f"label_fn: {label_fn!r} gives no probabilities, goes with loss='mse' only, got loss={loss!r}")
    if not _checks.is_number(temperature) or not 1e-30 <= temperature <= 1e30:  # so that 1/T is a normal float32
        raise ValueError(f"temperature: got {temperature!r}, wanted a number > 0, between 1e-30 and 1e30")
    if temperature != 1 and label_fn != "softmax":
        raise ValueError(f"temperature: got {temperature!r}, but only label_fn='softmax' has one, not {label_fn!r}")
    return code, parameter


def target_shape(
    mixing: str, target_temperature: float, label_fn: str | ClipLabel, loss: str, label_smoothing: float, soft: bool
) -> tuple[int, float]:
    """(code of the mean, 1 / temperature) of the mixed target; `soft` as in `check_options`."""
    _checks.check_option("mixing", mixing, MIXINGS)
    if not _checks.is_number(target_temperature) or not 1e-30 <= target_temperature <= 1:
        raise ValueError(
            f"target_temperature: got {target_temperature!r}, wanted a number in (0, 1]: it sharpens (label_smoothing "
            "flattens)"
        )
    for name, value, plain in (("mixing", mixing, "arithmetic"), ("target_temperature", target_temperature, 1)):
        if value != plain and loss == "mse":
            raise ValueError(f"{name}: {value!r} wants targets that are probabilities, got loss='mse'")
    if mixing == "geometric":
        if label_fn != "softmax":
            raise ValueError(
                f"mixing: 'geometric' wants label_fn='softmax', got {label_fn!r}, whose zeros leave no class in common"
            )
        if not soft and label_smoothing == 0:
            raise ValueError(
                "mixing: 'geometric' with index labels wants label_smoothing > 0, got 0: the zeros of a one-hot label "
                "silence the source"
            )
    return MIXINGS[mixing], 1 / float(target_temperature)


def mixing(
    alpha: float | Tensor | AdaptiveAlpha, logits: Tensor, flat: Tensor, labels: Tensor, loss: str, ignore_index: int
) -> tuple[Tensor | None, float, bool]:
    """(tensor α or None, number, adaptive): the number is α itself, or the ratio of an adaptive one."""
    compiling = torch.compiler.is_compiling()
    if type(alpha) is float and 0 <= alpha <= 1 and not compiling:  # the commonest, at a glance
        return None, alpha, False
    if isinstance(alpha, AdaptiveAlpha):
        if not alpha.sync:
            return None, alpha.ratio, True
        return _synchronised_alpha(alpha, flat, labels, ignore_index), 1.0, False
    if isinstance(alpha, Tensor):
        if alpha.dim() == 0:
            return _checks.check_weight("alpha", alpha, (), "(or one a row)", logits), 1.0, False
        return _checks.check_weight("alpha", alpha, logits.shape[:-1], "(one a row)", logits).reshape(-1), 1.0, False
    if compiling:
        # A number in the graph is a new graph per number; as a tensor it is an input. Its value cannot be checked here.
        return logits.new_ones((), dtype=accumulation_dtype(logits.dtype)) * alpha, 1.0, False
    if not _checks.is_number(alpha):
        raise TypeError(f"alpha: got {type(alpha).__name__}, wanted a number, a tensor or sdfast.AdaptiveAlpha")
    if not 0 <= alpha <= 1:
        if not math.isfinite(alpha):
            raise ValueError(f"alpha: got {alpha}, wanted a finite number")
        if loss != "mse":
            raise ValueError(
                f"alpha: got {alpha}, wanted within [0, 1] for a probability target (mse takes any number)"
            )
    return None, float(alpha), False


def _synchronised_alpha(alpha: AdaptiveAlpha, flat: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    counts = torch.stack(batch_accuracy(flat.detach(), labels, ignore_index)).to(accumulation_dtype(flat.dtype))
    return alpha_of_counts(alpha, counts)


def alpha_of_counts(alpha: AdaptiveAlpha, counts: Tensor) -> Tensor:
    """1 − clip(ratio · accuracy, 0, 1) of (correct, kept) rows, those of all processes where α is synchronised."""
    if alpha.sync:
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            raise RuntimeError(
                "AdaptiveAlpha(sync=True): torch.distributed is not initialised; call init_process_group"
            )
        torch.distributed.all_reduce(counts, group=alpha.group)
    return 1 - (alpha.ratio * counts[0] / counts[1].clamp(min=1)).clamp(0, 1)


def source_rows(source: Tensor | ClassPrior | BankRows, logits: Tensor, label_fn: str | ClipLabel) -> Tensor | BankRows:
    """The source as (N, C) rows beside the logits, detached; a bank's as they are."""
    if isinstance(source, BankRows):
        check_rows("source", source, logits)
        if label_fn not in ("softmax", "hardmax"):
            raise ValueError(
                f"label_fn: got {label_fn!r}, but a bank holds probabilities: wanted 'softmax' or 'hardmax'"
            )
        return source
    if isinstance(source, ClassPrior):
        if label_fn != "softmax":
            raise ValueError(f"label_fn: got {label_fn!r}, but a ClassPrior is a distribution and wants 'softmax'")
        source = source.logits(logits)
    if not isinstance(source, Tensor):
        wanted = "a tensor, bank.rows(indices) of a sdfast.PredictionBank or a sdfast.ClassPrior"
        raise TypeError(f"source: got {type(source).__name__}, wanted {wanted}")
    return _checks.rows_beside("source", source, logits)


def is_no_op(label_fn: str | ClipLabel, temperature: float, loss: str, weighted: bool) -> bool:
    """Whether a target from the logits themselves has no gradient beyond the plain loss's, times α."""
    if loss == "mse":
        return label_fn == "identity"
    return label_fn == "softmax" and temperature == 1 and not weighted


_warned = False


def warn_no_op(plain: bool) -> None:
    """Says once that the call is plain training in disguise, unless it is plain by α = 1."""
    global _warned
    if plain or _warned or torch.compiler.is_compiling():
        return
    _warned = True
    _warnings.warn_caller(
        "self_distillation_loss: with source=None this label_fn and loss give exactly alpha times the plain loss's "
        "gradient, so the model's own predictions teach it nothing; use label_fn='hardmax', a temperature below 1 or "
        "a source"
    )


def check_values(labels: Tensor, alpha: Tensor | None, flat: Tensor, loss: str, ignore_index: int) -> None:
    """The reference's check of labels and α: on the CPU, where looking costs nothing, and no transform forbids it."""
    if flat.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    classes = flat.shape[-1]
    if labels.dim() == 1:
        row = _checks.first_row(((labels < 0) | (labels >= classes)) & (labels != ignore_index))
        if row is not None:
            raise IndexError(
                f"labels: row {row} is {int(labels[row])}, wanted 0 <= label < {classes} or ignore_index={ignore_index}"
                + (" (targets of a one-column regression are floats)" if classes == 1 else "")
            )
    if alpha is not None:
        alphas = alpha.reshape(-1)
        row = _checks.first_row(alphas.isnan() if loss == "mse" else ~((alphas >= 0) & (alphas <= 1)))
        if row is not None:
            wanted = "a number" if loss == "mse" else "within [0, 1] for a probability target"
            raise ValueError(f"alpha: row {row} is {float(alphas[row]):g}, wanted {wanted}")
