"""Row weights that follow from the batch itself: what ``row_weight`` may be beside a tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from sdfast import _checks


@dataclass(frozen=True)
class GeneralizedCrossEntropy:
    """The row weight w = p_label^q, detached, with p = softmax(logits): generalised cross entropy.

    With α = 1 and ``loss="cross_entropy"`` the gradient is exactly that of (1 − p_label^q) / q, the paper's loss, which
    lies between cross entropy (q → 0) and the mean absolute error (q = 1). The value of the loss is another one: the
    weighted cross entropy p_label^q · (−log p_label), which is 0 where p_label is.

    The kernel takes the weight from the softmax it computes anyway. Index labels only, and no ``mse``.

    Args:
        q: In (0, 1]; the paper's 0.7 by default, which is also what ``row_weight="gce"`` takes.

    Raises:
        ValueError: `q` is outside (0, 1].

    Reference:
        Zhang, Sabuncu 2018, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
        equation 6 and the gradient after it.
    """

    q: float = 0.7

    def __post_init__(self) -> None:
        if not _checks.is_number(self.q) or not 0 < self.q <= 1:
            raise ValueError(f"q: got {self.q!r}, wanted a number in (0, 1]")


@dataclass(frozen=True, eq=False)
class SmallLoss:
    """The row weights 1 for the rows of smallest loss in the batch and 0 for the others.

    ⌈keep · n⌉ of the n rows that are not ignored are kept, at least one of them where there is one. Equal losses go to
    the row that comes first, and a row whose loss is NaN comes after all others. All of it happens on the device.

    As any row weight it changes no denominator: ``mean`` still divides by n. For the mean over the rows selected take
    ``reduction="sum"`` and divide by their number.

    Args:
        keep: The share of rows to keep, in (0, 1]; taken as a fraction with a denominator of at most a million.
        logits: (..., C), whose losses are ranked instead of those of the call's own logits: those of the other network,
            in Co-teaching. The rows' targets are made from them too, where the call has no `source`.

    Raises:
        ValueError: `keep` is outside (0, 1].

    Reference:
        Han et al. 2018, "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels",
        algorithm 1, lines 4 to 5.
    """

    keep: float
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        if not _checks.is_number(self.keep) or not 0 < self.keep <= 1:
            raise ValueError(f"keep: got {self.keep!r}, wanted a number in (0, 1]")

    def rows_of(self, kept: Tensor) -> Tensor:
        """How many rows it keeps of so many, a 0-d integer tensor: in whole numbers, so that no rounding decides."""
        share = Fraction(self.keep).limit_denominator(1_000_000)
        return torch.minimum((-(-kept * share.numerator // share.denominator)).clamp(min=1), kept)


RowWeight = Tensor | GeneralizedCrossEntropy | SmallLoss | str | None


def row_weights(
    row_weight: Tensor | GeneralizedCrossEntropy | SmallLoss | str,
    logits: Tensor,
    labels: Tensor,
    rows: Tensor,
    loss: str,
    ignore_index: int,
    losses: Callable[[Tensor], Any],
) -> tuple[float, Tensor | None]:
    """(q, None) of a generalised cross entropy, else (0, (N,) weights).

    `rows` are the labels as `_checks.check_labels` returns them; ``losses(logits)`` is the call's loss of each row of
    other logits.
    """
    if isinstance(row_weight, str):
        if row_weight != "gce":
            wanted = "'gce', a tensor, sdfast.GeneralizedCrossEntropy or sdfast.SmallLoss"
            raise ValueError(f"row_weight: got {row_weight!r}, wanted {wanted}")
        row_weight = GeneralizedCrossEntropy()
    if isinstance(row_weight, GeneralizedCrossEntropy):
        if loss == "mse":
            raise ValueError("row_weight: generalised cross entropy weighs by a probability, got loss='mse'")
        if rows.dim() == 2:
            raise ValueError("row_weight: generalised cross entropy wants index labels, got a distribution a row")
        return float(row_weight.q), None
    if isinstance(row_weight, SmallLoss):
        row_weight = _small_loss_weights(row_weight, logits, labels, ignore_index, losses)
    weight = _checks.check_weight("row_weight", row_weight, logits.shape[:-1], "(one a row)", logits)
    return 0.0, weight.reshape(-1)


def _small_loss_weights(
    rule: SmallLoss, logits: Tensor, labels: Tensor, ignore_index: int, losses: Callable[[Tensor], Any]
) -> Tensor:
    ranked = logits if rule.logits is None else rule.logits
    if rule.logits is not None:
        _checks.check_floating("row_weight: logits", ranked)
        if ranked.shape != logits.shape or ranked.device != logits.device:
            got, wanted = (f"{_checks.shape_text(x)} on {x.device}" for x in (ranked, logits))
            raise ValueError(f"row_weight: got SmallLoss with logits {got}, wanted {wanted} as the call's")
    with torch.no_grad():
        values = losses(ranked.detach())
        kept = torch.ones_like(values) if labels.is_floating_point() else labels.to(torch.int64) != ignore_index
        return lowest(values.reshape(-1), kept.reshape(-1).bool(), rule).reshape(values.shape)


def lowest(losses: Tensor, kept: Tensor, rule: SmallLoss) -> Tensor:
    """1 at the rule's smallest losses among the rows `kept`, else 0; the first of equal ones, NaN last."""
    wanted = rule.rows_of(kept.sum())
    order = losses.argsort(stable=True)
    among = kept[order]
    selected = torch.zeros_like(losses)
    return selected.scatter(0, order, (among & (among.cumsum(0) <= wanted)).to(losses.dtype))
