"""Self-distillation in a Hilbert space: the closed-form theory on any kernel, on NumPy and CuPy arrays, without torch.

Mobahi, Farajtabar, Bartlett 2020, and what came after. ``docs/hilbert.md`` has each result beside its function.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sdfast.hilbert.distill import self_distill
from sdfast.hilbert.path import DistillationPath
from sdfast.hilbert.selection import RoundChoice
from sdfast.hilbert.spectrum import Infeasible, Spectrum, decompose

if TYPE_CHECKING:
    import sdfast.hilbert.bounds as bounds
    import sdfast.hilbert.kernels as kernels
    import sdfast.hilbert.mixing as mixing
    from sdfast.hilbert.estimator import KernelSelfDistillation, KernelSelfDistillationClassifier

__all__ = [
    "DistillationPath",
    "Infeasible",
    "KernelSelfDistillation",
    "KernelSelfDistillationClassifier",
    "RoundChoice",
    "Spectrum",
    "bounds",
    "decompose",
    "kernels",
    "mixing",
    "self_distill",
]

_MODULES = ("bounds", "kernels", "mixing")
_ESTIMATORS = ("KernelSelfDistillation", "KernelSelfDistillationClassifier")


# Loaded at first use: scikit-learn takes a second to import, and the path does not need it.
def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"sdfast.hilbert.{name}")
    if name in _ESTIMATORS:
        return getattr(import_module("sdfast.hilbert.estimator"), name)
    raise AttributeError(f"module 'sdfast.hilbert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
