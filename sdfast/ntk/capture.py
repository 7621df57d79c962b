"""Every use of a parameter in a forward pass, seen by the parameter's identity, with a tap on what the use gives.

A `TorchFunctionMode` sees each call of a torch function before it runs. A call that takes a parameter and gives
something that lies along the samples gets a **tap** on its output: an identity whose backward hands over the gradient
B of that output, from which the call's rule makes one gradient per sample. A call whose result does not depend on the
samples (a transpose, a weight norm, a concatenation of parameters) gives a **virtual parameter**, whose gradients are
pulled back to its sources by vjp. No gradient of a weight is computed by autograd itself: the taps hang on a scalar
anchor, and `autograd.grad(output, anchor)` visits activations alone.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sdfast.ntk import batch_norm
from sdfast.ntk.arguments import Form, flatten, replaced, tensors_of, unflatten
from sdfast.ntk.layers import COMPOSITES, GENERIC, Rule
from sdfast.ntk.layers.generic import quietly_vmapped
from sdfast.ntk.layers.rule import Call, changes_first_argument
from sdfast.ntk.sample_rows import PathChangedError, SampleAxis

_HALF = (torch.float16, torch.bfloat16)

Origin = str | int  # a parameter by its name, a virtual parameter by its number


@dataclass
class Step:
    """What the probe found out about one call.

    Attributes:
        name: Of the function.
        virtual: Whether its result is the same for all samples.
        inputs: Sample axes of its tensors by their place among the flattened arguments; the others are constants.
        outputs: Sample axes of its results.
        unclear: Why the samples cannot be told apart in it, or ``None``.
        rule: That turns the gradient of a result into gradients per sample.
        sources: The parameters it depends on.
    """

    name: str
    virtual: bool = False
    inputs: dict[int, SampleAxis] = field(default_factory=dict)
    outputs: list[SampleAxis | None] = field(default_factory=list)
    unclear: str | None = None
    rule: Rule = GENERIC
    sources: frozenset[str] = frozenset()


@dataclass
class Virtual:
    """A tensor computed from parameters alone."""

    value: Tensor
    function: Callable
    flat: list[Any]
    spec: Form
    tracked: dict[int, Origin]
    output: int

    def pull_back(self, rows: Tensor) -> dict[Origin, Tensor]:
        """Gradients per sample of this, as those of what it was computed from."""
        places = list(self.tracked)

        def compute(*sources: Tensor) -> Tensor:
            flat = list(self.flat)
            for place, source in zip(places, sources, strict=True):
                flat[place] = source
            arguments, options = unflatten(flat, self.spec)
            return tensors_of(self.function(*arguments, **options))[self.output]

        with torch.enable_grad(), quietly_vmapped():
            pull = vjp(compute, *(self.flat[place] for place in places))[1]
            gradients = vmap(pull)(rows)
        pulled: dict[Origin, Tensor] = {}
        for place, gradient in zip(places, gradients, strict=True):
            origin = self.tracked[place]
            pulled[origin] = pulled[origin] + gradient if origin in pulled else gradient
        return pulled


@dataclass(slots=True)
class Seen:
    """One call as a mode sees it, before it runs."""

    function: Callable
    name: str
    flat: list[Any]
    spec: Form
    tracked: dict[int, Origin]


class ParameterMode(TorchFunctionMode):
    """Follows parameters, and what is computed from them alone, through a forward pass.

    Args:
        parameters: To follow, by name.
        values: Other values to compute with in place of the parameters' own, by name.
        frozen_batch_norm: Let batch norm in training mode scale by constants, so that it couples no samples.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        values: Mapping[str, Tensor] | None = None,
        frozen_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.known: dict[int, Origin] = {id(parameter): name for name, parameter in parameters.items()}
        self.values = {} if values is None else {id(parameters[name]): value for name, value in values.items()}
        self.known |= {} if values is None else {id(value): name for name, value in values.items()}
        self.frozen_batch_norm = frozen_batch_norm
        self.virtuals: list[Virtual] = []
        self.position = 0
        self.batch_norm_trains = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs a call, followed if it takes a parameter."""
        kwargs = kwargs or {}
        _refuse(func, kwargs)
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **kwargs)
        flat, spec = flatten(args, kwargs)
        known = self.known
        tracked = {
            place: known[id(leaf)] for place, leaf in enumerate(flat) if id(leaf) in known and isinstance(leaf, Tensor)
        }
        if self.values and tracked:
            flat = [self.values.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf for leaf in flat]
            args, kwargs = unflatten(flat, spec)
        if func in batch_norm.FUNCTIONS and batch_norm.trains(func, args, kwargs):
            self.batch_norm_trains = True
            if self.frozen_batch_norm:
                func, args, kwargs = functional.batch_norm, batch_norm.with_constants(func, args, kwargs), {}
                flat, spec = flatten(args, kwargs)
        seen = Seen(func, getattr(func, "__name__", str(func)), flat, spec, tracked)
        before = self.before(seen)
        given = [(leaf, _version(leaf)) for leaf in flat if isinstance(leaf, Tensor)]
        result = self.run(func, args, kwargs)
        self.ran(seen, result)
        tensors = tensors_of(result)
        differentiable = any(tensor.requires_grad for tensor in tensors)
        if not (differentiable or seen.name == "__setitem__") or not torch.is_grad_enabled():
            return result
        _refuse_half(seen.name, [*(leaf for leaf, _ in given), *tensors])
        self.position += 1
        given_back = all(
            any(tensor is leaf and _version(leaf) == version for leaf, version in given) for tensor in tensors
        )
        # As `contiguous` does where there is nothing to do: it counts all the same, for in another batch there may be.
        if given_back and tensors:
            return self.given_back(seen, result, tensors)
        return self.after(seen, before, result, tensors)

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a call gives."""
        return func(*args, **kwargs)

    def ran(self, seen: Seen, result: Any) -> None:
        """Called after every call, differentiable or not."""

    def before(self, seen: Seen) -> Any:
        """Called before the function runs; what it gives comes to `after`."""

    def after(self, seen: Seen, before: Any, result: Any, tensors: list[Tensor]) -> Any:
        """Called after it ran if its result is differentiable; gives what the model gets."""
        return result

    def given_back(self, seen: Seen, result: Any, tensors: list[Tensor]) -> Any:
        """Called in place of `after` where a function gave back what it was given."""
        return result

    def add_virtual(self, seen: Seen, tensors: list[Tensor]) -> None:
        """Remembers results as virtual parameters."""
        flat = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in seen.flat]
        for output, tensor in enumerate(tensors):
            if not tensor.requires_grad:
                continue
            self.known[id(tensor)] = len(self.virtuals)
            self.virtuals.append(Virtual(tensor, seen.function, flat, seen.spec, seen.tracked, output))

    def sources(self, origins: Iterable[Origin]) -> frozenset[str]:
        """The parameters that these come from."""
        names: set[str] = set()
        for origin in origins:
            names |= {origin} if isinstance(origin, str) else self.sources(self.virtuals[origin].tracked.values())
        return frozenset(names)


