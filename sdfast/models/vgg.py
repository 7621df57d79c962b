"""VGG for pictures of 32×32 pixels."""

from torch import Tensor, nn

from sdfast.models.initialise import initialise

__all__ = ["Vgg16"]

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Vgg16(nn.Module):
    """VGG-16 with BatchNorm and one fully connected layer, as it is used on CIFAR.

    Args:
        num_classes: Outputs.
        channels: Of the pictures, whose sides are at least 32.

    Reference:
        Simonyan, Zisserman 2015, configuration D; its three fully connected layers are for 224 × 224 pixels, and one
        takes their place on 32 × 32.
    """

    def __init__(self, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stage in WIDTHS:
            for outputs in stage:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of pictures (N, channels, height, width)."""
        return self.classifier(self.features(x).mean((2, 3)))
