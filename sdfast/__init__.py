"""Learning from a model's own predictions: fused losses, training on noisy labels, and the theory of rounds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sdfast import data as data
    from sdfast import hilbert as hilbert
    from sdfast import models as models
    from sdfast import nn as nn
    from sdfast import ntk as ntk
    from sdfast import train as train
    from sdfast.ops.self_distillation import AdaptiveAlpha, ClipLabel, LossStats, self_distillation_loss

__all__ = [
    "AdaptiveAlpha",
    "ClipLabel",
    "LossStats",
    "data",
    "hilbert",
    "models",
    "nn",
    "ntk",
    "self_distillation_loss",
    "train",
]

_MODULES = ("data", "hilbert", "models", "nn", "ntk", "train")


# Loaded at first use, torch with them: what needs no torch must import without it.
def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"sdfast.{name}")
    if name in __all__:
        value = getattr(import_module("sdfast.ops.self_distillation"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sdfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
