"""Three samples, perturbed one at a time, tell where the samples lie in every tensor and whether they are coupled.

Two guards stand on it. (a) No sample's output may change with another sample, its place or their number, but by batch
norm in training mode; where the samples of an operation cannot be told apart, its parameters are differentiated one
sample at a time. (b) The gradients captured for the three samples are compared with `autograd.grad`, once with jittered
parameters, so that a zero-initialised layer hides nothing, and once with the model as it is and no mode at work; there
the factors of a layer that may be contracted stand for its gradient. A parameter that differs, used in a scripted
module for instance, is differentiated one sample at a time too. Nothing is left out.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdfast.ntk import inputs as feeding
from sdfast.ntk.altered import copies, jittered, perturbed
from sdfast.ntk.capture import ParameterMode
from sdfast.ntk.comparison import lie_apart
from sdfast.ntk.confirmation import graph_of
from sdfast.ntk.coupling import refuse_coupled_gradients, refuse_coupling, refuse_places
from sdfast.ntk.findings import Findings
from sdfast.ntk.guard import Guard, exact_gradients
from sdfast.ntk.inputs import Inputs
from sdfast.ntk.memory_format import is_refused, may_be_faster
from sdfast.ntk.outputs import Outputs
from sdfast.ntk.randomness import refuse_randomness
from sdfast.ntk.record import Lengths, Record
from sdfast.ntk.sample_rows import PathChangedError

# What another memory format may change of them. Of 40 ResNets drawn at random the gradients of three samples changed by
# 2e-7 (the median) to 5e-4, where a unit of a ReLU lies so near 0 that rounding decides, and outputs by up to 7e-6.
_OF_OUTPUTS, _OF_GRADIENTS = 1e-4, 5e-3
READS = 8  # further samples on which a value that is read must stay the same


def probe(model: nn.Module, inputs: Inputs, outputs: Outputs, parameters: Mapping[str, Tensor]) -> Findings:
    """Runs the model on a few samples, and finds out how its gradients per sample can be captured.

    Args:
        model: The model, in a state that `unchanged` restores.
        inputs: Its samples.
        outputs: Which outputs.
        parameters: Those to differentiate, by name.

    Returns:
        What it found.

    Raises:
        ValueError: The model draws random numbers, or couples samples by anything but batch norm.
    """
    generator = torch.Generator().manual_seed(0)
    picked = _picked(inputs)
    inputs.channels_last = False
    three = inputs.pick(picked)
    values = jittered(parameters, generator)
    lengths = Lengths(parameters, values, frozen_batch_norm=True)
    with refuse_randomness(model, inputs), lengths:
        output = feeding.call(model, {key: tensor[[1, 0]] for key, tensor in three.items()})
    swapped = outputs.columns(output, 2).detach()

    def recorded(tensors: dict[int | str, Tensor]) -> tuple[Record, Tensor]:
        record = Record(parameters, values, lengths.calls)
        with record:
            output = feeding.call(model, tensors)
        return record, outputs.columns(output, 3).detach()

    base, column = recorded(copies(three))
    columns: list[Tensor] = []
    read: list[Any] | None = base.read  # None where others read something else
    mismatch = base.mismatch
    for sample in range(3):  # one at a time, so that what is compared lies in the cache and is let go
        other, changed = recorded(perturbed(three, sample, inputs, generator))
        base.compare(other, sample)
        columns.append(changed)
        mismatch = mismatch or other.mismatch
        read = read if other.read == base.read else None

    def again() -> Tensor:
        with ParameterMode(parameters, values, frozen_batch_norm=True):
            return outputs.columns(feeding.call(model, copies(three)), 3).detach()

    refuse_coupling(column, columns, again)
    refuse_places(column, swapped, again)
    findings = Findings(
        batch_norm_trains=lengths.batch_norm_trains, reads=read != [], activations=base.activations // 3
    )
    for _ in range(READS if base.read else 0):
        tensors: Mapping[int | str, Tensor] = three
        for sample in range(3):
            tensors = perturbed(tensors, sample, inputs, generator)
        read = read if recorded(dict(tensors))[0].read == base.read else None
    if read is None:
        mismatch = "the model reads values of the samples to choose its path"
    if findings.batch_norm_trains:
        findings.looped = dict.fromkeys(parameters, "batch norm in training mode couples the samples")
    elif mismatch is not None:
        findings.looped = dict.fromkeys(parameters, mismatch)
    else:
        findings.steps = base.resolved()
    del base  # with the tensors that it noted
    plain = outputs.columns(feeding.call(model, copies(three)), 3)
    findings.graph = graph_of(plain, parameters)

    comparison = Guard(model, three, outputs, parameters, plain, generator)

    def guard(values: Mapping[str, Tensor] | None) -> None:
        try:
            comparison.complete(findings, values)
        except PathChangedError as error:
            findings.looped |= dict.fromkeys(parameters, f"the model takes another path on some samples: {error}")
            comparison.complete(findings, values)

    guard(values)
    followed = not (findings.looped or findings.reads)
    findings.large_pictures = may_be_faster(inputs, parameters, findings.rules, findings.activations)
    found = None
    if followed and findings.large_pictures and not is_refused(model):
        with warnings.catch_warnings():  # of a format that the user did not choose
            warnings.simplefilter("ignore")
            found = _with_channels_last(model, inputs, outputs, parameters, findings, plain, generator)
    if found is not None:
        findings = found
    elif not findings.batch_norm_trains:
        guard(None)
    findings.answers = dict(zip(picked, plain.detach(), strict=True))
    if findings.looped and not findings.batch_norm_trains:
        looped = {name: parameters[name] for name in findings.looped}
        for sample in range(3):
            others: Mapping[int | str, Tensor] = three
            for beside in {0, 1, 2} - {sample}:
                others = perturbed(others, beside, inputs, generator)
            both = [_gradients_of(sample, model, tensors, outputs, looped) for tensors in (three, others)]
            refuse_coupled_gradients(list(looped), *both)
    return findings


def _with_channels_last(
    model: nn.Module,
    inputs: Inputs,
    outputs: Outputs,
    parameters: Mapping[str, Tensor],
    findings: Findings,
    before: Tensor,
    generator: torch.Generator,
) -> Findings | None:
    """The findings for inputs in that memory format, ``None`` where the model does not give the same in it.

    A model may look at strides, or take views that this format does not have. So guard (b) stands here too, and outputs
    and gradients are compared with those in the model's own format: `before`, with their graph.
    """
    found = findings.copied()
    inputs.channels_last = found.channels_last = True
    try:
        three = inputs.pick(_picked(inputs))
        plain = outputs.columns(feeding.call(model, copies(three)), 3)
        found.graph = graph_of(plain, parameters)
        if not lie_apart({"": before.detach()}, {"": plain.detach()}, _OF_OUTPUTS):
            weights, gradients = Guard(model, three, outputs, parameters, plain, generator).complete(found, None)
            own = exact_gradients((before * weights).sum(), {name: parameters[name] for name in gradients})
            if not (found.looped or lie_apart(own, gradients, _OF_GRADIENTS)):
                return found
    except Exception:  # whatever it says against the format: the model is run as it was given
        pass
    inputs.channels_last = False
    return None


def confirmed(
    model: nn.Module, inputs: Inputs, outputs: Outputs, parameters: Mapping[str, Tensor], findings: Findings
) -> Findings | None:
    """Findings of the same model at another time, once guard (b) has seen them hold on these samples.

    Of one output it is left to the first pass to compare the gradients of these samples.

    Args:
        model: See `probe`.
        inputs: See `probe`.
        outputs: See `probe`.
        parameters: See `probe`.
        findings: Are given the outputs of these samples.

    Returns:
        The findings, or ``None`` where they do not hold.

    Raises:
        ValueError: The model draws random numbers.
    """
    if may_be_faster(inputs, parameters, findings.rules, findings.activations) != findings.large_pictures:
        return None  # of other sizes: a probe may choose the other memory format, and with it other bits
    generator = torch.Generator().manual_seed(0)
    picked = _picked(inputs)
    inputs.channels_last = findings.channels_last
    three = inputs.pick(picked)
    with refuse_randomness(model, inputs):
        plain = outputs.columns(feeding.call(model, copies(three)), 3)
    if graph_of(plain, parameters) != findings.graph:
        return None
    findings.answers = dict(zip(picked, plain.detach(), strict=True))
    findings.reused, looped = True, dict(findings.looped)
    if outputs.classes == 1:
        findings.before = plain
        return findings
    try:
        Guard(model, three, outputs, parameters, plain, generator).complete(findings, None)
    except PathChangedError:
        return None
    return findings if findings.looped == looped else None


def _picked(inputs: Inputs) -> list[int]:
    return [0, inputs.samples // 2, inputs.samples - 1]


def _gradients_of(
    sample: int,
    model: nn.Module,
    tensors: Mapping[int | str, Tensor],
    outputs: Outputs,
    parameters: Mapping[str, Tensor],
) -> list[Tensor]:
    """Gradients of one of three samples, by autograd alone."""
    columns = outputs.columns(feeding.call(model, copies(tensors)), 3)
    weights = torch.linspace(1, 2, columns.shape[1]).to(columns)
    gradients = torch.autograd.grad(
        columns[sample] @ weights, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return [gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients]
