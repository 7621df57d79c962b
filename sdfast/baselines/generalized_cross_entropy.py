"""Generalised cross entropy: rows whose label the model finds unlikely count less."""

from functools import partial

from sdfast.baselines.method import Method
from sdfast.ops.self_distillation import GeneralizedCrossEntropy, self_distillation_loss


def generalized_cross_entropy(q: float = 0.7) -> Method:
    """The gradient of (1 − p_y^q) / q, as cross entropy weighted by the constant p_y^q, which is the value returned.

    Args:
        q: In (0, 1]: towards 0 cross entropy, at 1 the mean absolute error.

    Returns:
        The method.

    Reference:
        Zhang, Sabuncu 2018, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels".
    """
    rule = GeneralizedCrossEntropy(q)
    return Method("gce", partial(self_distillation_loss, alpha=1.0, row_weight=rule), q=q)
