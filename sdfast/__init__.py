"""Learning from a model's own predictions: fused losses, training on noisy labels, and the theory of rounds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sdfast import data as data
    from sdfast import hilbert as hilbert
    from sdfast import models as models
    from sdfast import nn as nn
    from sdfast import train as train
    from sdfast.ops.distillation import LogProbabilities, TopK, distillation_loss
    from sdfast.ops.linear_distillation import linear_distillation_loss
    from sdfast.ops.linear_self_distillation import linear_self_distillation_loss
    from sdfast.ops.self_distillation import AdaptiveAlpha, ClipLabel, LossStats, self_distillation_loss

__all__ = [
    "AdaptiveAlpha",
    "ClipLabel",
    "LogProbabilities",
    "LossStats",
    "TopK",
    "data",
    "distillation_loss",
    "hilbert",
    "linear_distillation_loss",
    "linear_self_distillation_loss",
    "models",
    "nn",
    "self_distillation_loss",
    "train",
]

_MODULES = ("data", "hilbert", "models", "nn", "train")
_HOMES = {
    "LogProbabilities": "distillation",
    "TopK": "distillation",
    "distillation_loss": "distillation",
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
