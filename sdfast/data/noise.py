"""Label noise: labels made wrong on purpose, so that robustness to it can be measured."""

from typing import NamedTuple

import torch
from torch import Tensor

from sdfast import _checks

__all__ = ["NoisyLabels", "flip_labels"]


class NoisyLabels(NamedTuple):
    """What `flip_labels` returns.

    Attributes:
        labels: The noisy labels, like those given in shape, dtype and device.
        flipped: Where they differ from those given, bool.
        realised_rate: The share that differs: after a redraw over all classes about rate · (C − 1) / C. Of the rows
            kept, where `ignore_index` names others.
    """

    labels: Tensor
    flipped: Tensor
    realised_rate: float


def flip_labels(
    labels: Tensor,
    rate: float,
    num_classes: int,
    kind: str = "symmetric",
    *,
    convention: str = "all",
    transition: Tensor | None = None,
    exact: bool = False,
    ignore_index: int | None = None,
    generator: torch.Generator | None = None,
) -> NoisyLabels:
    """Chooses a share of the labels and replaces them by others.

    A label is chosen with probability `rate`, each independently. A chosen label c becomes

    - ``kind="symmetric"``, ``convention="all"``: a uniform draw over all classes, c included, so that about
      rate · (C − 1) / C of the labels are wrong (Dong et al. 2019; Early-Learning Regularisation).
    - ``kind="symmetric"``, ``convention="others"``: a uniform draw over the C − 1 others, so that about `rate` of the
      labels are wrong (Co-teaching).
    - ``kind="asymmetric"``: a draw from row c of `transition`. For class pairs that are taken for each other, put a 1
      at [c, wrong class] and on the diagonal of every other row.
    - ``kind="pair"``: (c + 1) mod C (Co-teaching).

    Args:
        labels: Class indices of any shape, integers. Not changed.
        rate: Probability with which a label is chosen, in [0, 1].
        num_classes: C, at least 2.
        kind: ``"symmetric"``, ``"asymmetric"`` or ``"pair"``.
        convention: ``"all"`` or ``"others"``, for symmetric noise only.
        transition: (C, C) probabilities, each row summing to 1; for asymmetric noise, and only there.
        exact: Choose exactly round(rate · N) labels, at random, as Early-Learning Regularisation does.
        ignore_index: Labels of this index stay as they are and count for nothing; ``None`` refuses what is no class.
        generator: Of the draws, on the CPU, so that the noise is the same wherever the labels live; ``None`` is torch's
            global one.

    Returns:
        The noisy labels, which of them are wrong, and the share that is.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A value is impossible, or options do not go together; the message names the argument.
    """
    _check_arguments(labels, rate, num_classes, kind, convention, transition, ignore_index, generator)
    given = labels.detach().cpu().reshape(-1).to(torch.int64)
    kept = torch.ones(len(given), dtype=torch.bool, device="cpu") if ignore_index is None else given != ignore_index
    clean = given[kept]
    if exact:
        chosen = torch.zeros(len(clean), dtype=torch.bool, device="cpu")
        chosen[torch.randperm(len(clean), generator=generator, device="cpu")[: round(rate * len(clean))]] = True
    else:
        chosen = torch.rand(len(clean), generator=generator, dtype=torch.float64, device="cpu") < rate
    if kind == "pair":
        replacement = (clean + 1) % num_classes
    elif transition is not None:
        replacement = _draw_by_transition(clean, transition, generator)
    elif convention == "all":
        replacement = torch.randint(num_classes, (len(clean),), generator=generator, device="cpu")
    else:
        steps = torch.randint(1, num_classes, (len(clean),), generator=generator, device="cpu")
        replacement = (clean + steps) % num_classes
    noisy = given.masked_scatter(kept, torch.where(chosen, replacement, clean))
    flipped = noisy != given
    realised = int(flipped.sum()) / len(clean) if len(clean) else 0.0
    noisy = noisy.reshape(labels.shape).to(labels.device, labels.dtype)
    return NoisyLabels(noisy, flipped.reshape(labels.shape).to(labels.device), realised)


def _draw_by_transition(clean: Tensor, transition: Tensor, generator: torch.Generator | None) -> Tensor:
    probabilities = transition.detach().cpu().to(torch.float64)
    drawn = clean.clone()
    for label in range(len(probabilities)):  # one class at a time: never N x C numbers
        rows = (clean == label).nonzero()[:, 0]
        if len(rows):
            drawn[rows] = torch.multinomial(probabilities[label], len(rows), replacement=True, generator=generator)
    return drawn


def _check_arguments(
    labels: Tensor,
    rate: float,
    num_classes: int,
    kind: str,
    convention: str,
    transition: Tensor | None,
    ignore_index: object,
    generator: object,
) -> None:
    _checks.check_tensor("labels", labels)
    if labels.dtype not in _checks.INTEGRAL:
        raise TypeError(f"labels: got {_checks.dtype_name(labels)}, wanted integer class indices")
    if labels.is_meta:
        raise ValueError("labels: are on the meta device, which holds no values")
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise TypeError(f"rate: got {type(rate).__name__}, wanted a number in [0, 1]")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: got {rate}, wanted within [0, 1]")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(f"num_classes: got {type(num_classes).__name__}, wanted an integer")
    if num_classes < 2:
        raise ValueError(f"num_classes: got {num_classes}, wanted at least 2")
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, wanted an integer or None")
    _check_range(labels, num_classes, ignore_index)
    if num_classes - 1 > torch.iinfo(labels.dtype).max:
        raise ValueError(f"num_classes: got {num_classes}, more than {_checks.dtype_name(labels)} labels can name")
    _checks.check_option("kind", kind, ("symmetric", "asymmetric", "pair"))
    _checks.check_option("convention", convention, ("all", "others"))
    if convention != "all" and kind != "symmetric":
        raise ValueError(f"convention: got {convention!r}, but only kind='symmetric' has one, not {kind!r}")
    if (transition is None) == (kind == "asymmetric"):
        wanted = "wanted a (classes, classes) tensor" if transition is None else "only kind='asymmetric' takes one"
        got = "None" if transition is None else type(transition).__name__
        raise ValueError(f"transition: got {got} with kind={kind!r}, {wanted}")
    if transition is not None:
        _check_transition(transition, num_classes)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}, wanted a torch.Generator")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator: is on {generator.device}, wanted one on the CPU, wherever the labels live")


def _check_range(labels: Tensor, num_classes: int, ignore_index: int | None) -> None:
    kept = labels if ignore_index is None else labels[labels != ignore_index]
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < num_classes:
        hint = "; ignore_index= keeps one of them as it is" if ignore_index is None and int(kept.min()) < 0 else ""
        got = f"{int(kept.min())} to {int(kept.max())}"
        raise ValueError(f"labels: got {got}, wanted 0 <= label < {num_classes}{hint}")


def _check_transition(transition: Tensor, num_classes: int) -> None:
    _checks.check_floating("transition", transition)
    if tuple(transition.shape) != (num_classes, num_classes):
        raise ValueError(
            f"transition: got shape {_checks.shape_text(transition)}, wanted ({num_classes}, {num_classes}) for "
            f"num_classes={num_classes}"
        )
    sums = transition.double().sum(1)
    tolerance = max(1e-4, torch.finfo(transition.dtype).eps)  # entries rounded to halves sum to 1 no better
    bad = ~((transition >= 0).all(1) & ((sums - 1).abs() <= tolerance))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"transition: row {row} sums to {float(sums[row]):g} with smallest entry {float(transition[row].min()):g}, "
            "wanted non-negative entries that sum to 1"
        )
