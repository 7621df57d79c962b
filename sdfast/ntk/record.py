"""Records of a forward pass on a few samples, and the sample axes that follow from comparing them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdfast.ntk.arguments import tensors_of, unflatten
from sdfast.ntk.capture import ParameterMode, Seen, Step
from sdfast.ntk.layers import Call, rule_for
from sdfast.ntk.layers.rule import changes_first_argument
from sdfast.ntk.sample_rows import SampleAxis, agreeing, both_orders, scaled_axes

# Results whose length depends on the values: whose rows those are may change from batch to batch.
SELECTING = ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive")
# Results in an order that depends on the values, by the place of the axis among the arguments.
ORDERING = {"sort": 1, "argsort": 1, "msort": 1, "topk": 2}
MAY_SELECT = frozenset((*SELECTING, *ORDERING, "where", "__getitem__"))
# Their result has the rows of their first argument, whatever is written into it.
WRITING = (
    "masked_scatter",
    "masked_fill",
    "index_add",
    "index_copy",
    "index_put",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "index_reduce",
)
# What makes numbers of Python out of values.
READING = frozenset(
    (
        *("item", "tolist", "__int__", "__index__", "__float__", "__complex__", "__bool__", "numpy", "__array__"),
        *("equal", "allclose", "is_nonzero", "__contains__", "__repr__", "__format__"),
    )
)
# What makes numbers of Python out of the length of what was selected.
MEASURING = ("__len__", "size", "numel", "nelement", "__get__")


class Lengths(ParameterMode):
    """Notes the shapes of every differentiable call."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.calls: list[tuple[str, list[tuple[int, ...] | None], list[tuple[int, ...]]]] = []

    def after(self, seen: Seen, before: Any, result: Any, tensors: list[Tensor]) -> Any:
        """Notes one call."""
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in seen.flat]
        self.calls.append((seen.name, shapes, [tuple(tensor.shape) for tensor in tensors]))
        return result

    def given_back(self, seen: Seen, result: Any, tensors: list[Tensor]) -> Any:
        """Notes one call."""
        return self.after(seen, None, result, tensors)


@dataclass
class _Noted:
    """One followed call on three samples, with the sample axes that are possible for each of its tensors."""

    step: Step
    seen: Seen
    inputs: dict[int, Tensor]
    outputs: dict[int, Tensor]
    input_axes: dict[int, list[SampleAxis]]
    output_axes: dict[int, list[SampleAxis]]

    def axes(self) -> list[list[SampleAxis]]:
        """Of all tensors."""
        return [*self.input_axes.values(), *self.output_axes.values()]


