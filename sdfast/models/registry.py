"""Networks by name, and functions of one's own by ``module:function``."""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from sdfast.models.cifar_resnet import CifarResNet
from sdfast.models.mlp import mlp
from sdfast.models.shake_shake import ShakeShake26
from sdfast.models.small_cnn import small_cnn
from sdfast.models.two_layer import TwoLayerNet
from sdfast.models.vgg import Vgg16
from sdfast.models.wide_resnet import WideResNet

__all__ = ["MODELS", "make_model", "model_builder", "register"]

Builder = Callable[[tuple[int, ...], int], nn.Module]

# name -> builder(input_shape, num_classes)
MODELS: dict[str, Builder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorator: `make_model(name, …)` calls the function with (input_shape, num_classes), and `MODELS` lists it.

    Args:
        name: Of the network; one that is there already is replaced.

    Returns:
        The decorator, which gives the function back as it is.
    """

    def add(builder: Builder) -> Builder:
        MODELS[name] = builder
        return builder

    return add


def make_model(name: str, input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """A fresh network from `MODELS`, or from a function of one's own.

    Args:
        name: Of `MODELS`; or ``"module:function"``, found on Python's path or in the working folder, called with
            ``num_classes`` and ``input_shape`` as far as it takes them: ``"torchvision.models:resnet18"``.
        input_shape: Of one input: (features,) or (channels, height, width).
        num_classes: Outputs.

    Returns:
        The network, as its function initialises it.

    Raises:
        ValueError: There is no such network, it does not take such inputs, or the function returns none.
    """
    return model_builder(name)(tuple(input_shape), num_classes)


def model_builder(name: str) -> Builder:
    """What `make_model` calls: a function of (input_shape, num_classes)."""
    if isinstance(name, str) and name in MODELS:
        return MODELS[name]
    if not isinstance(name, str) or name.count(":") != 1:
        raise ValueError(f"model: got {name!r}, wanted module:function or one of {', '.join(sorted(MODELS))}")
    function = _find(name)

    def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        model = function(**_accepted(function, input_shape, num_classes))
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: {name} returned {type(model).__name__}, wanted a torch.nn.Module")
        return model

    return build


def _find(name: str) -> Callable[..., object]:
    module_name, function_name = name.split(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"model: {name}: {error}") from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"model: module {module_name} has no function {function_name!r}")
    return function


def _accepted(function: Callable, input_shape: tuple[int, ...], num_classes: int) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    accepted: dict[str, object] = {}
    if "num_classes" in named or any(p.kind is p.VAR_KEYWORD for p in parameters):
        accepted["num_classes"] = num_classes
    if "input_shape" in named:
        accepted["input_shape"] = input_shape
    return accepted


def _picture(name: str, input_shape: tuple[int, ...], smallest: int = 1) -> int:
    """The channels of a picture; refuses what is none, or too small."""
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        sides = f" with sides of at least {smallest}" if smallest > 1 else ""
        raise ValueError(f"model: {name} got inputs {input_shape}, wanted (channels, height, width){sides}")
    return input_shape[0]


@register("mlp")
def _mlp(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return flat_mlp(input_shape, (256, 256), num_classes)


def flat_mlp(input_shape: tuple[int, ...], hidden: Sequence[int], num_classes: int) -> nn.Sequential:
    """`mlp` on inputs of any shape; those that are no rows are flattened first."""
    network = mlp((math.prod(input_shape), *hidden, num_classes))
    return network if len(input_shape) == 1 else nn.Sequential(nn.Flatten(), *network)


@register("two_layer")
def _two_layer(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    if len(input_shape) != 1 or num_classes != 1:
        raise ValueError(f"model: two_layer has one output for rows, not {num_classes} for inputs {input_shape}")
    return TwoLayerNet(input_shape[0], 2000)


@register("small_cnn")
def _small_cnn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    _picture("small_cnn", input_shape)
    return small_cnn(input_shape, num_classes)


def _register_resnet(depth: int) -> None:
    @register(f"resnet{depth}")
    def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return CifarResNet(depth, num_classes, _picture(f"resnet{depth}", input_shape))


def _register_wide(width: int) -> None:
    @register(f"wide_resnet28_{width}")
    def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return WideResNet(28, width, num_classes, _picture(f"wide_resnet28_{width}", input_shape))


def _register_shake(width: int) -> None:
    @register(f"shake_shake26_{width}")
    def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return ShakeShake26(width, num_classes, _picture(f"shake_shake26_{width}", input_shape, 2))


for _depth in (20, 32, 56, 110):
    _register_resnet(_depth)
for _width in (1, 2, 4, 10):
    _register_wide(_width)
for _width in (32, 64, 96):
    _register_shake(_width)


@register("vgg16_bn")
def _vgg16_bn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return Vgg16(num_classes, _picture("vgg16_bn", input_shape, 32))
