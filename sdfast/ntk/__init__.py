"""The empirical neural tangent kernel of a PyTorch model, exact: H_ij = ⟨∂f(x_i)/∂θ, ∂f(x_j)/∂θ⟩.

How the parts meet, from the model to the matrix; each layer knows only the one above it:

- `inputs.Inputs`: the samples, in micro-batches. `outputs.Outputs`: which scalars of the model, as columns.
- `capture.Capture`: a forward pass with taps; `gradients` gives one backward pass's gradients per sample, by
  parameter, and the factors A, B of parameters that are to be contracted. `layers`: one rule per family of operations.
- `probe.probe` → `Findings`: where the samples lie in every tapped tensor, which parameters must be looped, which can
  be contracted (`factors`: T, d, p), as `guard.Guard` sees it hold. `verified.findings_of`: the same, or what was
  found of this model before, which `confirmation.Confirmation` confirms. `memory_format`: whether convolutions run with
  the channels last. `batch_norm`: its backward as one product.
- `source.Source(model, inputs, outputs, parameters, batch_size)`: **where gradients come from.**
  ``source.chunks(wanted, factored)`` makes one pass over the samples and yields `Chunk(start, stop, output, rows,
  factors)`: ``rows[name]`` (samples of the chunk, numel) and ``factors[name]`` = A (samples, T, d) or tokens
  (samples, T), B (samples, T, p), for one output at a time. Of any subset of
  parameters: no other is differentiated.
- `plan.make_plan` → `Plan`: materialise, contract, loop or zero, for each parameter. `costs` counts, `calibration`
  times, `request.request_of` and `planner.plan_of` are where `gram` and the public `plan` read and choose alike.
- `blocks.groups_of(plan, samples, classes, itemsize, memory)` → each a `Group` of `Piece(parameter, start, stop)`
  columns and contracted parameters that fit in memory; ``blocks.collect(source, group)`` makes the pass and gives a
  `Block`:
  ``rows`` (outputs, n, width) and ``factors[name]`` = A (n, T, d), B (outputs, n, T, p).
- ``block.tile(other, rows, columns, form, precision)``: what the group adds to one tile of H, in float64 (`products`).
- `result.Result`: H itself, its tiles and their mirror image. `gram.gram` is the loop over groups and tiles.
  `distributed.Shards`: which groups are this process's, and the sum over processes.

And from the matrix on: `operator` multiplies by it without forming it, from the same blocks; `eigenspace` finds its top
pairs (`operands`: what it multiplies by; `krylov`; `symmetric_product`: one triangle, read once); `information` is what
labels hold in them.
"""

from sdfast.ntk.eigenspace import Eigenspace, eigenspace
from sdfast.ntk.gram import gram
from sdfast.ntk.information import (
    AlphaWindow,
    NoiseSweep,
    alpha_window,
    error_components,
    information_gain,
    information_ratio,
    noise_sweep,
    predicted_decay,
)
from sdfast.ntk.operator import JacobianOperator, NTKOperator, operator
from sdfast.ntk.plan import Plan
from sdfast.ntk.planner import plan
from sdfast.ntk.sample_gradients import sample_gradients

__all__ = [
    "AlphaWindow",
    "Eigenspace",
    "JacobianOperator",
    "NTKOperator",
    "NoiseSweep",
    "Plan",
    "alpha_window",
    "eigenspace",
    "error_components",
    "gram",
    "information_gain",
    "information_ratio",
    "noise_sweep",
    "operator",
    "plan",
    "predicted_decay",
    "sample_gradients",
]
