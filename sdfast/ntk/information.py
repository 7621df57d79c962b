"""What labels hold in the top eigenspace of a kernel, and how fast gradient descent learns each part of it.

Dong, Hou, Lu, Zhang 2019, sections 2 and 3 (Anisotropic Information Retrieval). Gradient descent on ½‖f − y‖² with a
fixed kernel H and learning rate η moves the error along the eigenvector v_i of λ_i by the factor 1 − ηλ_i a step: what
labels hold in the top eigenspace is learned first. Labels may be any kind of array; results are of the space's kind.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, SupportsIndex

import array_api_compat
import torch
from torch import Tensor

from sdfast import _checks, _warnings
from sdfast.ntk.eigenspace import Eigenspace
from sdfast.ntk.operands import output_like

__all__ = [
    "AlphaWindow",
    "NoiseSweep",
    "alpha_window",
    "error_components",
    "information_gain",
    "information_ratio",
    "noise_sweep",
    "predicted_decay",
]

STABLE_GAP = 0.01  # below it, a change of the kernel by a percent may turn the k-th eigenvector out of the space


class AlphaWindow(NamedTuple):
    """When α should fall, in steps of gradient descent.

    Attributes:
        start: 1 / (ηλ_signal): the slowest signal has been learned to 1/e.
        end: 1 / (ηλ_noise): the fastest noise has been; infinite where the noise's eigenvalue is 0.
    """

    start: float
    end: float


class NoiseSweep(NamedTuple):
    """The information ratio against the share of labels that are flipped.

    Attributes:
        rates: Share of wrong labels (rates,).
        mean: Of the ratio over the repeats (rates,).
        deviation: Its standard deviation over the repeats (rates,).
        ratios: All of them (rates, repeats).
    """

    rates: tuple[float, ...]
    mean: Any
    deviation: Any
    ratios: Any


def information_ratio(
    space: Eigenspace, labels: Any, *, center: bool = False, squared: bool = False, joint: bool = False
) -> Any:
    """‖P v‖ / ‖v‖, P the projector on the eigenspace: the share of the labels v that is learned first.

    Args:
        space: Of the kernel, k its top pairs.
        labels: v (n,) or one label vector a column (n, C): floats, such as ±1, one-hot rows, or predictions.
        center: Subtract each column's mean first. Where the classes are unbalanced, the constant vector, which a
            kernel's first eigenvector often resembles, makes the plain ratio large.
        squared: The ratio of squared norms, the share of the energy.
        joint: One ratio for all columns together, by their Frobenius norms.

    Returns:
        One ratio (), or one a column (C,); float64.

    Raises:
        TypeError: The labels are no real floating numbers.
        ValueError: Their length is not the kernel's, or a column is zero (constant, with `center`): it has no ratio.
    """  # raised by the checks called here
    _warn_where_unstable(space)
    columns, single = _columns("labels", labels, space)
    return output_like(space.vectors, _ratio(space, columns, single, center, squared, joint))


def information_gain(
    space: Eigenspace,
    labels: Any,
    refined_labels: Any,
    *,
    center: bool = False,
    squared: bool = False,
    joint: bool = False,
) -> Any:
    """The information ratio of the refined labels ŷ less that of the labels y: above 0, distillation adds information.

    Args:
        space: Of the kernel.
        labels: y, as for `information_ratio`.
        refined_labels: ŷ, of the same shape; `self_distillation_loss` trains on α y + (1 − α) h(f).
        center: As for `information_ratio`.
        squared: As for `information_ratio`.
        joint: As for `information_ratio`.

    Returns:
        The difference, () or (C,).

    Raises:
        ValueError: The two differ in shape, or `information_ratio` refuses one of them.
    """
    _warn_where_unstable(space)
    given, single = _columns("labels", labels, space)
    refined, also_single = _columns("refined_labels", refined_labels, space)
    if given.shape != refined.shape or single != also_single:
        raise ValueError(
            f"refined_labels: got shape {_shape(refined, also_single)}, wanted {_shape(given, single)} as labels"
        )
    before = _ratio(space, given, single, center, squared, joint)
    after = _ratio(space, refined, single, center, squared, joint, "refined_labels")
    return output_like(space.vectors, after - before)


def error_components(space: Eigenspace, predictions: Any, labels: Any) -> Any:
    """⟨f − y, v_i⟩ of each eigenvector: the errors that decay by 1 − ηλ_i a step.

    Args:
        space: Of the kernel.
        predictions: f (n,) or (n, C).
        labels: y, of the same shape.

    Returns:
        (k,) or (k, C).

    Raises:
        ValueError: The two differ in shape, or in length from the kernel.
    """
    fitted, single = _columns("predictions", predictions, space)
    wanted, also_single = _columns("labels", labels, space)
    if fitted.shape != wanted.shape or single != also_single:
        raise ValueError(
            f"labels: got shape {_shape(wanted, also_single)}, wanted {_shape(fitted, single)} as predictions"
        )
    components = _tensor(space.vectors).mT @ (fitted - wanted)
    return output_like(space.vectors, components[:, 0] if single else components)


def predicted_decay(space: Eigenspace, learning_rate: float, steps: SupportsIndex | Sequence[int]) -> Any:
    """(1 − ηλ_i)^t: what gradient descent on ½‖f − y‖² leaves of the error along each eigenvector.

    Exact for a kernel that does not change. η takes the factors of other losses: for ``F.mse_loss``, a mean over n
    samples without the ½, it is 2 · learning rate / n.

    Args:
        space: Of the kernel.
        learning_rate: η.
        steps: t, or several.

    Returns:
        (k,), or (steps, k) for several.

    Raises:
        TypeError: A step is no integer.
        ValueError: The learning rate is not positive, or a step negative.
    """
    _check_learning_rate(learning_rate)
    single = isinstance(steps, SupportsIndex)
    counts = [_step(steps)] if isinstance(steps, SupportsIndex) else [_step(count) for count in steps]
    factors = 1 - learning_rate * _tensor(space.values)
    decay = torch.stack([factors**count for count in counts])
    return output_like(space.vectors, decay[0] if single else decay)


def alpha_window(space: Eigenspace, learning_rate: float, signal: int | None = None) -> AlphaWindow:
    """From 1 / (ηλ_signal) to 1 / (ηλ_noise) steps: when α should fall from 1 towards 0.

    Earlier, the labels' own information has not been learned yet; later, the noise has been. Ours, from the dynamics of
    Dong et al.; their Theorem 1 asks for a slower fall.

    Args:
        space: Of the kernel.
        learning_rate: η of gradient descent on ½‖f − y‖²; see `predicted_decay`.
        signal: How many of the directions count as signal; ``None``: all k, and the next one, whose eigenvalue the
            `gap` tells, is the first of the noise.

    Returns:
        The window; `end` is hardly above `start` where the spectrum has no gap there.

    Raises:
        ValueError: The learning rate is not positive or diverges, `signal` is not within 1 to k, or λ_signal is 0.
    """
    _check_learning_rate(learning_rate)
    values = _tensor(space.values).tolist()
    count = len(values) if signal is None else signal
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(values):
        raise ValueError(f"signal: got {signal!r}, wanted 1 to {len(values)}, the pairs of the eigenspace")
    if learning_rate * values[0] >= 2:
        raise ValueError(
            f"learning_rate: got {learning_rate}, with which gradient descent diverges; wanted below "
            f"{2 / values[0]:.6g}, 2 over the largest eigenvalue"
        )
    slowest = values[count - 1]
    fastest = values[count] if count < len(values) else 0.0 if math.isinf(space.gap) else slowest * (1 - space.gap)
    if slowest <= 0:
        raise ValueError(f"space: eigenvalue {count} is {slowest:.3g}, along which nothing is ever learned")
    return AlphaWindow(1 / (learning_rate * slowest), 1 / (learning_rate * fastest) if fastest > 0 else math.inf)


def noise_sweep(
    space: Eigenspace,
    labels: Any,
    *,
    rates: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    repeats: int = 20,
    flip: Callable[[Tensor, float, torch.Generator], Tensor] | None = None,
    center: bool = False,
    squared: bool = False,
    seed: int = 0,
) -> NoiseSweep:
    """How the information ratio falls as labels are flipped, with its spread over repeated draws.

    Args:
        space: Of the kernel.
        labels: (n,) of two values, such as ±1: a flipped label takes the other one. Or anything that `flip` can change,
            (n,) or (n, C), for one ratio of all columns.
        rates: Shares of the labels to flip: round(rate · n) of them, drawn anew each time.
        repeats: Draws for each rate.
        flip: (labels as a float64 tensor, rate, generator) to noisy ones; ``None`` for labels of two values.
        center: As for `information_ratio`.
        squared: As for `information_ratio`.
        seed: Of the draws.

    Returns:
        The ratios, their mean and standard deviation, by rate.

    Raises:
        ValueError: A rate is outside [0, 1], `repeats` below 1, or the labels have not two values.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats: got {repeats!r}, wanted an integer of at least 1")
    rates = tuple(float(rate) for rate in rates)
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(f"rates: got {rates}, wanted numbers within [0, 1]")
    _warn_where_unstable(space)
    clean, single = _columns("labels", labels, space)
    clean = (clean[:, 0] if single else clean).cpu()
    change = _flipper(clean) if flip is None else flip
    generator = torch.Generator().manual_seed(seed)
    device = _tensor(space.vectors).device
    ratios = torch.empty((len(rates), repeats), dtype=torch.float64, device=device)
    for row, rate in zip(ratios, rates, strict=True):
        for repeat in range(repeats):
            noisy, alone = _columns("flip", change(clean, rate, generator).to(device), space)
            row[repeat] = _ratio(space, noisy, alone, center, squared, True, "flip")
    deviation = ratios.std(1, correction=1) if repeats > 1 else torch.zeros_like(ratios[:, 0])
    arrays = (output_like(space.vectors, array) for array in (ratios.mean(1), deviation, ratios))
    return NoiseSweep(rates, *arrays)


