"""What a kernel's top eigenspace holds of a data set's labels, as ``sdfast ntk --topk`` and ``sdfast demo`` tell it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import report
from sdfast.data import flip_labels
from sdfast.ntk.eigenspace import Eigenspace
from sdfast.ntk.information import NoiseSweep, noise_sweep

RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
REPEATS = 20


def coded(labels: Tensor, num_classes: int, positive: Sequence[int] | None = None) -> Tensor:
    """Class indices as what a ratio can be taken of, in float64.

    Args:
        labels: (n,) class indices.
        num_classes: C.
        positive: Classes that count as +1, and all others as −1; ``None`` keeps all C.

    Returns:
        (n,) of ±1, or one-hot rows (n, C).
    """
    if positive is None:
        return F.one_hot(labels.long(), num_classes).double()
    return torch.isin(labels, torch.tensor(positive)).double() * 2 - 1


def sweep(space: Eigenspace, targets: Tensor, rates: Sequence[float], repeats: int, center: bool, seed: int = 0):
    """`noise_sweep` of coded labels: a flipped ±1 takes the other sign, a flipped class is any other class.

    Args:
        space: Of the kernel.
        targets: As `coded` gives them.
        rates: Shares of the labels that become wrong.
        repeats: Draws for each.
        center: As for `information_ratio`.
        seed: Of the draws.

    Returns:
        The ratios; of one-hot rows one for all classes together.
    """
    flip = _other_class if targets.dim() == 2 else None
    return noise_sweep(space, targets, rates=rates, repeats=repeats, flip=flip, center=center, seed=seed)


def _other_class(targets: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    classes = targets.shape[1]
    noisy = flip_labels(targets.argmax(1), rate, classes, convention="others", exact=True, generator=generator)
    return F.one_hot(noisy.labels, classes).double()


def space_results(space: Eigenspace) -> dict[str, Any]:
    """An eigenspace as JSON has it; what is infinite is null there."""
    return {
        "k": len(space),
        "values": space.values.tolist(),
        "residuals": space.residuals.tolist(),
        "converged": space.converged.tolist(),
        "gap": space.gap if math.isfinite(space.gap) else None,
        "angle": space.angle if math.isfinite(space.angle) else None,
        "method": space.method,
    }


def sweep_results(found: NoiseSweep) -> dict[str, Any]:
    """A sweep as JSON has it."""
    return {"rates": list(found.rates), **{name: getattr(found, name).tolist() for name in NoiseSweep._fields[1:]}}


def sweep_table(results: dict[str, Any]) -> str:
    """The same for a terminal."""
    rows = [
        (f"{100 * rate:g} %", f"{mean:.3f}", f"{deviation:.3f}")
        for rate, mean, deviation in zip(results["rates"], results["mean"], results["deviation"], strict=True)
    ]
    return report.plain_table(("labels flipped", "information ratio", "standard deviation"), rows)


def space_line(results: dict[str, Any], ratio: float) -> str:
    """An eigenspace and the labels' share of it in a sentence."""
    gap = "none, k = n" if results["gap"] is None else f"{100 * results['gap']:.2g} %"
    return (
        f"top {results['k']} ({results['method']}): largest residual {max(results['residuals']):.2g}, gap to the next "
        f"{gap}; information ratio of the labels {ratio:.3f}"
    )
