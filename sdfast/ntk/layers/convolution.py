"""Convolutions: gradients per sample by the package's kernel; by a grouped convolution, a sample a group, elsewhere."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdfast.ntk.layers.kernels import own
from sdfast.ntk.layers.linear import positions
from sdfast.ntk.layers.rule import Call, NamedRule, Rule, Slot, along_samples
from sdfast.ops.sample_gradients import channel_sample_gradients, convolution_sample_gradients


class _AnyConvolution(NamedRule):
    """A convolution of (rows, channels, *space) in any number of dimensions."""

    transposed = False
    takes_out = True

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{'transposed ' if self.transposed else ''}convolution {self.dimensions}d"

    def serves(self, call: Call) -> bool:
        given = self.bound(call)
        if not along_samples(call, given, ("weight", "bias")) or not isinstance(given["weight"], Slot):
            return False
        output = call.outputs[0]
        source = given["input"].place
        return (
            call.flat[source].dim() == self.dimensions + 2
            and call.inputs[source].axis == 0
            and output is not None
            and output.axis == 0
        )

    def operations(self, call: Call, gradient: Tensor) -> int:
        given = self.bound(call)
        moving = call.flat[given["input"].place] if self.transposed else gradient
        return 2 * moving.numel() * call.flat[given["weight"].place][0].numel()

    def tuple_of(self, value: Any) -> tuple[int, ...]:
        """One number for each dimension."""
        return (value,) * self.dimensions if isinstance(value, int) else tuple(value) * (self.dimensions // len(value))

    def padded(self, given: dict[str, Any], data: Tensor, kernel: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """The input (samples, rows, channels, *space), and the padding that remains to be done at both ends."""
        padding = given["padding"]
        if not isinstance(padding, str):
            return data, self.tuple_of(padding)
        none = (0,) * self.dimensions
        if padding == "valid":
            return data, none
        totals = [d * (k - 1) for d, k in zip(self.tuple_of(given["dilation"]), kernel, strict=True)]
        if all(total % 2 == 0 for total in totals):
            return data, tuple(total // 2 for total in totals)
        ends = [end for total in reversed(totals) for end in (total // 2, total - total // 2)]
        return functional.pad(data.flatten(0, 1), ends).unflatten(0, data.shape[:2]), none

    def row(self, call: Call, given: dict[str, Any], name: str, gradient: Tensor, out: Tensor | None = None) -> Tensor:
        if name == "bias":
            if backend := own(gradient):
                return channel_sample_gradients(None, gradient, bias_out=out, backend=backend)[1]
            return gradient.sum((1, *range(3, gradient.dim())))
        weight = call.flat[given["weight"].place]
        data, padding = self.padded(given, call.split(given["input"].place), weight.shape[2:])
        if backend := own(gradient, data):
            rows = convolution_sample_gradients(
                *((gradient, data) if self.transposed else (data, gradient)),
                tuple(weight.shape[2:]),
                stride=self.tuple_of(given["stride"]),
                padding=padding,
                dilation=self.tuple_of(given["dilation"]),
                groups=given["groups"],
                out=None if out is None else out.flatten(1),
                backend=backend,
            )
            return rows.unflatten(1, weight.shape)
        samples = len(data)
        # (samples, rows, channels, ...) -> (rows, samples · channels, ...): every sample is a group of its own
        grouped = [part.transpose(0, 1).flatten(1, 2) for part in (gradient, data)]
        _, rows, _ = torch.ops.aten.convolution_backward(
            *grouped,
            weight.new_empty(()).expand(samples * len(weight), *weight.shape[1:]),  # its values play no part
            None,
            self.tuple_of(given["stride"]),
            padding,
            self.tuple_of(given["dilation"]),
            self.transposed,
            self.tuple_of(given.get("output_padding", 0)),
            samples * given["groups"],
            (False, True, False),
        )
        return rows.unflatten(0, (samples, len(weight)))


class ConvolutionRule(_AnyConvolution):
    """``F.conv1d``, ``conv2d``, ``conv3d``."""

    @staticmethod
    def arguments(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> dict[str, Any]:
        return {
            "input": input,
            "weight": weight,
            "bias": bias,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        }

    def factor_sizes(self, call: Call, gradient: Tensor) -> tuple[int, int, int] | None:
        """Without the unfolded input."""
        given = self.bound(call)
        if given["groups"] != 1:
            return None
        channels = gradient.shape[1]
        patch = call.flat[given["weight"].place][0].numel()
        return gradient.numel() // (call.samples * channels), patch, channels

    def factors(self, call: Call, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        given = self.bound(call)
        if given["groups"] != 1:
            return None
        kernel = call.flat[given["weight"].place].shape[2:]
        data, padding = self.padded(given, call.split(given["input"].place), kernel)
        data = functional.pad(data.flatten(0, 1), [end for amount in reversed(padding) for end in (amount, amount)])
        strides, dilations = self.tuple_of(given["stride"]), self.tuple_of(given["dilation"])
        for axis, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True), 2):
            data = data.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        places = tuple(range(2, 2 + self.dimensions))
        window = tuple(range(2 + self.dimensions, data.dim()))
        patches = data.permute(0, *places, 1, *window).flatten(-1 - self.dimensions)  # (samples · rows, *space, d)
        split = call.split_gradient(gradient, 0).movedim(2, -1)  # (samples, rows, *space, channels)
        return positions(patches.unflatten(0, (call.samples, -1))), positions(split)


class TransposedRule(_AnyConvolution):
    """``F.conv_transpose1d``, ``conv_transpose2d``, ``conv_transpose3d``."""

    transposed = True

    @staticmethod
    def arguments(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> dict[str, Any]:
        return {
            "input": input,
            "weight": weight,
            "bias": bias,
            "stride": stride,
            "padding": padding,
            "output_padding": output_padding,
            "groups": groups,
            "dilation": dilation,
        }


RULES: list[tuple[Rule, tuple[Callable, ...]]] = [
    *((ConvolutionRule(d), (function,)) for d, function in enumerate((torch.conv1d, torch.conv2d, torch.conv3d), 1)),
    (TransposedRule(1), (torch.conv_transpose1d,)),
    (TransposedRule(2), (torch.conv_transpose2d,)),
    (TransposedRule(3), (torch.conv_transpose3d,)),
]