def _flipper(clean: Tensor) -> Callable[[Tensor, float, torch.Generator], Tensor]:
    values = clean.unique()
    if clean.dim() != 1 or len(values) != 2:
        raise ValueError(
            f"labels: got {len(values)} values in shape {_checks.shape_text(clean)}, wanted (n,) of two values, or "
            "flip="
        )
    total = values.sum()

    def flip(labels: Tensor, rate: float, generator: torch.Generator) -> Tensor:
        chosen = torch.randperm(len(labels), generator=generator, device="cpu")[: round(rate * len(labels))]
        noisy = labels.clone()
        noisy[chosen] = total - noisy[chosen]
        return noisy

    return flip


def _ratio(
    space: Eigenspace, columns: Tensor, single: bool, center: bool, squared: bool, joint: bool, name: str = "labels"
) -> Tensor:
    size = columns.abs().max().item() * len(columns) ** 0.5
    if center:
        columns = columns - columns.mean(0)
    inside = (_tensor(space.vectors).mT @ columns).square().sum(0)
    energy = columns.square().sum(0)
    if joint:
        inside, energy = inside.sum(), energy.sum()
    rounding = 1e-15 * size if center else 0.0
    empty = energy.sqrt() <= rounding
    if bool(empty.any()):
        which = "" if single or joint else f" {int(empty.nonzero()[0])}"
        what = "constant, and centred it is zero" if center else "zero"
        raise ValueError(f"{name}: column{which} is {what}, so it has no information ratio")
    share = (inside / energy).clamp(0, 1)
    share = share[0] if single and not joint else share
    return share if squared else share.sqrt()


