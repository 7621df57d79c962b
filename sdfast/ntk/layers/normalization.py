"""Normalisations: γ's gradient is Σ B∘x̂ and β's Σ B over positions, x̂ from the statistics, never by dividing by γ."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdfast.ntk.layers.rule import Call, NamedRule, Rule, Slot, along_samples


class _LastAxes(NamedRule):
    """Normalises over the last axes, each of which has its own γ and β."""

    def serves(self, call: Call) -> bool:
        given = self.bound(call)
        if not along_samples(call, given, ("weight", "bias")):
            return False
        first = call.flat[given["input"].place].dim() - len(given["normalized_shape"])
        output = call.outputs[0]
        return call.inputs[given["input"].place].axis < first and output is not None and output.axis < first

    def normalized(self, given: dict[str, Any], data: Tensor) -> Tensor:
        """The input before γ and β."""
        raise NotImplementedError

    def row(self, call: Call, given: dict[str, Any], name: str, gradient: Tensor) -> Tensor:
        if name == "weight":
            gradient = gradient * self.normalized(given, call.split(given["input"].place))
        middle = range(1, gradient.dim() - len(given["normalized_shape"]))
        return gradient.sum(tuple(middle)) if middle else gradient


class LayerNormRule(_LastAxes):
    """``F.layer_norm``."""

    name = "layer norm"

    @staticmethod
    def arguments(
        input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> dict[str, Any]:
        return {"input": input, "normalized_shape": normalized_shape, "weight": weight, "bias": bias, "eps": eps}

    def normalized(self, given: dict[str, Any], data: Tensor) -> Tensor:
        return functional.layer_norm(data, given["normalized_shape"], eps=given["eps"])


class RMSNormRule(_LastAxes):
    """``F.rms_norm``."""

    name = "RMS norm"

    @staticmethod
    def arguments(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> dict[str, Any]:
        return {"input": input, "normalized_shape": normalized_shape, "weight": weight, "eps": eps}

    def normalized(self, given: dict[str, Any], data: Tensor) -> Tensor:
        return functional.rms_norm(data, given["normalized_shape"], eps=given["eps"])


class _Channels(NamedRule):
    """Normalises (rows, channels, ...), each channel with its own γ and β."""

    def serves(self, call: Call) -> bool:
        given = self.bound(call)
        if not along_samples(call, given, ("weight", "bias")) or given.get("training"):
            return False
        output = call.outputs[0]
        return call.inputs[given["input"].place].axis == 0 and output is not None and output.axis == 0

    def normalized(self, call: Call, given: dict[str, Any], data: Tensor) -> Tensor:
        """The input (rows, channels, ...) before γ and β."""
        raise NotImplementedError

    def row(self, call: Call, given: dict[str, Any], name: str, gradient: Tensor) -> Tensor:
        if name == "weight":
            data = call.split(given["input"].place)  # (samples, rows, channels, ...)
            gradient = gradient * self.normalized(call, given, data.flatten(0, 1)).unflatten(0, data.shape[:2])
        return gradient.sum((1, *range(3, gradient.dim())))

    @staticmethod
    def tensor(call: Call, slot: Slot | None) -> Tensor | None:
        """A constant among the arguments."""
        return None if slot is None else call.flat[slot.place]


class BatchNormRule(_Channels):
    """``F.batch_norm`` with running statistics. With the batch's own, the samples are coupled: see `probe`."""

    name = "batch norm"

    @staticmethod
    def arguments(
        input: Any,
        running_mean: Any,
        running_var: Any,
        weight: Any = None,
        bias: Any = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> dict[str, Any]:
        return {
            "input": input,
            "running_mean": running_mean,
            "running_var": running_var,
            "weight": weight,
            "bias": bias,
            "training": training,
            "eps": eps,
        }

    def normalized(self, call: Call, given: dict[str, Any], data: Tensor) -> Tensor:
        mean, variance = (self.tensor(call, given[name]) for name in ("running_mean", "running_var"))
        return functional.batch_norm(data, mean, variance, eps=given["eps"])


class GroupNormRule(_Channels):
    """``F.group_norm``."""

    name = "group norm"

    @staticmethod
    def arguments(
        input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> dict[str, Any]:
        return {"input": input, "num_groups": num_groups, "weight": weight, "bias": bias, "eps": eps}

    def normalized(self, call: Call, given: dict[str, Any], data: Tensor) -> Tensor:
        return functional.group_norm(data, given["num_groups"], eps=given["eps"])


class InstanceNormRule(_Channels):
    """``F.instance_norm``."""

    name = "instance norm"

    @staticmethod
    def arguments(
        input: Any,
        running_mean: Any = None,
        running_var: Any = None,
        weight: Any = None,
        bias: Any = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> dict[str, Any]:
        return {
            "input": input,
            "running_mean": running_mean,
            "running_var": running_var,
            "weight": weight,
            "bias": bias,
            "use_input_stats": use_input_stats,
            "eps": eps,
        }

    def normalized(self, call: Call, given: dict[str, Any], data: Tensor) -> Tensor:
        if given["use_input_stats"]:  # without the running statistics, which it would update
            return functional.instance_norm(data, eps=given["eps"])
        mean, variance = (self.tensor(call, given[name]) for name in ("running_mean", "running_var"))
        return functional.instance_norm(data, mean, variance, use_input_stats=False, eps=given["eps"])


RULES: list[tuple[Rule, tuple[Callable, ...]]] = [
    (LayerNormRule(), (functional.layer_norm,)),
    (RMSNormRule(), (functional.rms_norm, torch.rms_norm)),
    (BatchNormRule(), (functional.batch_norm,)),
    (GroupNormRule(), (functional.group_norm,)),
    (InstanceNormRule(), (functional.instance_norm,)),
]
