"""Gradients per sample of a model on given inputs, micro-batch by micro-batch, for any selection of its parameters."""

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from mmap import mmap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from sdfast import _checks
from sdfast._warnings import warn_caller
from sdfast.ntk import inputs as feeding
from sdfast.ntk import panels
from sdfast.ntk.capture import Capture
from sdfast.ntk.confirmation import Confirmation
from sdfast.ntk.coupling import refuse_other_answers, refuse_other_pieces
from sdfast.ntk.findings import Findings
from sdfast.ntk.inputs import Inputs
from sdfast.ntk.memory_format import FormatRefusedError
from sdfast.ntk.outputs import Outputs
from sdfast.ntk.sample_rows import PathChangedError
from sdfast.ntk.verified import findings_of, forget

# Samples of a micro-batch: many, as each costs the calls of all layers; fewer where activations would take more than so
# many bytes; most where no layer has more than one position a sample, and its weight is what is read again for each.
LEAST_BATCH_SIZE, BATCH_SIZE, BATCH_SIZE_OF_ONE_POSITION = 32, 192, 1024
ACTIVATIONS = 2**29


class Chunk(NamedTuple):
    """Gradients of one output of the samples from `start` to `stop`.

    Attributes:
        start: First sample.
        stop: One behind the last.
        output: Which column of the outputs.
        rows: By parameter (samples of the chunk, numel).
        factors: By parameter A and B; see `layers.Rule.factors`.
    """

    start: int
    stop: int
    output: int
    rows: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, Tensor]]