class Record(ParameterMode):
    """Notes the tensors of followed calls on three samples; `calls` are those of two samples."""

    def __init__(self, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor], calls: list) -> None:
        super().__init__(parameters, values, frozen_batch_norm=True)
        self.calls = calls
        self.steps: list[Step] = []
        self.noted: dict[int, _Noted] = {}
        self.mismatch: str | None = None
        self.selected: dict[int, Tensor] = {}
        self.read: list[Any] = []
        self.activations = 0

    def ran(self, seen: Seen, result: Any) -> None:
        """Follows what is selected by its values: of such rows nobody knows whose they are in the next batch."""
        if seen.name in READING:
            self.read.append((seen.name, result.tolist() if seen.name in ("numpy", "__array__") else result))
            return
        if self.selected and seen.name in MEASURING and id(seen.flat[0]) in self.selected:
            if isinstance(result, int | torch.Size):
                self.read.append((seen.name, result))
            return
        if not self.selected and seen.name not in MAY_SELECT:
            return
        arguments = [leaf for leaf in seen.flat if isinstance(leaf, Tensor)]
        if seen.name.strip("_").startswith(WRITING):
            arguments = arguments[:1]
        if _selects(seen, arguments) or any(id(leaf) in self.selected for leaf in arguments):
            self.selected |= {id(leaf): leaf for leaf in tensors_of(result)}

    def given_back(self, seen: Seen, result: Any, tensors: list[Tensor]) -> Any:
        """Notes that there was a call."""
        self.steps.append(Step(seen.name))
        return result

    def before(self, seen: Seen) -> list[Any] | None:
        """The arguments of a followed call, as they are before it may change them."""
        if not seen.tracked:
            return None
        writes = changes_first_argument(seen.name)
        return [
            (leaf.detach().clone() if writes else leaf.detach()) if isinstance(leaf, Tensor) else leaf
            for leaf in seen.flat
        ]

    def after(self, seen: Seen, before: Any, result: Any, tensors: list[Tensor]) -> Any:
        """Notes one call: whether it is virtual, and else its tensors."""
        number = self.position - 1
        step = Step(seen.name, sources=self.sources(seen.tracked.values()))
        self.steps.append(step)
        self.activations += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if any(id(tensor) in self.selected for tensor in tensors):
            step.unclear = f"{seen.name} works on rows that are selected by their values"
        if self.mismatch is None and (number >= len(self.calls) or self.calls[number][0] != seen.name):
            self.mismatch = "the model takes another path with another number of samples"
        if not seen.tracked or self.mismatch is not None:
            return result
        _, shapes, output_shapes = self.calls[number]
        if not tensors or any(
            leaf is tensor for place in seen.tracked for leaf in [seen.flat[place]] for tensor in tensors
        ):
            step.unclear = step.unclear or f"written by {seen.name} in place"
        elif step.unclear is None and [tuple(tensor.shape) for tensor in tensors] == output_shapes:
            step.virtual = True
            self.add_virtual(seen, tensors)
        data = {
            place: leaf
            for place, leaf in enumerate(before)
            if isinstance(leaf, Tensor) and place not in seen.tracked and tuple(leaf.shape) != shapes[place]
        }
        if not step.virtual:
            seen = Seen(seen.function, seen.name, before, seen.spec, seen.tracked)
            given = {
                output: tensor for output, tensor in enumerate(tensors) if tuple(tensor.shape) != output_shapes[output]
            }
            step.outputs = [None] * len(tensors)
            axes = [
                {place: both_orders(scaled_axes(tensor.shape, smaller[place])) for place, tensor in side.items()}
                for side, smaller in ((data, shapes), (given, output_shapes))
            ]
            data, given = (
                {place: _noted(tensor, found[place]) for place, tensor in side.items()}
                for side, found in zip((data, given), axes, strict=True)
            )
            self.noted[number] = _Noted(step, seen, data, given, *axes)
        return result

    def compare(self, other: "Record", sample: int) -> None:
        """Keeps the sample axes that agree with what `other` noted, of the same but for one perturbed sample."""
        for number, noted in self.noted.items():
            theirs = other.noted.get(number)
            for side, found in (("inputs", noted.input_axes), ("outputs", noted.output_axes)):
                for place, tensor in getattr(noted, side).items():
                    perturbed = None if theirs is None else getattr(theirs, side).get(place)
                    if perturbed is None or perturbed.shape != tensor.shape:
                        found[place] = []
                    else:
                        found[place] = agreeing(found[place], tensor, perturbed, sample)

    def resolved(self) -> list[Step]:
        """The steps with the sample axes that are left and the rules that serve."""
        for noted in self.noted.values():
            step, seen = noted.step, noted.seen
            if not all(noted.axes()):
                step.unclear = step.unclear or f"its samples cannot be told apart in {step.name}"
                continue
            settled = {axes[0].positions: axes[0].samples_first for axes in noted.axes() if len(axes) == 1}
            for found, places in ((noted.input_axes, step.inputs), (noted.output_axes, step.outputs)):
                for place, axes in found.items():
                    fitting = [axis for axis in axes if axis.samples_first == settled.get(axis.positions, True)]
                    places[place] = (fitting or axes)[0]
            step.rule = rule_for(
                Call(seen.function, seen.name, seen.flat, seen.spec, tuple(seen.tracked), step.inputs, step.outputs, 3)
            )
        return self.steps


def _selects(seen: Seen, arguments: list[Tensor]) -> bool:
    if seen.name in SELECTING or (seen.name == "where" and len(seen.flat) == 1):
        return True
    if seen.name in ORDERING:
        return _orders_samples(seen)
    return seen.name == "__getitem__" and any(leaf.dtype in (torch.bool, torch.uint8) for leaf in arguments[1:])


def _orders_samples(seen: Seen) -> bool:
    """Whether it is along the first axis, where samples lie."""
    positional, named = unflatten(seen.flat, seen.spec)
    place = ORDERING[seen.name]
    axis = named.get("dim", positional[place] if len(positional) > place else 0 if seen.name == "msort" else -1)
    dimensions = next(leaf.dim() for leaf in seen.flat if isinstance(leaf, Tensor))
    return dimensions < 2 or axis in (0, -dimensions)


def _noted(tensor: Tensor, candidates: list[SampleAxis]) -> Tensor:
    """A copy where the order of positions and samples must be found by what changes, before it is overwritten."""
    plain = len(candidates) == 1 and candidates[0].positions == 1
    return tensor.detach() if plain else tensor.detach().clone()
