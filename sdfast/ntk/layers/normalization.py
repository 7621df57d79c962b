"""Normalisations: γ's gradient is Σ B∘x̂ and β's Σ B over positions, x̂ from the statistics, never by dividing by γ.

By the package's kernels, which form no x̂; where they do not serve, by torch's operations.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdfast.ntk.layers.kernels import own
from sdfast.ntk.layers.rule import Call, NamedRule, Rule, Slot, along_samples
from sdfast.ops.sample_gradients import channel_sample_gradients, position_sample_gradients


class _Normalization(NamedRule):
    """Scale and shift, both by one sweep of the package's kernel where that serves."""

    def rows(self, call: Call, gradient: Tensor, output: int, wanted: Sequence[int]) -> dict[int, Tensor]:
        """See `Rule.rows`."""
        given = self.bound(call)
        data, split = call.split(given["input"].place), call.split_gradient(gradient, output)
        backend = own(split, data)
        if backend is None:
            return super().rows(call, gradient, output, wanted)
        swept = dict(zip(("weight", "bias"), self.swept(call, given, data, split, backend), strict=True))
        return {
            slot.place: rows
            for name, rows in swept.items()
            if rows is not None and isinstance(slot := given.get(name), Slot) and slot.place in wanted
        }

    def swept(
        self, call: Call, given: dict[str, Any], data: Tensor, gradient: Tensor, backend: str
    ) -> tuple[Tensor | None, Tensor]:
        """The gradients of scale and shift (samples, *shape), from the split input and gradient."""
        raise NotImplementedError


class _LastAxes(_Normalization):
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

    centered = True

    def swept(
        self, call: Call, given: dict[str, Any], data: Tensor, gradient: Tensor, backend: str
    ) -> tuple[Tensor | None, Tensor]:
        shape = tuple(given["normalized_shape"])
        eps = torch.finfo(data.dtype).eps if given["eps"] is None else given["eps"]
        flat = [side.flatten(-len(shape)) for side in (data, gradient)]
        rows = position_sample_gradients(*flat, eps=eps, centered=self.centered, backend=backend)
        return rows[0].unflatten(1, shape), rows[1].unflatten(1, shape)

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
    centered = False

    @staticmethod
    def arguments(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> dict[str, Any]:
        return {"input": input, "normalized_shape": normalized_shape, "weight": weight, "eps": eps}

    def normalized(self, given: dict[str, Any], data: Tensor) -> Tensor:
        return functional.rms_norm(data, given["normalized_shape"], eps=given["eps"])


class _Channels(_Normalization):
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

    def statistics(self, call: Call, given: dict[str, Any], data: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1 / standard deviation, of a channel (channels,) or of each row (samples, rows, channels)."""
        mean, variance = (self.tensor(call, given[name]) for name in ("running_mean", "running_var"))
        if mean is None or variance is None:
            raise ValueError(f"{self.name}: got no running statistics, which this rule needs")
        return mean.to(data.dtype), (variance.to(data.dtype) + given["eps"]).rsqrt()

    def swept(
        self, call: Call, given: dict[str, Any], data: Tensor, gradient: Tensor, backend: str
    ) -> tuple[Tensor | None, Tensor]:
        if not isinstance(given.get("weight"), Slot):
            return channel_sample_gradients(None, gradient, backend=backend)
        return channel_sample_gradients(data, gradient, *self.statistics(call, given, data), backend=backend)

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

    def statistics(self, call: Call, given: dict[str, Any], data: Tensor) -> tuple[Tensor, Tensor]:
        return _row_statistics(data, given["num_groups"], given["eps"])

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

    def statistics(self, call: Call, given: dict[str, Any], data: Tensor) -> tuple[Tensor, Tensor]:
        if given["use_input_stats"]:
            return _row_statistics(data, data.shape[2], given["eps"])
        return super().statistics(call, given, data)

    def normalized(self, call: Call, given: dict[str, Any], data: Tensor) -> Tensor:
        if given["use_input_stats"]:  # without the running statistics, which it would update
            return functional.instance_norm(data, eps=given["eps"])
        mean, variance = (self.tensor(call, given[name]) for name in ("running_mean", "running_var"))
        return functional.instance_norm(data, mean, variance, use_input_stats=False, eps=given["eps"])


def _row_statistics(data: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of a row's group of channels, as torch finds them: (samples, rows, channels)."""
    rows, channels = data.shape[:2].numel(), data.shape[2]
    positions = data[0, 0, 0].numel() if rows else 1
    flat = data.flatten(0, 1)
    if rows == 1:  # with the channels last, its strides may be none that torch takes for either memory format
        flat = flat.contiguous()
    _, *statistics = torch.native_group_norm(flat, None, None, rows, channels, positions, groups, eps)
    mean, rstd = (part.repeat_interleave(channels // groups, 1).unflatten(0, data.shape[:2]) for part in statistics)
    return mean, rstd


RULES: list[tuple[Rule, tuple[Callable, ...]]] = [
    (LayerNormRule(), (functional.layer_norm,)),
    (RMSNormRule(), (functional.rms_norm, torch.rms_norm)),
    (BatchNormRule(), (functional.batch_norm,)),
    (GroupNormRule(), (functional.group_norm,)),
    (InstanceNormRule(), (functional.instance_norm,)),
]