class Source:
    """Where gradients come from: a model, its inputs, the outputs asked for, and what the probe found.

    Call it inside `unchanged.unchanged`.

    Args:
        model: The model.
        inputs: Its samples.
        outputs: Which outputs.
        parameters: Those to differentiate, by name.
        batch_size: Samples of a micro-batch, or ``None``.
        findings: Of this model; ``None`` to probe it.
        of_these: Whether `findings` are of these inputs, and not of others.
        keep_outputs: Keep what the model gives for each micro-batch, for `model_output`.
        spare: Memory for one panel of gradients, which every pass may overwrite.
        afresh: Probe, whatever is known of the model.
        memory: Bytes that the activations of a micro-batch may take where `batch_size` is ``None``.

    Raises:
        ValueError: Batch norm in training mode, and a batch size below the number of samples.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        outputs: Outputs,
        parameters: Mapping[str, Tensor],
        batch_size: int | None,
        findings: Findings | None = None,
        keep_outputs: bool = False,
        spare: Tensor | None = None,
        afresh: bool = False,
        of_these: bool = False,
        memory: int | None = None,
    ) -> None:
        self.model, self.inputs, self.outputs, self.parameters = model, inputs, outputs, parameters
        self.findings: Findings = (
            findings_of(model, inputs, outputs, parameters, afresh) if findings is None else findings
        )
        of_these = of_these or findings is None
        inputs.channels_last = self.findings.channels_last
        # What the probe saw is known of its own inputs; batch norm in training mode changes it with the batch.
        self.answers = self.findings.answers if of_these and not self.findings.batch_norm_trains else {}
        before = self.findings.before if of_these else None
        self.confirmation = None if before is None else Confirmation(before, [*self.answers], parameters)
        self.samples, self.spare, self.widest = inputs.samples, spare, 0
        self.lent: list[mmap] = []
        self.kept: dict[int, Tensor] | None = {} if keep_outputs else None
        self.batch_size = min(self._usual_batch_size(memory) if batch_size is None else batch_size, self.samples)
        if self.findings.batch_norm_trains:
            if batch_size is not None and batch_size < self.samples:
                raise ValueError(
                    f"batch_size: got {batch_size}, but batch norm is in training mode and takes all {self.samples} "
                    "samples as one batch; leave it out, or call model.eval()"
                )
            self.batch_size = self.samples

    def _usual_batch_size(self, memory: int | None) -> int:
        """By the work of a parameter's gradient, at one position one product for each of its entries; by activations.

        All micro-batches are of nearly the same size.
        """
        found = self.findings
        activations = max(1, found.activations)
        bound = self.samples if memory is None else max(1, memory // activations)
        if found.looped:
            return min(LEAST_BATCH_SIZE, bound)  # what is looped passes all of a micro-batch
        single = all(found.work.get(name, 0) <= 2 * parameter.numel() for name, parameter in self.parameters.items())
        most = BATCH_SIZE_OF_ONE_POSITION if single and found.work else BATCH_SIZE
        size = min(bound, max(LEAST_BATCH_SIZE, min(most, ACTIVATIONS // activations)))
        return -(-self.samples // -(-self.samples // size))

    @property
    def classes(self) -> int:
        """Scalars per sample."""
        return self.outputs.classes

    def chunks(
        self, wanted: Iterable[str], factored: Iterable[str] = (), panels: Mapping[str, Tensor] | None = None
    ) -> Iterator[Chunk]:
        """One forward and `classes` backward passes for each micro-batch.

        Args:
            wanted: Parameters whose gradients are asked for.
            factored: Parameters whose factors are asked for: those in ``findings.factors``.
            panels: By parameter (classes, all samples, numel), entries of a sample side by side: where its rows are to
                be, of which a chunk then holds a part.

        Yields:
            A chunk for each micro-batch and output. A parameter that no output depends on has rows of zeros.

        Raises:
            PathChangedError: A micro-batch took another way through the model than the probe did.
            FormatRefusedError: The model failed, or did so, in a memory format that is not its inputs' own.
        """
        try:
            yield from self._chunks(wanted, factored, panels)
        except Exception as error:
            changed = isinstance(error, PathChangedError)
            if changed or self.inputs.channels_last:
                forget(self.model)
            # Findings of another time may not hold in any format: the model is to be probed first.
            if not self.inputs.channels_last or (changed and self.findings.reused):
                raise
            raise FormatRefusedError(str(error)) from error

    def _chunks(
        self, wanted: Iterable[str], factored: Iterable[str], panels: Mapping[str, Tensor] | None
    ) -> Iterator[Chunk]:
        wanted, factored = list(wanted), frozenset(factored)
        followed = {name: self.parameters[name] for name in [*wanted, *factored] if name not in self.findings.looped}
        looped = {name: self.parameters[name] for name in wanted if name in self.findings.looped}
        missing = {name for name in followed if name not in self.findings.unused}
        if self.confirmation is not None:
            self.confirmation.begin()
        for start in range(0, self.samples, self.batch_size):
            stop = min(start + self.batch_size, self.samples)
            tensors = self.inputs.rows(start, stop)
            capture = self._capture(followed, stop - start, factored) if followed else None
            if capture is None:
                output = feeding.call(self.model, tensors)
            else:
                with capture:
                    output = feeding.call(self.model, tensors)
                if capture.position != len(self.findings.steps):
                    raise PathChangedError("it ended after another number of operations")
            columns = self.outputs.columns(output, stop - start)
            if self.kept is not None:
                self.kept[start] = output.detach()
            refuse_other_answers(self.answers, columns, start)
            if self.findings.reads and not self.findings.batch_norm_trains:
                refuse_other_pieces(columns, partial(self._alone, start))
            self._check_unused(columns)
            for column in range(self.classes):
                last = column + 1 == self.classes and not looped
                into = self._into(panels, column, start, stop)
                rows = {} if capture is None else capture.gradients(columns[:, column].sum(), not last, into)
                factors = {} if capture is None else dict(capture.factors)
                missing -= rows.keys() | factors.keys()
                if self.confirmation is not None:
                    self.confirmation.take(start, stop, rows, factors)
                rows |= _one_by_one(columns[:, column], looped)
                flat = {name: self._flat(name, rows.get(name), into.get(name), stop - start) for name in wanted}
                yield Chunk(start, stop, column, flat, factors)
        if missing:
            raise PathChangedError(f"no gradient of {', '.join(sorted(missing))} came")
        if self.confirmation is not None:
            self.confirmation.compare()
            if not self.confirmation.left:
                self.confirmation = None

    def _capture(self, followed: Mapping[str, Tensor], samples: int, factored: frozenset[str]) -> Capture:
        found = self.findings
        others = [self.parameters[name] for name in (*found.looped, *found.unused)] if found.products else None
        return Capture(followed, found.steps, samples, factored, others)

    def panel(self, width: int) -> Tensor:
        """Uninitialised rows for all samples (classes, samples, width), in the spare memory where they fit."""
        shape = (self.classes, self.samples, width)
        self.widest = max(self.widest, math.prod(shape))
        if self.spare is not None and self.spare.numel() >= math.prod(shape):
            return self.spare[: math.prod(shape)].view(shape)
        first = next(iter(self.parameters.values()))
        self.give_back()
        memory = panels.take(math.prod(shape) * first.element_size()) if first.device.type == "cpu" else None
        if memory is None:
            return torch.empty(shape, dtype=first.dtype, device=first.device)
        self.lent.append(memory)
        return torch.frombuffer(memory, dtype=first.dtype, count=math.prod(shape)).view(shape)

    def give_back(self) -> None:
        """Leaves the memory of panels that are no more to those to come."""
        panels.give_back(self.lent)

    def model_output(self) -> Tensor:
        """What the model gave for all samples, once `chunks` went through them; it has to be tensors (samples, ...)."""
        return torch.cat([*(self.kept or {}).values()])

    @torch.no_grad()
    def _alone(self, start: int, first: int, last: int) -> Tensor:
        """The outputs of samples `first` to `last` after `start` as a batch of their own."""
        rows = self.inputs.rows(start + first, start + last)
        return self.outputs.columns(feeding.call(self.model, rows), last - first)

    def _check_unused(self, columns: Tensor) -> None:
        """What no output of the probe's samples depends on, none of these may depend on."""
        unused = [self.parameters[name] for name in self.findings.unused]
        if unused:
            reached = torch.autograd.grad(columns.sum(), unused, retain_graph=True, allow_unused=True)
            if any(gradient is not None for gradient in reached):
                raise PathChangedError("a parameter is used that the probe's samples do not use")

    def _into(self, panels: Mapping[str, Tensor] | None, column: int, start: int, stop: int) -> dict[Any, Tensor]:
        """The part of each panel that a chunk fills, a sample's part in the parameter's shape."""
        return {
            name: panel[column, start:stop].view(stop - start, *self.parameters[name].shape)
            for name, panel in (panels or {}).items()
        }

    def _flat(self, name: str, rows: Tensor | None, into: Tensor | None, samples: int) -> Tensor:
        if rows is None:
            rows = self.parameters[name].new_zeros(samples, *self.parameters[name].shape)
        if into is not None and rows.data_ptr() != into.data_ptr():
            rows = into.copy_(rows)
        return rows.reshape(samples, -1)


