"""Wide residual networks for pictures of 32×32 pixels."""

import torch.nn.functional as F
from torch import Tensor, nn

from sdfast.models.initialise import initialise

__all__ = ["WideResNet"]


class WideBlock(nn.Module):
    """x + f(x) with BatchNorm and ReLU before each of the two convolutions of f.

    Args:
        inputs: Channels of x.
        outputs: Channels of the result.
        stride: Of the first convolution, and of the shortcut.
        dropout: Rate between the convolutions.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        active = F.relu(self.norm1(x))
        out = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(active)))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-depth-width: stages of 16, 32 and 64 times `width` channels.

    Args:
        depth: 6n + 4, such as 16, 28, 40.
        width: The widening factor k.
        num_classes: Outputs.
        channels: Of the pictures.
        dropout: Rate inside the blocks.

    Raises:
        ValueError: `depth` is not 6n + 4, or `width` is below 1.

    Reference:
        Zagoruyko, Komodakis 2016, "Wide Residual Networks". Dong et al. 2019 do not say which factor theirs has.
    """

    def __init__(
        self, depth: int = 28, width: int = 10, num_classes: int = 10, channels: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth: got {depth}, wanted 6n + 4: 16, 22, 28, 40")
        if width < 1:
            raise ValueError(f"width: got {width}, wanted at least 1")
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        inputs = 16
        for stage, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range((depth - 4) // 6):
                blocks.append(WideBlock(inputs, outputs, 2 if block == 0 and stage else 1, dropout))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of pictures (N, channels, height, width)."""
        out = F.relu(self.norm(self.blocks(self.conv(x))))
        return self.classifier(out.mean((2, 3)))
