"""The networks of the papers, and others by name."""

from sdfast.models.cifar_resnet import CifarResNet
from sdfast.models.mlp import mlp
from sdfast.models.registry import MODELS, make_model, register
from sdfast.models.shake_shake import ShakeShake26
from sdfast.models.small_cnn import small_cnn
from sdfast.models.two_layer import TwoLayerNet
from sdfast.models.vgg import Vgg16
from sdfast.models.wide_resnet import WideResNet

__all__ = [
    "MODELS",
    "CifarResNet",
    "ShakeShake26",
    "TwoLayerNet",
    "Vgg16",
    "WideResNet",
    "make_model",
    "mlp",
    "register",
    "small_cnn",
]
