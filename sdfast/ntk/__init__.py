"""The neural tangent kernel of a network: its Gram matrices, their eigenspaces, and what labels hold in them."""

from sdfast.ntk.eigenspace import Eigenspace, eigenspace
from sdfast.ntk.information import (
    AlphaWindow,
    NoiseSweep,
    alpha_window,
    error_components,
    information_gain,
    information_ratio,
    noise_sweep,
    predicted_decay,
)

__all__ = [
    "AlphaWindow",
    "Eigenspace",
    "NoiseSweep",
    "alpha_window",
    "eigenspace",
    "error_components",
    "information_gain",
    "information_ratio",
    "noise_sweep",
    "predicted_decay",
]
