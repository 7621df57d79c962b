"""Which rule and which method serves each parameter of a Gram matrix, what decides it, and what all of it costs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from sdfast import report
from sdfast.ntk import costs
from sdfast.ntk.costs import Rates
from sdfast.ntk.findings import Findings
from sdfast.ntk.layers.kernels import TORCH, kernel_for
from sdfast.ntk.products import PAIRS_AT_ONCE

if TYPE_CHECKING:
    from sdfast.ntk.blocks import Group

# Rules, by a part of their names, that form gradients with the package's kernels where these serve.
OWN_KERNELS = ("convolution", "norm")


_METHODS = {
    "materialise": "gradients of all samples, then their products",
    "contract": "(AAᵀ)∘(BBᵀ) of a layer's inputs A and the gradients B of its outputs",
    "stream": "A and B of all samples; gradients are formed from them a few columns at a time",
    "loop": "a backward pass for each sample",
    "zero": "no output depends on it",
}
_COLUMNS = {
    "kernel": "that forms its gradients, cpu or triton of this package, or torch",
    "FLOPs": "of gradients and products, or of the model's passes",
    "bytes": "of gradients, factors and H, written and read",
    "memory": "bytes held at a time, by the model those of a micro-batch's activations",
}


@dataclass
class Entry:
    """One parameter.

    Attributes:
        name: Of the parameter.
        shape: Of it.
        rule: What gives its gradients per sample.
        method: ``"materialise"`` (gradients of all samples, then their products), ``"contract"`` (AAᵀ∘BBᵀ, the
            gradients never formed), ``"stream"`` (A and B of all samples, from which the gradients are formed a few
            columns at a time and multiplied at once), ``"loop"`` (one backward pass for each sample), or ``"zero"`` (no
            output depends on it).
        factors: (T, d, p) of a layer that can be contracted: positions, inputs (0: tokens), outputs.
        beside: Of a contracted bias: its weight, to whose AAᵀ it adds 1.
        reason: Why it is looped.
        kernel: Whose kernels form its gradients: ``"cpu"`` or ``"triton"`` of this package, or ``"torch"``.
        gradient_flops: Of the gradients of all samples and outputs; 0 where none is formed.
        product_flops: Of what this parameter adds to H, of a symmetric H to its lower triangle.
        bytes: Gradients or factors written once and read by every tile.
        passes: Over the samples that it takes part in; more than one where it does not fit in the memory whole.
        memory: Bytes that its gradients or factors take, of all samples.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    method: str
    factors: tuple[int, int, int] | None = None
    beside: str = ""
    reason: str = ""
    kernel: str = TORCH
    gradient_flops: int = 0
    product_flops: int = 0
    bytes: int = 0
    passes: int = 0
    memory: int = 0

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def single(self) -> bool:
        """Whether it is contracted with one position a sample: then no pairs are held."""
        return self.method == "contract" and self.factors is not None and self.factors[0] == 1 and self.factors[1] > 0

    def factor_bytes(self, samples: int, classes: int, itemsize: int) -> int:
        """Bytes of A and B of so many samples."""
        positions, inputs, width = self.factors or (0, 0, 0)
        return samples * positions * (max(inputs, 1) + classes * width) * itemsize


class Seconds(NamedTuple):
    """What a calibrated plan predicts.

    Attributes:
        probe: Of finding out how the model uses its parameters.
        passes: Of all forward and backward passes with the gradients per sample.
        products: Of all tiles of H.
    """

    probe: float
    passes: float
    products: float

    @property
    def total(self) -> float:
        """Of the whole matrix."""
        return sum(self)


