"""What a rule is: how the gradient of a call's result becomes one gradient per sample of its parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sdfast.ntk.arguments import Form, unflatten
from sdfast.ntk.sample_rows import SampleAxis


def changes_first_argument(name: str) -> bool:
    """Whether a function of this name works in place."""
    if name.startswith("__i") and name.endswith("__"):
        return name not in ("__init__", "__int__", "__index__", "__invert__", "__iter__")
    return name.endswith("_") and not name.endswith("__")


class Slot(NamedTuple):
    """The place of a tensor among the flattened arguments of a call."""

    place: int


class Call:
    """One call that took parameters, kept until the backward pass reaches it.

    Attributes:
        function: What was called.
        name: Of it.
        flat: Its arguments, flattened; tensors detached.
        spec: That puts them together again.
        tracked: Places of the parameters.
        inputs: Sample axes of its other tensors by their places; a tensor without one is a constant.
        outputs: Sample axes of its results, of all tensors among them.
        samples: In the batch.
        works_in_place: Whether the function writes to its first argument; `flat` holds that as it was before.
    """

    def __init__(
        self,
        function: Callable,
        name: str,
        flat: list[Any],
        spec: Form,
        tracked: tuple[int, ...],
        inputs: Mapping[int, SampleAxis],
        outputs: Sequence[SampleAxis | None],
        samples: int,
    ) -> None:
        self.function, self.name, self.flat, self.spec = function, name, flat, spec
        self.tracked, self.inputs, self.outputs, self.samples = tracked, inputs, outputs, samples
        self.works_in_place = changes_first_argument(name)
        self.bound: tuple[Any, dict[str, Any]] | None = None  # by `NamedRule.bound`

    def slots(self) -> tuple[tuple, dict]:
        """The arguments as the caller gave them, each tensor replaced by its `Slot`."""
        flat = [Slot(place) if isinstance(leaf, Tensor) else leaf for place, leaf in enumerate(self.flat)]
        return unflatten(flat, self.spec)

    def split(self, place: int) -> Tensor:
        """An input as (samples, *shape of one sample)."""
        return self.inputs[place].split(self.flat[place], self.samples)

    def split_gradient(self, gradient: Tensor, output: int) -> Tensor:
        """The gradient of a result as (samples, *shape of one sample)."""
        axis = self.outputs[output]
        if axis is None:
            raise ValueError(f"output: result {output} of {self.name} does not lie along the samples")
        return axis.split(gradient, self.samples)


class Rule:
    """Turns gradients of results into gradients per sample. The rules here are stateless.

    Attributes:
        name: As the plan shows it.
        taps_in_place: Whether a result may be tapped in place: its operation does not keep it for the backward.
    """

    name = "rule"
    taps_in_place = False

    def serves(self, call: Call) -> bool:
        """Whether it can work on this call."""
        raise NotImplementedError

    def rows(self, call: Call, gradient: Tensor, output: int, wanted: Sequence[int]) -> dict[int, Tensor]:
        """Gradients per sample.

        Args:
            call: That gave the result.
            gradient: Of the result, of its shape.
            output: Which result.
            wanted: Places of the parameters in question.

        Returns:
            For each place (samples, *shape of the parameter).
        """
        raise NotImplementedError

    def rows_in(
        self, call: Call, gradient: Tensor, output: int, wanted: Sequence[int], places: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """What `rows` gives, written where it is to be if the rule can: saves a copy.

        Args:
            call: See `rows`.
            gradient: See `rows`.
            output: See `rows`.
            wanted: See `rows`.
            places: Of some of the wanted: (samples, *shape of the parameter), entries of a sample side by side.

        Returns:
            As `rows`: of each either the very tensor of `places`, filled, or another that is left to be copied.
        """
        return self.rows(call, gradient, output, wanted)

    def factors(self, call: Call, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        """The weight's gradient of sample i as Σ_t b_it ⊗ a_it.

        Args:
            call: That gave the result.
            gradient: Of the result.

        Returns:
            A (samples, T, d), or (samples, T) integers that stand for one-hot rows (negative: none), and
            B (samples, T, p); ``None`` if the gradient has no such form.
        """
        return None

    def factor_sizes(self, call: Call, gradient: Tensor) -> tuple[int, int, int] | None:
        """(T, d, p) of `factors`, d = 0 where A holds integers; ``None`` where the gradient has no such form."""
        factors = self.factors(call, gradient)
        if factors is None:
            return None
        a, b = factors
        return b.shape[1], a.shape[2] if a.dim() == 3 else 0, b.shape[2]

    def weight(self, call: Call) -> int | None:
        """The place of the parameter that `factors` is about."""
        return None

    def bias(self, call: Call) -> int | None:
        """The place of the parameter whose gradient is Σ_t b_t of the same `factors`."""
        return None

    def operations(self, call: Call, gradient: Tensor) -> int:
        """FLOPs of the weight's gradients of all samples: for a plan, not for the work."""
        return 2 * gradient.numel()


class NamedRule(Rule):
    """A rule for one function signature: `arguments` names what the caller gave, `row` serves one parameter."""

    taps_in_place = True
    takes_out = False  # whether `row` has a fifth argument: where to write, or None

    @staticmethod
    def arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments by name, with the function's own signature and defaults."""
        raise NotImplementedError

    def bound(self, call: Call) -> dict[str, Any]:
        """The arguments of the call by name; tensors are slots."""
        if call.bound is None or call.bound[0] is not self:  # asked for by every backward pass
            args, kwargs = call.slots()
            call.bound = self, self.arguments(*args, **kwargs)
        return call.bound[1]

    def row(self, call: Call, given: dict[str, Any], name: str, gradient: Tensor) -> Tensor:
        """Gradient per sample of the parameter of this name, from the split gradient (samples, ...)."""
        raise NotImplementedError

    def rows(self, call: Call, gradient: Tensor, output: int, wanted: Sequence[int]) -> dict[int, Tensor]:
        """See `Rule.rows`."""
        given = self.bound(call)
        split = call.split_gradient(gradient, output)
        return {
            value.place: self.row(call, given, name, split)
            for name, value in given.items()
            if isinstance(value, Slot) and value.place in wanted
        }

    def rows_in(
        self, call: Call, gradient: Tensor, output: int, wanted: Sequence[int], places: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """See `Rule.rows_in`."""
        if not self.takes_out:
            return self.rows(call, gradient, output, wanted)
        given = self.bound(call)
        split = call.split_gradient(gradient, output)
        return {
            value.place: self.row(call, given, name, split, places.get(value.place))  # type: ignore[call-arg]
            for name, value in given.items()
            if isinstance(value, Slot) and value.place in wanted
        }

    def weight(self, call: Call) -> int | None:
        """See `Rule.weight`."""
        slot = self.bound(call).get("weight")
        return slot.place if isinstance(slot, Slot) and slot.place in call.tracked else None


def along_samples(call: Call, given: Mapping[str, Any], parameters: Sequence[str]) -> bool:
    """Whether of all tensors the input alone lies along the samples, and parameters stand in these places only."""
    source = given["input"]
    if not isinstance(source, Slot) or source.place not in call.inputs or call.outputs[0] is None:
        return False
    places = {given[name].place for name in parameters if isinstance(given.get(name), Slot)}
    return set(call.tracked) <= places and set(call.inputs) == {source.place}
