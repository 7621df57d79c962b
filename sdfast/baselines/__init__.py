"""The methods that learning from noisy labels is compared with: each a loss with its memory, ready for the trainer."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sdfast import _checks
from sdfast.baselines.bank_self_distillation import bank_self_distillation
from sdfast.baselines.bootstrapping import bootstrap_hard, bootstrap_soft
from sdfast.baselines.born_again import born_again
from sdfast.baselines.co_teaching import TwoNetworks, co_teaching
from sdfast.baselines.d2l import d2l
from sdfast.baselines.early_learning import elr
from sdfast.baselines.generalized_cross_entropy import generalized_cross_entropy
from sdfast.baselines.joint_optimisation import joint_optimisation
from sdfast.baselines.label_correction import selc, self_adaptive_training
from sdfast.baselines.label_filtering import confident_learning, confident_samples, self_ensemble_filtering
from sdfast.baselines.mentor_net import mentor_net
from sdfast.baselines.method import Method
from sdfast.baselines.plain import cross_entropy, label_smoothing, self_distillation
from sdfast.baselines.pro_self_lc import pro_self_lc
from sdfast.baselines.ps_kd import ps_kd

__all__ = [
    "METHODS",
    "Method",
    "TwoNetworks",
    "bank_self_distillation",
    "bootstrap_hard",
    "bootstrap_soft",
    "born_again",
    "co_teaching",
    "confident_learning",
    "confident_samples",
    "cross_entropy",
    "d2l",
    "elr",
    "generalized_cross_entropy",
    "joint_optimisation",
    "label_smoothing",
    "make_method",
    "mentor_net",
    "pro_self_lc",
    "ps_kd",
    "selc",
    "self_adaptive_training",
    "self_distillation",
    "self_ensemble_filtering",
]

METHODS: dict[str, Callable[..., Method]] = {
    "cross-entropy": cross_entropy,
    "label-smoothing": label_smoothing,
    "bootstrap-hard": bootstrap_hard,
    "bootstrap-soft": bootstrap_soft,
    "d2l": d2l,
    "gce": generalized_cross_entropy,
    "co-teaching": co_teaching,
    "mentor-net": mentor_net,
    "self-ensemble-filtering": self_ensemble_filtering,
    "confident-samples": confident_samples,
    "confident-learning": confident_learning,
    "joint-optimisation": joint_optimisation,
    "selc": selc,
    "self-adaptive-training": self_adaptive_training,
    "pro-self-lc": pro_self_lc,
    "born-again": born_again,
    "ps-kd": ps_kd,
    "elr": elr,
    "bank-self-distillation": bank_self_distillation,
    "self-distillation": self_distillation,
}


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options of a method, without what the training set says.

    Args:
        name: One of `METHODS`.

    Returns:
        Parameters by name.

    Raises:
        ValueError: There is no such method.
    """
    _checks.check_option("method", name, METHODS)
    given = ("labels", "num_samples", "num_classes")
    return {key: value for key, value in inspect.signature(METHODS[name]).parameters.items() if key not in given}


def make_method(name: str, labels: Tensor, num_classes: int, **options: Any) -> Method:
    """A method by its name, for a training set.

    Args:
        name: One of `METHODS`.
        labels: (num_samples,) the training labels as given.
        num_classes: Of the logits.
        options: Of the method, instead of its defaults.

    Returns:
        The method, on the labels' device.

    Raises:
        TypeError: The method has no such option, or wants one that is not given.
        ValueError: There is no such method, or an option is impossible.
    """
    known = options_of(name)
    for option in options:
        if option not in known:
            has = f"has {', '.join(known)}" if known else "has none"
            raise TypeError(f"{option}: the method {name} has no such option; it {has}")
    missing = [key for key, value in known.items() if value.default is inspect.Parameter.empty and key not in options]
    if missing:
        raise TypeError(f"{missing[0]}: the method {name} wants it, and it has no default")
    given = {"labels": labels, "num_samples": len(labels), "num_classes": num_classes}
    from_data = {key: given[key] for key in inspect.signature(METHODS[name]).parameters if key in given}
    return METHODS[name](**from_data, **options).to(labels.device)
