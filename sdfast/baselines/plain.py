"""What everything is compared with: plain cross entropy, label smoothing, and this package's own rule."""

from functools import partial

from sdfast import _checks
from sdfast.baselines.method import Method
from sdfast.ops.self_distillation import AdaptiveAlpha, self_distillation_loss


def cross_entropy() -> Method:
    """−log p_y: learns wrong labels as well as right ones, only later.

    Returns:
        The method.
    """
    return Method("cross-entropy", partial(self_distillation_loss, alpha=1.0))


def label_smoothing(smoothing: float = 0.1) -> Method:
    """Cross entropy of (1 − s) y + s / C.

    Args:
        smoothing: s, in [0, 1].

    Returns:
        The method.

    Reference:
        Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 7.
    """
    _checks.check_share("smoothing", smoothing)
    loss = partial(self_distillation_loss, alpha=1.0, label_smoothing=smoothing)
    return Method("label-smoothing", loss, smoothing=smoothing)


def self_distillation(ratio: float = 1.0) -> Method:
    """Cross entropy of α y + (1 − α) hardmax(f(x)), with 1 − α = ratio · accuracy of the batch.

    Args:
        ratio: λ, non-negative.

    Returns:
        The method.

    Reference:
        Dong, Hou, Lu, Zhang 2019, "Distillation ≈ Early Stopping?", Algorithm 1.
    """
    return Method("self-distillation", partial(self_distillation_loss, alpha=AdaptiveAlpha(ratio)), ratio=ratio)
