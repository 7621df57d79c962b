"""Three samples, perturbed one at a time, tell where the samples lie in every tensor and whether they are coupled.

Two guards stand on it. (a) No sample's output may change with another sample, but by batch norm in training mode; where
the samples of an operation cannot be told apart, its parameters are differentiated one sample at a time. (b) The
gradients captured for the three samples are compared with `autograd.grad`, once with jittered parameters, so that a
zero-initialised layer hides nothing, and once with the model as it is and no mode at work. A parameter whose gradient
differs, used in a scripted module for instance, is differentiated one sample at a time too. Nothing is left out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sdfast.ntk import inputs as feeding
from sdfast.ntk.capture import Capture, Origin, ParameterMode, Seen, Step
from sdfast.ntk.inputs import Inputs
from sdfast.ntk.layers import GENERIC, LOOP, Call
from sdfast.ntk.layers.generic import CANNOT_VMAP
from sdfast.ntk.outputs import Outputs
from sdfast.ntk.randomness import refuse_randomness
from sdfast.ntk.record import Lengths, Record, resolved
from sdfast.ntk.sample_rows import PathChangedError, differs

READS = 8  # further samples on which a value that is read must stay the same
UNSEEN = "used where no torch function shows it: in a scripted module, or a custom autograd.Function"


@dataclass
class Findings:
    """What the probe found.

    Attributes:
        steps: The differentiable calls of a forward pass.
        looped: Parameters that are differentiated one sample at a time, with the reason.
        unused: Parameters that no output depends on.
        batch_norm_trains: Whether batch norm couples the samples: then all parameters are looped, in one batch.
        all_looped: Whether a batch took another path than the probe, and all parameters were looped for it.
        rules: By parameter: the names of the rules that serve it.
        factors: By parameter that can be contracted: (T, d, p), d = 0 where A holds tokens.
    """

    steps: list[Step] = field(default_factory=list)
    looped: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    batch_norm_trains: bool = False
    all_looped: bool = False
    rules: dict[str, list[str]] = field(default_factory=dict)
    factors: dict[str, tuple[int, int, int]] = field(default_factory=dict)


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
    three = inputs.pick([0, inputs.samples // 2, inputs.samples - 1])
    values = {name: _jittered(value, generator) for name, value in parameters.items()}
    lengths = Lengths(parameters, values, frozen_batch_norm=True)
    with refuse_randomness(model, inputs), lengths:
        output = feeding.call(model, {key: tensor[:2].clone() for key, tensor in three.items()})
    outputs.columns(output, 2)
    records = []
    columns = []
    for sample in (None, 0, 1, 2):
        tensors = _perturbed(three, sample, inputs, generator)
        records.append(Record(parameters, values, lengths.calls))
        with records[-1]:
            output = feeding.call(model, tensors)
        columns.append(outputs.columns(output, 3))
    _refuse_coupling(columns)
    findings = Findings(batch_norm_trains=lengths.batch_norm_trains)
    mismatch = next((record.mismatch for record in records if record.mismatch), None)
    further = [Record(parameters, values, lengths.calls) for _ in range(READS if records[0].read else 0)]
    for record in further:
        tensors = three
        for sample in range(3):
            tensors = _perturbed(tensors, sample, inputs, generator)
        with record:
            feeding.call(model, tensors)
    if any(record.read != records[0].read for record in records + further):
        mismatch = "the model reads values of the samples to choose its path"
    if findings.batch_norm_trains:
        findings.looped = dict.fromkeys(parameters, "batch norm in training mode couples the samples")
    elif mismatch is not None:
        findings.looped = dict.fromkeys(parameters, mismatch)
    else:
        findings.steps = resolved(records)
    for guarded in (values,) if findings.batch_norm_trains else (values, None):
        try:
            _guard(model, three, outputs, parameters, findings, guarded, generator)
        except PathChangedError as error:
            findings.looped |= dict.fromkeys(parameters, f"the model takes another path on some samples: {error}")
            _guard(model, three, outputs, parameters, findings, guarded, generator)
    return findings


class _Trial(Capture):
    """A capture that tries every rule: what fails falls back, at last to one sample at a time."""

    def __init__(self, *arguments: Any, findings: Findings, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.findings = findings
        self.uses: dict[str, list[tuple[str, tuple[int, int, int] | None]]] = {}

    def receive(self, call: Call, step: Step, tracked: dict[int, Origin], output: int, gradient: Tensor) -> None:
        for rule in dict.fromkeys((step.rule, *((LOOP,) if step.rule is GENERIC else ()))):
            step.rule = rule
            try:
                super().receive(call, step, tracked, output, gradient)
            except CANNOT_VMAP as error:
                reason = f"{call.name} fails on one sample: {_first_line(error)}"
            else:
                break
        else:
            self._loop(tracked.values(), reason)
            return
        weight = rule.weight(call)
        for place, origin in tracked.items():
            for name in self.sources([origin]):
                direct = place == weight and isinstance(origin, str)
                factors = rule.factors(call, gradient) if direct else None
                self.uses.setdefault(name, []).append((rule.name, None if factors is None else _sizes(*factors)))

    def after(self, seen: Seen, before: Any, result: Any, tensors: list[Tensor]) -> Any:
        if seen.tracked and self.position <= len(self.steps):
            reason = self.steps[self.position - 1].unclear
            if reason is not None:
                self._loop(seen.tracked.values(), reason)
        return super().after(seen, before, result, tensors)

    def overwritten(self, call: Call, tracked: dict[int, Origin]) -> None:
        self._loop(tracked.values(), f"an argument of {call.name} is overwritten after the call")

    def pull_back(self, number: int, rows: Tensor) -> dict[Origin, Tensor]:
        try:
            return super().pull_back(number, rows)
        except CANNOT_VMAP as error:
            self._loop([number], f"{self.virtuals[number].function} cannot be pulled back: {_first_line(error)}")
            return {}

    def _loop(self, origins: Any, reason: str) -> None:
        for name in self.sources(origins):
            self.findings.looped.setdefault(name, reason)


def _guard(
    model: nn.Module,
    three: Mapping[int | str, Tensor],
    outputs: Outputs,
    parameters: Mapping[str, Tensor],
    findings: Findings,
    values: Mapping[str, Tensor] | None,
    generator: torch.Generator,
) -> None:
    """Guard (b): captured gradients against autograd's, with the jittered values or with the model as it is."""
    captured = {
        name: value for name, value in parameters.items() if name not in findings.looped and name not in findings.unused
    }
    if values is None:
        plain = outputs.columns(feeding.call(model, _copies(three)), 3)
    mode = _mode(captured, findings, values, parameters)
    with mode:
        output = feeding.call(model, _copies(three))
    columns = outputs.columns(output, 3)
    weights = torch.randn(columns.shape, generator=generator, dtype=torch.float64, device="cpu").to(columns)
    rows = mode.gradients((columns * weights).sum(), True) if isinstance(mode, Capture) else {}
    if values is not None:
        _find_unused(columns, parameters, values, findings)
        samples, scalars = [0, 1, 2], (columns * weights).sum(1)
        sources = {name: values[name] for name in captured}
    else:
        samples, scalars = [1], (plain * weights).sum(1)
        sources = captured
    for sample in samples if sources else []:
        exact = torch.autograd.grad(
            scalars[sample], list(sources.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        _compare(
            {name: gradient.detach() for name, gradient in zip(sources, exact, strict=True)}, rows, sample, findings
        )
    if isinstance(mode, _Trial):
        for name, uses in mode.uses.items():
            findings.rules[name] = list(dict.fromkeys(rule for rule, _ in uses))
            factors = uses[0][1]
            if len(uses) == 1 and factors is not None:
                findings.factors[name] = factors
            else:
                findings.factors.pop(name, None)


def _mode(
    captured: Mapping[str, Tensor], findings: Findings, values: Any, parameters: Mapping[str, Tensor]
) -> ParameterMode:
    if not captured or findings.batch_norm_trains:
        return ParameterMode(parameters, values, frozen_batch_norm=findings.batch_norm_trains)
    return _Trial(
        captured,
        findings.steps,
        3,
        findings=findings,
        values=None if values is None else {n: values[n] for n in captured},
    )


def _find_unused(
    columns: Tensor, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor], findings: Findings
) -> None:
    """Parameters that reach no output, and those that reach it unseen: not by their jittered values."""
    sources = [*parameters.values(), *values.values()]
    reached = torch.autograd.grad(columns.sum(), sources, retain_graph=True, allow_unused=True)
    for name, own, jittered in zip(parameters, reached, reached[len(parameters) :], strict=False):
        if own is None and jittered is None:
            findings.unused.append(name)
            findings.looped.pop(name, None)
        elif own is not None and name not in findings.looped:
            findings.looped[name] = UNSEEN


def _compare(exact: Mapping[str, Tensor], rows: Mapping[str, Tensor], sample: int, findings: Findings) -> None:
    """Parameters whose captured gradient differs are looped."""
    total = math.sqrt(sum(float(torch.nan_to_num(g, 0, 0, 0).double().square().sum()) for g in exact.values()))
    for name, gradient in exact.items():
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        double = gradient.dtype == torch.float64
        captured = rows[name][sample] if name in rows else torch.zeros_like(gradient)
        error = torch.linalg.vector_norm(torch.nan_to_num(captured - gradient, 0, 0, 0).double())
        own = torch.linalg.vector_norm(torch.nan_to_num(gradient, 0, 0, 0).double())
        allowed = (1e-9 if double else 1e-3) * own + (1e-11 if double else 1e-5) * total
        same = torch.equal(captured.isfinite(), gradient.isfinite())
        if error > allowed or not same:
            findings.looped.setdefault(
                name, UNSEEN if name not in rows else "its captured gradient differs from autograd's"
            )


def _jittered(value: Tensor, generator: torch.Generator) -> Tensor:
    """Other values of the same signs; zeros become small numbers, so that they block no gradient."""
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu").to(value)
    scaled = value.detach() * (1 + 0.1 * noise.clamp(-3, 3))
    return torch.where(scaled == 0, 0.1 * noise, scaled).requires_grad_()


def _copies(tensors: Mapping[int | str, Tensor]) -> dict[int | str, Tensor]:
    return {key: tensor.clone() for key, tensor in tensors.items()}


def _perturbed(
    three: Mapping[int | str, Tensor], sample: int | None, inputs: Inputs, generator: torch.Generator
) -> dict[int | str, Tensor]:
    """Copies, with other numbers in one sample: floats moved, integers drawn from those in the data."""
    tensors = _copies(three)
    if sample is None:
        return tensors
    for key, tensor in tensors.items():
        if tensor.dtype == torch.bool or tensor[sample].numel() == 0:
            continue
        if tensor.is_floating_point() or tensor.is_complex():
            spread = torch.nan_to_num(three[key], 0, 0, 0).std() if tensor.numel() > 1 else tensor.new_ones(())
            noise = torch.randn(tensor[sample].shape, generator=generator, dtype=torch.float64, device="cpu").to(
                tensor.device
            )
            tensor[sample] = tensor[sample] + (0.5 * noise * (spread + 0.01)).to(tensor.dtype)
        else:
            seen = torch.unique(inputs.tensors[key][:1024])
            chosen = torch.randint(len(seen), tensor[sample].shape, generator=generator, device="cpu")
            tensor[sample] = seen.to(tensor.device)[chosen.to(tensor.device)]
    return tensors


def _refuse_coupling(columns: list[Tensor]) -> None:
    base = columns[0].detach()
    for sample, other in enumerate(columns[1:]):
        changed = differs(base, other.detach()).any(1)
        changed[sample] = False
        if changed.any():
            raise ValueError(
                "model: the output of one sample changes with another sample of the batch; only batch norm in training "
                "mode may couple samples"
            )


def _sizes(a: Tensor, b: Tensor) -> tuple[int, int, int]:
    return b.shape[1], a.shape[2] if a.dim() == 3 else 0, b.shape[2]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
