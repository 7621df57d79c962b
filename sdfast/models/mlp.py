"""Fully connected networks."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

__all__ = ["mlp"]


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """A fully connected ReLU network, with torch's own initialisation.

    Args:
        widths: Of every layer, input and output included: ``(64, 256, 256, 10)``.

    Returns:
        Linear layers with a ReLU between any two.

    Raises:
        ValueError: There are fewer than two widths, or one is below 1.
    """
    if len(widths) < 2 or any(width < 1 for width in widths):
        raise ValueError(f"widths: got {list(widths)}, wanted at least two positive widths")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
