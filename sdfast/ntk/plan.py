"""Which rule and which method serves each parameter of a Gram matrix, and what decides it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sdfast import report
from sdfast.ntk.layers.kernels import TORCH, kernel_for
from sdfast.ntk.probe import Findings

# Rules, by a part of their names, that form gradients with the package's kernels where these serve.
OWN_KERNELS = ("convolution", "norm")


@dataclass
class Entry:
    """One parameter.

    Attributes:
        name: Of the parameter.
        shape: Of it.
        rule: What gives its gradients per sample.
        method: ``"materialise"`` (gradients of all samples, then their products), ``"contract"`` (AAᵀ∘BBᵀ, the
            gradients never formed), ``"loop"`` (one backward pass for each sample), or ``"zero"`` (no output depends
            on it).
        factors: (T, d, p) of a layer that can be contracted: positions, inputs (0: tokens), outputs.
        reason: Why it is looped.
        kernel: Whose kernels form its gradients: ``"cpu"`` or ``"triton"`` of this package, or ``"torch"``.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    method: str
    factors: tuple[int, int, int] | None = None
    reason: str = ""
    kernel: str = TORCH

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def factor_bytes(self, samples: int, classes: int, itemsize: int) -> int:
        """Bytes of A and B of so many samples."""
        positions, inputs, width = self.factors or (0, 0, 0)
        return samples * positions * (max(inputs, 1) + classes * width) * itemsize


@dataclass
class Plan:
    """The entries of all parameters; `print` shows them as a table."""

    entries: list[Entry]

    def __str__(self) -> str:
        rows = [(entry.name, entry.shape, entry.rule, entry.method, entry.kernel) for entry in self.entries]
        return report.plain_table(("parameter", "shape", "rule", "method", "kernel"), rows)


def contracts(factors: tuple[int, int, int], numel: int, samples: tuple[int, int], form: str, classes: int) -> bool:
    """Whether (AAᵀ)∘(BBᵀ) takes fewer operations than gradients and their products.

    For one output and the lower triangle of n samples: T²(d + p + 1) < dp(1 + 2T/n). With C outputs the product AAᵀ is
    shared: T²(d/C + p + 1) < dp(1 + 2T/n) for the trace and per class, T²(d/C² + p + 1) < dp(1 + 2T/nC) for all blocks.

    Args:
        factors: (T, d, p); d = 0 where A holds tokens, whose products are comparisons.
        numel: dp; of an embedding all rows, used or not.
        samples: n of both sides.
        form: See `products.tile_of_rows`.
        classes: C.

    Returns:
        Whether to contract.
    """
    positions, inputs, width = factors
    shared = classes**2 if form == "full" else classes
    per_sample = positions * (1 / samples[0] + 1 / samples[1]) / (classes if form == "full" else 1)
    return positions**2 * (inputs / shared + width + 1) < numel * (1 + per_sample)


def make_plan(
    findings: Findings,
    parameters: Mapping[str, Tensor],
    form: str,
    classes: int,
    samples: tuple[int, int],
    memory: int,
) -> Plan:
    """The method of every parameter.

    Args:
        findings: Of the probe.
        parameters: By name.
        form: Of the outputs.
        classes: Outputs.
        samples: Of both sides.
        memory: Bytes for a group; a layer whose factors do not fit is materialised, in pieces.

    Returns:
        The plan.
    """
    entries = []
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
            fits = entry.factor_bytes(sum(samples), classes, parameter.element_size()) <= memory
            if factors is not None and fits and contracts(factors, parameter.numel(), samples, form, classes):
                entry.method = "contract"
            elif any(own in rule for own in OWN_KERNELS):
                entry.kernel = kernel_for(parameter.device.type, parameter.dtype)
            entries.append(entry)
    return Plan(entries)
