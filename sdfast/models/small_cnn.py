"""The small student of Dong et al. 2019, Table 2."""

import math
from collections.abc import Sequence

from torch import nn

__all__ = ["small_cnn"]


def small_cnn(input_shape: Sequence[int], num_classes: int, dropout: float = 0.0) -> nn.Sequential:
    """Three times [3×3 convolution, BatchNorm, ReLU, 2×2 max pooling] and two fully connected layers.

    The paper prints 10 outputs beside CIFAR-100, which has 100 classes, and a dropout without its rate, after the last
    layer; here it stands before it, and by default there is none. A picture of less than 8 pixels is pooled while it
    can be.

    Args:
        input_shape: (channels, height, width) of a picture.
        num_classes: Outputs.
        dropout: Rate before the last layer.

    Returns:
        The network.

    Raises:
        ValueError: `input_shape` is no picture's.

    Reference:
        Dong, Hou, Lu, Zhang 2019, Table 2.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(f"input_shape: got {tuple(input_shape)}, wanted (channels, height, width)")
    channels, *size = input_shape
    layers: list[nn.Module] = []
    for width in (32, 64, 128):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        if min(size) >= 2:
            layers.append(nn.MaxPool2d(2))
            size = [side // 2 for side in size]
        channels = width
    features = channels * math.prod(size)
    layers += [nn.Flatten(), nn.Linear(features, 512), nn.BatchNorm1d(512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(512, num_classes))
