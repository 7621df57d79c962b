"""Shake-Shake regularised residual networks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdfast.models.initialise import initialise

__all__ = ["ShakeShake26"]


def shake(first: Tensor, second: Tensor) -> Tensor:
    """α·first + (1−α)·second, with another random β in the place of α on the way back; one of each for every picture.

    Args:
        first: (N, …).
        second: (N, …).

    Returns:
        (N, …).
    """
    shape = (len(first),) + (1,) * (first.dim() - 1)
    forward, backward = torch.rand(2, *shape, device=first.device, dtype=first.dtype)
    mixed = second + backward * (first - second)
    return mixed + ((forward - backward) * (first - second)).detach()


class Branch(nn.Sequential):
    """ReLU, 3×3 convolution, BatchNorm, twice.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )


class Shortcut(nn.Module):
    """Two 1×1 convolutions of stride 2, the second of the picture moved by one pixel, side by side.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out, half from each.
        stride: 1 or 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.first = nn.Conv2d(inputs, outputs // 2, 1, bias=False)
        self.second = nn.Conv2d(inputs, outputs - outputs // 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The narrowed picture."""
        x = F.relu(x)
        moved = F.pad(x, (-1, 1, -1, 1))
        halves = [
            self.first(x[:, :, :: self.stride, :: self.stride]),
            self.second(moved[:, :, :: self.stride, :: self.stride]),
        ]
        return self.norm(torch.cat(halves, 1))


class ShakeBlock(nn.Module):
    """x plus a random mixture of two branches; in evaluation their mean.

    Args:
        inputs: Channels of x.
        outputs: Channels of the result.
        stride: Of the branches and the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = Branch(inputs, outputs, stride)
        self.second = Branch(inputs, outputs, stride)
        self.shortcut = None if inputs == outputs else Shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        first, second = self.first(x), self.second(x)
        mixed = shake(first, second) if self.training else (first + second) / 2
        return mixed + (x if self.shortcut is None else self.shortcut(x))


class ShakeShake26(nn.Module):
    """Shake-Shake-26 2×``width``d with one draw for every picture (Shake-Shake-Image).

    Args:
        width: Channels of the first stage: 32 in Dong et al.; 64, 96 and 112 in the original.
        num_classes: Outputs.
        channels: Of the pictures.

    Raises:
        ValueError: `width` is below 1.

    Reference:
        Gastaldi 2017, "Shake-Shake regularization".
    """

    def __init__(self, width: int = 32, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width: got {width}, wanted at least 1")
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        inputs = 16
        for stage, outputs in enumerate((width, 2 * width, 4 * width)):
            for block in range(4):
                blocks.append(ShakeBlock(inputs, outputs, 2 if block == 0 and stage else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of pictures (N, channels, height, width)."""
        out = F.relu(self.blocks(self.norm(self.conv(x))))
        return self.classifier(out.mean((2, 3)))