@dataclass
class Plan:
    """How a Gram matrix is computed; `print` shows a table. `gram` follows the same object.

    Attributes:
        entries: Method and costs of every parameter.
        groups: What each pass over the samples collects.
        form: Of the outputs: ``"one"``, ``"trace"``, ``"mean"``, ``"per_class"`` or ``"full"``.
        classes: Outputs that are differentiated, one backward pass each.
        samples: n of both sides.
        symmetric: Whether both sides are the same samples.
        precision: Of the products.
        batch_size: Samples of a micro-batch.
        memory: Bytes that the gradients held at a time may take.
        itemsize: Bytes of a number of them.
        activations: Bytes of what the model's operations on a micro-batch give.
        pass_flops: Of all forward passes and the backward passes through the activations.
        tile_bytes: Read and written of H.
        result_bytes: Of H.
        rates: That decided where FLOPs nearly tie; ``None`` where FLOPs alone did.
        seconds: Predicted; ``None`` without ``calibrate=True``.
    """

    entries: list[Entry]
    groups: "list[Group]" = field(default_factory=list)
    form: str = "one"
    classes: int = 1
    samples: tuple[int, int] = (0, 0)
    symmetric: bool = True
    precision: str = "float32"
    batch_size: int = 0
    memory: int = 0
    itemsize: int = 4
    activations: int = 0
    pass_flops: int = 0
    tile_bytes: int = 0
    result_bytes: int = 0
    rates: Rates | None = None
    seconds: Seconds | None = None

    @property
    def everyone(self) -> int:
        """Samples whose gradients are taken: those of both sides where they are not the same."""
        return self.samples[0] if self.symmetric else sum(self.samples)

    @property
    def blocks(self) -> int:
        """Products of outputs: C of each with itself, C² of all with all."""
        return self.classes**2 if self.form == "full" else self.classes

    @property
    def passes(self) -> int:
        """Over the samples."""
        return len(self.groups)

    @property
    def flops(self) -> int:
        """Of everything."""
        return self.pass_flops + sum(entry.gradient_flops + entry.product_flops for entry in self.entries)

    @property
    def bytes(self) -> int:
        """Of gradients, factors and H, written and read; those of activations are not counted."""
        return self.tile_bytes + sum(entry.bytes for entry in self.entries)

    @property
    def peak_memory(self) -> int:
        """Bytes of the gradients of the largest group, of a micro-batch's activations, of H, and of pairs of positions.

        What torch's operations take while they work comes on top.
        """
        by_name = {entry.name: entry for entry in self.entries}
        column = self.everyone * self.classes * self.itemsize
        held = [
            group.width * column + sum(by_name[name].memory for name in (*group.factored, *group.streamed))
            for group in self.groups
        ]
        positions = [entry.factors[0] for entry in self.entries if entry.method == "contract" and entry.factors]
        most = max(positions, default=0)
        pairs = most**2 * math.prod(self.samples) if most > 1 else 0
        work = 3 * 8 * min(pairs, PAIRS_AT_ONCE)  # both products and the product of both, in float64
        return max(held, default=0) + self.activations + self.result_bytes + work

    def settings(self) -> dict[str, object]:
        """What a call of `gram` must share with the plan that it is given."""
        return {
            "samples": self.samples,
            "outputs": f"{self.form} of {self.classes}",
            "precision": self.precision,
            "batch_size": self.batch_size,
            "memory": self.memory,
            "params": [entry.name for entry in self.entries],
        }

    def __str__(self) -> str:
        headers = ("parameter", "shape", "rule", "method", "kernel", "FLOPs", "bytes", "passes", "memory")
        rows: list[tuple[object, ...]] = [
            (
                entry.name,
                "×".join(map(str, entry.shape)) or "1",
                entry.rule,
                entry.method,
                entry.kernel,
                _short(entry.gradient_flops + entry.product_flops),
                _short(entry.bytes),
                entry.passes,
                _short(entry.memory),
            )
            for entry in self.entries
        ]
        rows.append(("model", "", "forward and backward", "", TORCH, _short(self.pass_flops), "", self.passes,
                     _short(self.activations)))  # fmt: skip
        rows.append(("H", "×".join(map(str, self.samples)), "", "", "", "", _short(self.tile_bytes), "",
                     _short(self.result_bytes)))  # fmt: skip
        rows.append(("total", "", "", "", "", _short(self.flops), _short(self.bytes), self.passes,
                     _short(self.peak_memory)))  # fmt: skip
        used = {entry.method for entry in self.entries}
        legend = {method: meaning for method, meaning in _METHODS.items() if method in used} | _COLUMNS
        lines = [report.plain_table(headers, rows), ""]
        lines += [f"{name}: {meaning}" for name, meaning in legend.items()]
        lines += [f"passes over {self.everyone} samples in micro-batches of {self.batch_size}"]
        lines += [f"{entry.name} is looped: {entry.reason}" for entry in self.entries if entry.reason]
        if self.seconds is not None:
            told = ", ".join(f"{name} {value:.3g}" for name, value in self.seconds._asdict().items())
            lines.append(f"predicted: {self.seconds.total:.3g} s ({told})")
        return "\n".join(lines)


def _short(number: float) -> str:
    """Three digits and a power of a thousand."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5 or unit == "P":
            return f"{number:.3g}{unit}"
        number /= 1000
    return ""


def make_plan(
    findings: Findings,
    parameters: Mapping[str, Tensor],
    form: str,
    classes: int,
    samples: tuple[int, int],
    symmetric: bool,
    memory: int,
    rates: Rates | None = None,
    streamed: bool = False,
) -> Plan:
    """The method of every parameter.

    Args:
        findings: Of the probe.
        parameters: By name.
        form: Of the outputs.
        classes: Outputs.
        samples: Of both sides.
        symmetric: Whether these are the same.
        memory: Bytes for a group; a layer whose factors do not fit is materialised, in pieces.
        rates: Of the machine; see `costs.contracts`.
        streamed: Whether layers may be streamed.

    Returns:
        The plan.
    """
    entries = []
    everyone = samples[0] if symmetric else sum(samples)
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        factors = findings.factors.get(name)
        if name in findings.unused:
            entries.append(Entry(name, shape, "none", "zero"))
        elif name in findings.looped:
            entries.append(
                Entry(name, shape, "one backward pass for each sample", "loop", reason=findings.looped[name])
            )
        else:
            rule = " + ".join(findings.rules.get(name, ["none on the probe"]))
            entry = Entry(name, shape, rule, "materialise", factors)
            fits = entry.factor_bytes(everyone, classes, parameter.element_size()) <= memory
            if (
                factors is not None
                and fits
                and costs.contracts(factors, parameter.numel(), samples, form, classes, rates)
            ):
                entry.method = "contract"
            elif any(own in rule for own in OWN_KERNELS):
                entry.kernel = kernel_for(parameter.device.type, parameter.dtype)
            elif factors is not None and fits and streamed and costs.streams(
                factors, shape, everyone, classes, parameter.element_size(), memory
            ):  # fmt: skip
                entry.method = "stream"
            entries.append(entry)
    by_name = {entry.name: entry for entry in entries}
    for bias, weight in findings.biases.items():
        if by_name[bias].method == "materialise" and weight in by_name and by_name[weight].single:
            by_name[bias].method, by_name[bias].beside = "contract", weight
    return Plan(entries)
