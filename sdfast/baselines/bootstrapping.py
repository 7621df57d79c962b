"""Bootstrapping: the model's own prediction as a second opinion on the label."""

from functools import partial

from torch import Tensor

from sdfast import _checks
from sdfast.baselines.method import Method, mean_entropy
from sdfast.ops.self_distillation import LossStats, self_distillation_loss


def bootstrap_hard(beta: float = 0.8) -> Method:
    """Cross entropy of β y + (1 − β) hardmax(f(x)).

    Args:
        beta: Weight of the given label, in [0, 1].

    Returns:
        The method.

    Reference:
        Reed et al. 2015, "Training Deep Neural Networks on Noisy Labels with Bootstrapping", equation 7.
    """
    _checks.check_share("beta", beta)
    return Method("bootstrap-hard", partial(self_distillation_loss, alpha=beta), beta=beta)


def bootstrap_soft(beta: float = 0.95) -> Method:
    """Cross entropy of β y + (1 − β) p against p itself, differentiated through both: β CE + (1 − β) entropy.

    A target that were constant to the gradient would make it plain cross entropy at β times the learning rate.

    Args:
        beta: Weight of the given label, in [0, 1].

    Returns:
        The method.

    Reference:
        Reed et al. 2015, equation 6.
    """
    _checks.check_share("beta", beta)

    def loss(logits: Tensor, labels: Tensor, return_stats: bool = True) -> tuple[Tensor, LossStats]:
        given, stats = self_distillation_loss(logits, labels, 1.0, return_stats=return_stats)
        alpha = stats.alpha.new_full((), beta)
        return beta * given + (1 - beta) * mean_entropy(logits, labels), stats._replace(alpha=alpha)

    return Method("bootstrap-soft", loss, beta=beta)
