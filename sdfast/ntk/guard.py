"""Guard (b): the gradients that a capture gives for three samples are those of `autograd.grad`, or are taken by it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdfast.ntk import inputs as feeding
from sdfast.ntk.altered import copies
from sdfast.ntk.capture import Capture, Origin, ParameterMode, Seen, Step
from sdfast.ntk.comparison import UNSEEN, loop_what_differs, shares_of
from sdfast.ntk.costs import may_serve
from sdfast.ntk.coupling import refuse_other_answers
from sdfast.ntk.findings import Findings
from sdfast.ntk.layers import GENERIC, LOOP, Call
from sdfast.ntk.layers.generic import CANNOT_VMAP
from sdfast.ntk.outputs import Outputs


class Guard(NamedTuple):
    """Compares captured gradients with autograd's.

    Attributes:
        model: The model.
        three: Samples.
        outputs: Which outputs.
        parameters: Those to differentiate, by name.
        plain: The outputs of the model as it is, with their graph.
        generator: Of the weights.
    """

    model: nn.Module
    three: Mapping[int | str, Tensor]
    outputs: Outputs
    parameters: Mapping[str, Tensor]
    plain: Tensor
    generator: torch.Generator

    def complete(self, findings: Findings, values: Mapping[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Completes the findings by what the comparison shows: what differs is looped.

        A model that takes gradients inside, or looks at its own graph, may mind that batch norm is run in another way
        (`batch_norm.run`): then it is left to torch from here on.

        Args:
            findings: So far.
            values: Jittered ones, by name; ``None`` for the model as it is.

        Returns:
            The weights of all outputs in the sum that was differentiated, and its gradients by autograd.

        Raises:
            PathChangedError: The model takes another path than before.
        """
        if values is None and findings.products:
            attempt = findings.copied()
            try:
                result = self._compared(attempt, values)
            except Exception:  # whatever it minds: a second failure has another reason
                findings.products = False
            else:
                findings.products = attempt.looped == findings.looped
                if findings.products:
                    findings.take(attempt)
                    return result
        return self._compared(findings, values)

    def _compared(self, findings: Findings, values: Mapping[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        parameters, outputs = self.parameters, self.outputs
        captured = {
            name: value
            for name, value in parameters.items()
            if name not in findings.looped and name not in findings.unused
        }
        mode = self._mode(captured, findings, values)
        with mode:
            output = feeding.call(self.model, copies(self.three))
        columns = outputs.columns(output, 3)
        if values is None and findings.products:
            refuse_other_answers(dict(enumerate(self.plain.detach())), columns, 0)
        weights = torch.randn(columns.shape, generator=self.generator, dtype=torch.float64, device="cpu").to(columns)
        rows = mode.gradients((columns * weights).sum(), True) if isinstance(mode, Capture) else {}
        factors = mode.factors if isinstance(mode, Capture) else {}
        shares = shares_of(rows, columns, self.generator)
        if values is None:
            exact = exact_gradients((self.plain * weights).sum(1) @ shares, captured)
        else:
            exact = _find_unused((columns * weights).sum(1) @ shares, parameters, values, findings)
        loop_what_differs({name: exact[name] for name in captured}, rows, shares, findings.looped, factors)
        if isinstance(mode, _Trial):
            findings.work = mode.work
            for name, uses in mode.uses.items():
                findings.rules[name] = list(dict.fromkeys(rule for rule, _ in uses))
                sizes_of_factors = uses[0][1]
                sizes = (parameters[name].numel(), outputs.form, outputs.classes)
                compared = values is not None or name in mode.factors  # those that stay have been, by the second guard
                if len(uses) == 1 and sizes_of_factors and may_serve(sizes_of_factors, *sizes) and compared:
                    findings.factors[name] = sizes_of_factors
                else:
                    findings.factors.pop(name, None)
            findings.biases = {
                bias: weight
                for bias, weight in mode.biases.items()
                if isinstance(bias, str) and isinstance(weight, str) and len(mode.uses[bias]) == 1
                and findings.factors.get(weight, (0,))[0] == 1
            }  # fmt: skip
        return weights * shares[:, None], exact

    def _mode(
        self, captured: Mapping[str, Tensor], findings: Findings, values: Mapping[str, Tensor] | None
    ) -> ParameterMode:
        if not captured or findings.batch_norm_trains:
            return ParameterMode(self.parameters, values, frozen_batch_norm=findings.batch_norm_trains)
        if values is not None:
            return _Trial(captured, findings.steps, 3, findings=findings, values={n: values[n] for n in captured})
        others = [value for name, value in self.parameters.items() if name not in captured]
        return _Trial(
            captured,
            findings.steps,
            3,
            frozenset(findings.factors) & captured.keys(),
            others if findings.products else None,
            findings=findings,
        )


class _Trial(Capture):
    """A capture that tries every rule: what fails falls back, at last to one sample at a time."""

    def __init__(self, *arguments: Any, findings: Findings, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.findings = findings
        self.uses: dict[str, list[tuple[str, tuple[int, int, int] | None]]] = {}
        self.work: dict[str, int] = {}
        self.biases: dict[Origin, Origin] = {}

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
        weight, bias = rule.weight(call), rule.bias(call)
        if weight is not None and bias is not None:
            self.biases[tracked[bias]] = tracked[weight]
        for place, origin in tracked.items():
            for name in self.sources([origin]):
                flops = rule.operations(call, gradient) if place == weight else 2 * gradient.numel()
                self.work[name] = self.work.get(name, 0) + flops // self.samples
                direct = place == weight and isinstance(origin, str)
                self.uses.setdefault(name, []).append(
                    (rule.name, rule.factor_sizes(call, gradient) if direct else None)
                )

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


def _find_unused(
    scalar: Tensor, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor], findings: Findings
) -> dict[str, Tensor]:
    """Parameters that reach no output, and those that reach it unseen: not by their jittered values.

    Gives the gradients by the jittered values.
    """
    reached = torch.autograd.grad(scalar, [*parameters.values(), *values.values()], allow_unused=True)
    by_values = reached[len(parameters) :]
    for name, own, by_value in zip(parameters, reached, by_values, strict=False):
        if own is None and by_value is None:
            findings.unused.append(name)
            findings.looped.pop(name, None)
        elif own is not None and name not in findings.looped:
            findings.looped[name] = UNSEEN
    return _materialised(values, by_values)


def exact_gradients(scalar: Tensor, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a scalar by autograd alone, zero where it does not depend on a source.

    Args:
        scalar: Of which.
        sources: With respect to what, by name.

    Returns:
        By name.
    """
    if not sources:
        return {}
    return _materialised(
        sources, torch.autograd.grad(scalar, list(sources.values()), retain_graph=True, allow_unused=True)
    )


def _materialised(sources: Mapping[str, Tensor], gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(source) if gradient is None else gradient.detach()
        for (name, source), gradient in zip(sources.items(), gradients, strict=True)
    }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