def _columns(name: str, value: Any, space: Eigenspace) -> tuple[Tensor, bool]:
    """Labels as float64 (n, C) beside the eigenvectors, and whether they came as one vector."""
    vectors = _tensor(space.vectors)
    given = value.detach() if isinstance(value, Tensor) else _tensor(value)
    if not given.is_floating_point():
        raise TypeError(
            f"{name}: got {_checks.dtype_name(given)}, wanted floats: ±1, or one-hot rows for class indices"
        )
    points = len(vectors)
    if given.dim() not in (1, 2) or len(given) != points or 0 in given.shape:
        raise ValueError(
            f"{name}: got shape {_checks.shape_text(given)}, wanted ({points},) or ({points}, C) for the {points} "
            "points of the eigenspace"
        )
    given = given.to(vectors.device, torch.float64)
    if not bool(torch.isfinite(given).all()):
        raise ValueError(f"{name}: holds NaN or infinity, wanted finite numbers")
    return (given[:, None], True) if given.dim() == 1 else (given, False)


def _tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    return torch.from_dlpack(array) if array_api_compat.is_cupy_array(array) else torch.as_tensor(array)


def _shape(columns: Tensor, single: bool) -> str:
    return _checks.shape_text(columns[:, 0] if single else columns)


def _step(count: object) -> int:
    if isinstance(count, bool) or not isinstance(count, SupportsIndex):
        raise TypeError(f"steps: got {type(count).__name__}, wanted integers")
    if operator.index(count) < 0:
        raise ValueError(f"steps: got {count}, wanted at least 0")
    return operator.index(count)


def _check_learning_rate(learning_rate: float) -> None:
    if not _checks.is_number(learning_rate) or not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate: got {learning_rate!r}, wanted a positive number")


def _warn_where_unstable(space: Eigenspace) -> None:
    if not isinstance(space, Eigenspace):
        raise TypeError(f"space: got {type(space).__name__}, wanted an Eigenspace")
    if space.gap < STABLE_GAP:
        _warnings.warn_caller(
            f"the gap between eigenvalues {len(space)} and {len(space) + 1} is {100 * space.gap:.2g} %: the space, "
            "and the information ratio with it, is not determined well; take another k"
        )
    elif space.angle > STABLE_GAP:
        _warnings.warn_caller(
            f"the eigenvectors may be off by an angle of up to {space.angle:.2g}, and the information ratio as much; "
            "lower the tolerance of eigenspace"
        )
