"""The rule for every operation: its own vjp, vmapped over the samples, or one sample after the other."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from sdfast.ntk.arguments import tensors_of, unflatten
from sdfast.ntk.layers.rule import Call, Rule

# What functorch raises where an operation cannot be vmapped.
CANNOT_VMAP = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError, AttributeError)

_MASKED_ELEMENTS = 2**24  # of the one-hot cotangents alive at once


class VmapRule(Rule):
    """The vjp of the operation, vmapped over the samples."""

    name = "vmap of the operation"

    def serves(self, call: Call) -> bool:
        """Whether functorch takes the operation is found by trying."""
        return True

    def rows(self, call: Call, gradient: Tensor, output: int, wanted: Sequence[int]) -> dict[int, Tensor]:
        """See `Rule.rows`."""
        with torch.enable_grad(), quietly_vmapped():
            rows = self._rows(call, gradient, output, wanted)
        return dict(zip(wanted, rows, strict=True))

    def _rows(self, call: Call, gradient: Tensor, output: int, wanted: Sequence[int]) -> Sequence[Tensor]:
        places = list(call.inputs)
        parameters = [call.flat[place] for place in wanted]
        if not places:  # an expansion of a parameter over the batch
            pull = vjp(lambda *values: _run(call, output, dict(zip(wanted, values, strict=True))), *parameters)[1]
            chunk = max(1, _MASKED_ELEMENTS // gradient.numel())
            return vmap(lambda which: pull(_only_sample(call, gradient, output, which)), chunk_size=chunk)(
                torch.eye(call.samples, dtype=gradient.dtype, device=gradient.device)
            )

        def one(sample_gradient: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
            def compute(*values: Tensor) -> Tensor:
                return _run(call, output, dict(zip([*places, *wanted], [*data, *values], strict=True)))

            return vjp(compute, *parameters)[1](sample_gradient)

        return vmap(one)(call.split_gradient(gradient, output), *(call.split(place) for place in places))


class LoopRule(Rule):
    """The operation's own backward, one sample after the other: for what cannot be vmapped, such as nn.LSTM."""

    name = "loop over the samples of the operation"

    def serves(self, call: Call) -> bool:
        """Whether the operation runs on one sample is found by trying."""
        return True

    def rows(self, call: Call, gradient: Tensor, output: int, wanted: Sequence[int]) -> dict[int, Tensor]:
        """See `Rule.rows`."""
        split = call.split_gradient(gradient, output)
        data = {place: call.split(place) for place in call.inputs}
        collected: list[tuple[Tensor, ...]] = []
        for sample in range(call.samples):
            with torch.enable_grad():
                parameters = [call.flat[place].detach().requires_grad_() for place in wanted]
                values = {place: tensor[sample].contiguous() for place, tensor in data.items()}
                result = _run(call, output, values | dict(zip(wanted, parameters, strict=True)))
                gradients = torch.autograd.grad(result, parameters, split[sample], materialize_grads=True)
            collected.append(gradients)
        return {
            place: torch.stack([gradients[number] for gradients in collected]) for number, place in enumerate(wanted)
        }


@contextmanager
def quietly_vmapped() -> Iterator[None]:
    """Without the warning that an operation is looped over inside vmap, which is exact."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop.*")
        yield


def _run(call: Call, output: int, values: dict[int, Any]) -> Tensor:
    """One of the results of the call with other values in some places."""
    flat = [values.get(place, leaf) for place, leaf in enumerate(call.flat)]
    arguments, options = unflatten(flat, call.spec)
    if call.works_in_place:
        arguments = (arguments[0].clone(), *arguments[1:])
    return tensors_of(call.function(*arguments, **options))[output]


def _only_sample(call: Call, gradient: Tensor, output: int, which: Tensor) -> Tensor:
    """The gradient with all samples but one, given one-hot, set to zero."""
    axis = call.outputs[output]
    if axis is None:
        raise ValueError(f"output: result {output} of {call.name} does not lie along the samples")
    repeated = which.repeat_interleave(axis.positions) if axis.samples_first else which.repeat(axis.positions)
    return gradient * repeated.reshape([-1 if a == axis.axis else 1 for a in range(gradient.dim())])
