"""ResNets for pictures of 32×32 pixels."""

import torch.nn.functional as F
from torch import Tensor, nn

from sdfast.models.initialise import initialise

__all__ = ["CifarResNet"]


class BasicBlock(nn.Module):
    """relu(x + f(x)), f two 3×3 convolutions with BatchNorm; a wider x has zeros in its new channels, no weights.

    Args:
        inputs: Channels of x.
        outputs: Channels of the result.
        stride: Of the first convolution, and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.missing = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        if self.stride > 1 or self.missing:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The ResNet of depth 6n + 2 for CIFAR: a convolution, three stages of n blocks with 16, 32, 64 channels.

    Args:
        depth: 20, 32, 44, 56, 110 in the paper; 6n + 2.
        num_classes: Outputs.
        channels: Of the pictures.

    Raises:
        ValueError: `depth` is not 6n + 2.

    Reference:
        He, Zhang, Ren, Sun 2016, "Deep Residual Learning for Image Recognition", §4.2, with identity shortcuts
        (option A).
    """

    def __init__(self, depth: int, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth: got {depth}, wanted 6n + 2: 20, 32, 44, 56, 110")
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        inputs = 16
        for outputs in (16, 32, 64):
            for block in range((depth - 2) // 6):
                blocks.append(BasicBlock(inputs, outputs, 2 if block == 0 and outputs > 16 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(64, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of pictures (N, channels, height, width)."""
        out = self.blocks(F.relu(self.norm(self.conv(x))))
        return self.classifier(out.mean((2, 3)))
