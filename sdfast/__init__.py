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
    from sdfast import train as train
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
    "LossStats",
    "PredictionBank",
    "SmallLoss",
    "SuspectedLabels",
    "baselines",
    "data",
    "elr_loss",
    "hilbert",
    "models",
    "nn",
    "self_distillation_loss",
    "train",
]

_BANK = ("BankRows", "PredictionBank", "SuspectedLabels", "elr_loss")
_MODULES = ("baselines", "data", "hilbert", "models", "nn", "train")


# Loaded at first use, torch with them: what needs no torch must import without it.
def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"sdfast.{name}")
    if name in __all__:
        folder = "prediction_bank" if name in _BANK else "self_distillation"
        value = getattr(import_module(f"sdfast.ops.{folder}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sdfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
