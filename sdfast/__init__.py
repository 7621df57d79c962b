"""Learning from a model's own predictions: fused losses, training on noisy labels, and the theory of rounds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sdfast import baselines as baselines
    from sdfast import data as data
    from sdfast import hilbert as hilbert
    from sdfast import models as models
    from sdfast import nn as nn
    from sdfast import ntk as ntk
    from sdfast import train as train
    from sdfast.ops.distillation import LogProbabilities, TopK, distillation_loss
    from sdfast.ops.linear_distillation import linear_distillation_loss
    from sdfast.ops.linear_self_distillation import linear_self_distillation_loss
    from sdfast.ops.prediction_bank import BankRows, PredictionBank, SuspectedLabels, elr_loss
    from sdfast.ops.self_distillation import (
        AdaptiveAlpha,
        ClassPrior,
        ClipLabel,
        GeneralizedCrossEntropy,
        LossStats,
        SmallLoss,
        self_distillation_loss,
    )

__all__ = [
    "AdaptiveAlpha",
    "BankRows",
    "ClassPrior",
    "ClipLabel",
    "GeneralizedCrossEntropy",
    "LogProbabilities",
    "LossStats",
    "PredictionBank",
    "SmallLoss",
    "SuspectedLabels",
    "TopK",
    "baselines",
    "data",
    "distillation_loss",
    "elr_loss",
    "hilbert",
    "linear_distillation_loss",
    "linear_self_distillation_loss",
    "models",
    "nn",
    "ntk",
    "self_distillation_loss",
    "train",
]

_MODULES = ("baselines", "data", "hilbert", "models", "nn", "ntk", "train")
_HOMES = {  # of the names that self_distillation does not define
    "BankRows": "prediction_bank",
    "LogProbabilities": "distillation",
    "PredictionBank": "prediction_bank",
    "SuspectedLabels": "prediction_bank",
    "TopK": "distillation",
    "distillation_loss": "distillation",
    "elr_loss": "prediction_bank",
    "linear_distillation_loss": "linear_distillation",
    "linear_self_distillation_loss": "linear_self_distillation",
}


# Loaded at first use, torch with them: what needs no torch must import without it.
def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"sdfast.{name}")
    if name in __all__:
        value = getattr(import_module(f"sdfast.ops.{_HOMES.get(name, 'self_distillation')}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sdfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