def _one_by_one(scalars: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of each scalar by a backward pass of its own: (samples, *shape) for each parameter."""
    if not parameters:
        return {}
    rows = {name: parameter.new_zeros(len(scalars), *parameter.shape) for name, parameter in parameters.items()}
    for sample, scalar in enumerate(scalars):
        gradients = torch.autograd.grad(scalar, list(parameters.values()), retain_graph=True, allow_unused=True)
        for row, gradient in zip(rows.values(), gradients, strict=True):
            if gradient is not None:
                row[sample] = gradient.to_dense() if gradient.is_sparse else gradient
    return rows


def select_parameters(model: nn.Module, params: Iterable[str] | Callable[[str], bool] | None) -> dict[str, Tensor]:
    """The parameters to differentiate, each once.

    Args:
        model: The model.
        params: Names or shell patterns of names, a function of the name, or ``None`` for all that require grad.

    Returns:
        By name.

    Raises:
        TypeError: `model` is no module, or a parameter is in half precision or complex.
        ValueError: No parameter is left, a name matches none, one is frozen, or they differ in device or dtype.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    named: dict[str, Tensor] = dict(model.named_parameters())
    if params is None:
        chosen = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    else:
        chosen = _chosen(named, params)
    if not chosen:
        raise ValueError(f"{'model' if params is None else 'params'}: no parameter that requires grad is left")
    first = next(iter(chosen))
    for name, parameter in chosen.items():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"model: parameter {name} has no shape yet; call the model once on a batch")
        if parameter.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"model: parameter {name} is {_checks.dtype_name(parameter)}, wanted float32 or float64, since "
                "gradients are taken in full precision; call model.float()"
            )
        for what in ("device", "dtype"):
            got, wanted = getattr(parameter, what), getattr(chosen[first], what)
            if got != wanted:
                raise ValueError(f"model: parameter {name} has {what} {got}, wanted {wanted} as {first} has")
    return chosen


def _chosen(named: dict[str, Tensor], params: Any) -> dict[str, Tensor]:
    if isinstance(params, str) or not (callable(params) or isinstance(params, Iterable)):
        raise TypeError(f"params: got {type(params).__name__}, wanted names of parameters, or a function of the name")
    if callable(params):
        names = {name for name in named if params(name)}
    else:
        names = set()
        for pattern in params:
            matching = fnmatch.filter(named, pattern)
            if not matching:
                raise ValueError(f"params: {pattern!r} matches none of the parameters {', '.join(named)}")
            names.update(matching)
    frozen = [name for name in named if name in names and not named[name].requires_grad]
    if frozen:
        raise ValueError(f"params: {', '.join(frozen)} do not require grad; call requires_grad_() or leave them out")
    return {name: parameter for name, parameter in named.items() if name in names}


def say(findings: Findings) -> None:
    """Warns of what a user may not expect: parameters without influence, and slow ones."""
    if findings.unused:
        warn_caller(f"no output depends on {', '.join(findings.unused)}: their gradients are zero")
    if findings.batch_norm_trains:
        warn_caller(
            "batch norm is in training mode and couples the samples: the gradients take one backward pass for each "
            "sample and output, with all samples as one batch"
        )
    elif findings.looped:
        reasons: dict[str, list[str]] = {}
        for name, reason in findings.looped.items():
            reasons.setdefault(reason, []).append(name)
        told = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
        warn_caller(f"one backward pass for each sample and output: {told}")


def loop_everything(findings: Findings, parameters: Iterable[str], why: str) -> None:
    """After a batch took another path: all parameters one sample at a time.

    Raises:
        PathChangedError: The findings are of another time: the model is to be probed first, see `verified.retried`.
    """
    if findings.reused:
        raise PathChangedError(why)
    for name in parameters:
        findings.looped.setdefault(name, f"the model takes another path on some samples: {why}")
    findings.unused.clear()
    findings.all_looped = True
    findings.factors.clear()