class Capture(ParameterMode):
    """Taps every use of its parameters, and sums up gradients per sample as a backward pass delivers them.

    Args:
        parameters: To follow, by name.
        steps: What the probe found.
        samples: In the batch.
        factored: Names of parameters whose factors (A, B) are wanted, not their gradients.
        by_autograd: Parameters whose gradients autograd will be asked for; ``None`` to leave batch norm to torch, as
            with `values`, for which it is asked too.
        values: See `ParameterMode`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        steps: list[Step],
        samples: int,
        factored: frozenset[str] = frozenset(),
        by_autograd: Iterable[Tensor] | None = None,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(parameters, values)
        self.by_autograd = None if by_autograd is None else frozenset(map(id, by_autograd))
        self.parameters, self.steps, self.samples, self.factored = parameters, steps, samples, factored
        first = next(iter(parameters.values()))
        self.anchor = torch.zeros((), dtype=first.dtype, device=first.device, requires_grad=True)
        self.rows: dict[Origin, Tensor] = {}
        self.into: Mapping[Origin, Tensor] = {}
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.taps = 0
        self.listening = False
        self.last = False  # whether no other pass will follow this one

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """See `ParameterMode.run`."""
        if self.by_autograd is not None and func in batch_norm.FUNCTIONS:
            return batch_norm.run(func, args, kwargs, self.by_autograd)
        return func(*args, **kwargs)

    def before(self, seen: Seen) -> list[Any] | None:
        """The arguments of a followed call, as they are before it may change them."""
        if not seen.tracked:
            return None
        kept = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in seen.flat]
        if changes_first_argument(seen.name):
            kept[0] = kept[0].clone()
        return kept

    def after(self, seen: Seen, before: Any, result: Any, tensors: list[Tensor]) -> Any:
        """Taps the results of a followed call."""
        if self.position > len(self.steps) or self.steps[self.position - 1].name != seen.name:
            raise PathChangedError(f"{seen.name} came where the probe had not seen it")
        step = self.steps[self.position - 1]
        sources = self.sources(seen.tracked.values())
        if sources != step.sources & self.parameters.keys():
            raise PathChangedError(f"{seen.name} came with other parameters than on the probe")
        if not sources or step.unclear is not None:
            return result
        if step.virtual:
            self.add_virtual(seen, tensors)
            return result
        call = Call(
            seen.function, seen.name, before, seen.spec, tuple(seen.tracked), step.inputs, step.outputs, self.samples
        )
        places = {id(tensor): output for output, tensor in enumerate(tensors)}
        return replaced(result, lambda tensor: self._tap(call, step, seen.tracked, places[id(tensor)], tensor))

    def _tap(self, call: Call, step: Step, tracked: dict[int, Origin], output: int, tensor: Tensor) -> Tensor:
        if call.outputs[output] is None or not tensor.requires_grad:
            return tensor
        given = [(leaf, _version(leaf)) for leaf in call.flat if isinstance(leaf, Tensor)]

        def receive(gradient: Tensor) -> bool:
            if not self.listening:
                return False
            if any(_version(leaf) != version for leaf, version in given):
                self.overwritten(call, tracked)
            else:
                self.receive(call, step, tracked, output, gradient.detach())
            return self.last

        # In place, an operation that keeps its result for its own backward would find it changed.
        in_place = step.rule.taps_in_place or changes_first_argument(call.name)
        self.taps += 1
        return _Tap.apply(tensor if in_place else tensor.clone(), self.anchor, receive)

    def receive(self, call: Call, step: Step, tracked: dict[int, Origin], output: int, gradient: Tensor) -> None:
        """Takes the gradient of one result of a call."""
        wanted = []
        for place, origin in tracked.items():
            if origin in self.factored:
                self.factors[origin] = step.rule.factors(call, gradient)  # type: ignore[assignment]
            else:
                wanted.append(place)
        if wanted:
            free = self._free(tracked, wanted)
            rows = step.rule.rows_in(call, gradient, output, wanted, free)
            for place in sorted(rows, key=lambda place: place not in free):  # what is written already comes first
                self._add(tracked[place], rows[place])

    def _free(self, tracked: Mapping[int, Origin], wanted: Iterable[int]) -> dict[int, Tensor]:
        """Where a rule may write: the place of a parameter that nothing was added to yet, and once in a call."""
        last = {tracked[place]: place for place in wanted}
        return {last[origin]: into for origin, into in self.into.items() if origin in last and origin not in self.rows}

    def overwritten(self, call: Call, tracked: dict[int, Origin]) -> None:
        """Takes note that the arguments of a call are no longer what they were."""
        raise PathChangedError(f"an argument of {call.name} is overwritten after the call")

    def pull_back(self, number: int, rows: Tensor) -> dict[Origin, Tensor]:
        """The gradients of a virtual parameter as those of its sources."""
        return self.virtuals[number].pull_back(rows)

    def _add(self, origin: Origin, rows: Tensor) -> None:
        rows = rows.detach()
        if origin in self.into:
            into = self.into[origin]
            if origin in self.rows:
                into += rows
            elif rows.data_ptr() != into.data_ptr():
                into.copy_(rows)
            self.rows[origin] = into
        else:
            self.rows[origin] = self.rows[origin] + rows if origin in self.rows else rows

    def gradients(
        self, scalar: Tensor, keep_graph: bool, into: Mapping[Origin, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One backward pass from a sum over the samples.

        Args:
            scalar: The sum over the batch of one scalar per sample.
            keep_graph: Whether another pass will follow.
            into: Where the gradients of some parameters are to be: (samples, *shape).

        Returns:
            By parameter: (samples, *shape). A parameter that the scalar does not reach is missing. `factors` holds
            the pairs (A, B) of those that were to be factored.
        """
        self.rows, self.factors, self.into = {}, {}, {} if into is None else into
        if self.taps == 0 or not scalar.requires_grad:
            return {}
        self.listening, self.last = True, not keep_graph
        try:
            torch.autograd.grad(scalar, self.anchor, retain_graph=keep_graph, allow_unused=True)
        finally:
            self.listening = False
        for number in reversed(range(len(self.virtuals))):
            if number in self.rows:
                for origin, pulled in self.pull_back(number, self.rows.pop(number)).items():
                    self._add(origin, pulled)
        gradients, self.rows = self.rows, {}
        return {name: rows for name, rows in gradients.items() if isinstance(name, str)}


