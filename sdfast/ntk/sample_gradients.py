"""Exact per-sample gradients."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sdfast.ntk import inputs as feeding
from sdfast.ntk.outputs import Outputs
from sdfast.ntk.sample_rows import PathChangedError
from sdfast.ntk.source import Source, loop_everything, say, select_parameters
from sdfast.ntk.unchanged import unchanged
from sdfast.ntk.verified import retried


def sample_gradients(
    model: nn.Module,
    x: Any,
    *,
    outputs: str | int | Callable[[Any], Tensor] | None = None,
    params: Iterable[str] | Callable[[str], bool] | None = None,
    batch_size: int | None = None,
) -> dict[str, Tensor]:
    """∂f(x_i)/∂θ for every sample, exact: row i equals ``autograd.grad(f(x)[i], parameter)``.

    Args:
        model: Any module; it is left as it is.
        x: A tensor (n, ...), a tuple or dict of them (called as ``model(*x)``, ``model(**x)``), a dataset or a loader
            without shuffling (of an (input, label) pair the input alone).
        outputs: ``None`` for a model of one output; ``"sum"`` over all, the index of one, a callable from the model's
            output to one scalar per sample (n,), or ``"per_class"`` for all.
        params: Names, shell patterns of names, or a function of the name; ``None`` for all that require grad.
        batch_size: Samples of a micro-batch; by default 32 to 192, as many as have activations of 512 MiB, and up
            to 1024 where no layer has more than one position a sample. It does not change the result but by rounding.

    Returns:
        By parameter (n, *shape), with ``"per_class"`` (n, outputs, *shape), in the parameters' dtype.

    Raises:
        TypeError: An argument has the wrong type, or parameters are in half precision.
        ValueError: `outputs` is missing or impossible here, or the samples are coupled or drawn at random.
    """
    asked = Outputs(outputs)
    if asked.form in ("trace", "mean", "full"):
        raise ValueError(f"outputs: got {outputs!r}, which is a form of the Gram matrix; wanted 'per_class' here")
    parameters = select_parameters(model, params)
    check_batch_size(batch_size)
    first = next(iter(parameters.values()))
    with unchanged(model, first.device):
        inputs = feeding.read(x, first, "x")

        def compute(afresh: bool) -> dict[str, Tensor]:
            source = Source(model, inputs, asked, parameters, batch_size, afresh=afresh)
            try:
                gradients = _collected(source)
            except PathChangedError as error:
                loop_everything(source.findings, parameters, str(error))
                gradients = _collected(source)
            say(source.findings)
            return gradients

        gradients = retried(model, compute)
    if asked.form != "per_class":
        return {name: rows[:, 0] for name, rows in gradients.items()}
    return gradients


def _collected(source: Source) -> dict[str, Tensor]:
    gradients = {
        name: torch.empty(source.samples, source.classes, *value.shape, dtype=value.dtype, device=value.device)
        for name, value in source.parameters.items()
    }
    panels = {
        name: rows.view(source.samples, source.classes, -1).transpose(0, 1)
        for name, rows in gradients.items()
        if rows.numel()
    }
    for _ in source.chunks(source.parameters, panels=panels):
        pass  # each chunk is where it belongs
    return gradients


def check_batch_size(batch_size: object) -> None:
    """Refuses what is no positive integer.

    Raises:
        TypeError: It is no integer.
        ValueError: It is below 1.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int)):
        raise TypeError(f"batch_size: got {type(batch_size).__name__}, wanted a positive integer or None")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, wanted at least 1")
