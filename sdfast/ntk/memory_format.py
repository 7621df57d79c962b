"""Whether a model of convolutions runs faster with the channels of its pictures last, where its results allow it.

On a CPU a convolution then reads and writes its pictures as they lie, and the gradients per sample too. But each call
puts its weight into that order: it pays where the activations are much more than the weights. One convolution alone,
whose result is put back into another order, gains nothing.
"""

import math
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sdfast.ntk.inputs import Inputs, is_picture

_CONVOLUTION = "convolution 2d"
_SAMPLES = 128  # of a micro-batch, at most
# Measured: ResNet-20 (activations of 128 samples 300 times the weights) takes .89 of the time, a ResNet-18 of 64 x 64
# pixels (1.9 times, 32 samples) 1.28.
_TIMES = 8


def may_be_faster(
    inputs: Inputs, parameters: Mapping[str, Tensor], rules: Mapping[str, list[str]], activations: int
) -> bool:
    """Whether to try it. By sizes alone, so that the same call always computes the same bits.

    Args:
        inputs: Of the model.
        parameters: By name.
        rules: By parameter.
        activations: Bytes of what the operations on one sample give.

    Returns:
        Whether.
    """
    first = next(iter(parameters.values()))
    pictures = [tensor for tensor in inputs.tensors.values() if is_picture(tensor)]
    if first.device.type != "cpu" or first.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    if all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in pictures):
        return False
    weights = [
        math.prod(parameters[name].shape)
        for name, found in rules.items()
        if any(_CONVOLUTION in rule for rule in found) and parameters[name].dim() == 4
    ]
    held = min(inputs.samples, _SAMPLES) * activations
    return len(weights) > 1 and held >= _TIMES * sum(weights) * first.element_size()


class FormatRefusedError(RuntimeError):
    """A model failed with the channels last; it is to be run as it is given."""


_refused: dict[int, weakref.ref] = {}  # by identity: a model may compare by anything


def refuse(model: nn.Module) -> None:
    """Notes that a model is not to be tried again."""
    number = id(model)
    _refused[number] = weakref.ref(model, lambda _: _refused.pop(number, None))


def is_refused(model: nn.Module) -> bool:
    """Whether it failed with the channels last before."""
    noted = _refused.get(id(model))
    return noted is not None and noted() is model