class _Tap(torch.autograd.Function):
    """The identity; its backward hands the gradient over. In place, so that what follows may work in place too.

    The output comes first: where it is a view, autograd rebases that argument's edge, and would lose the anchor's.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, receive: Callable[[Tensor], bool]) -> Tensor:
        ctx.receive, ctx.zero = receive, anchor.detach()
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        if ctx.receive(gradients[0]):
            ctx.receive = None  # what the call held is let go, as autograd does it: memory for the gradients to come
        return gradients[0], ctx.zero, None


def _refuse(func: Any, kwargs: Mapping[str, Any]) -> None:
    """What would change a weight, or is no derivative of the output."""
    if func not in (functional.embedding, functional.embedding_bag):
        return
    name = func.__name__
    if kwargs.get("max_norm") is not None:
        raise NotImplementedError(f"{name}: got max_norm={kwargs['max_norm']}, which overwrites the weight when called")
    if kwargs.get("scale_grad_by_freq"):
        raise NotImplementedError(
            f"{name}: got scale_grad_by_freq=True, whose gradients depend on the other samples of a batch"
        )


def _version(tensor: Tensor) -> int:
    """How often a tensor was overwritten; inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _refuse_half(name: str, leaves: Iterable[Tensor]) -> None:
    """What computes with few bits inside a model of float32 parameters, as under autocast."""
    for leaf in leaves:
        if leaf.dtype in _HALF and leaf.requires_grad:
            raise TypeError(
                f"model: {name} computes in {str(leaf.dtype).removeprefix('torch.')}, and gradients are taken in full "
                "precision; take the autocast or the conversion out of its forward"
            )
