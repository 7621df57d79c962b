"""What a call of `gram`, `plan` or `operator` asks for, checked, and where the gradients of its two sides come from."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdfast import _checks
from sdfast.ntk import inputs as feeding
from sdfast.ntk.inputs import Inputs
from sdfast.ntk.outputs import Outputs
from sdfast.ntk.products import PRECISIONS
from sdfast.ntk.sample_gradients import check_batch_size
from sdfast.ntk.source import Source, select_parameters

MEMORY = 2**31  # bytes: fixed, so that the groups, and with them the last bits, do not depend on what else runs


class Request(NamedTuple):
    """The arguments of a call, but for the samples.

    Attributes:
        model: The model.
        outputs: Which outputs.
        parameters: Those to differentiate, by name.
        precision: Of the products.
        batch_size: Samples of a micro-batch, or ``None``.
        memory: Bytes that the gradients held at a time may take.
    """

    model: nn.Module
    outputs: Outputs
    parameters: Mapping[str, Tensor]
    precision: str
    batch_size: int | None
    memory: int

    @property
    def first(self) -> Tensor:
        """A parameter, whose dtype and device are those of all."""
        return next(iter(self.parameters.values()))

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.first.device

    def sides(self, x1: Any, x2: Any) -> tuple[Inputs, Inputs | None]:
        """The samples of the rows and of the columns; ``None`` for those of the rows.

        Args:
            x1: As `gram` takes it.
            x2: As `gram` takes it.

        Returns:
            Both.
        """
        return feeding.read(x1, self.first, "x1"), None if x2 is None else feeding.read(x2, self.first, "x2")

    def sources(self, rows: Inputs, columns: Inputs | None = None, *, afresh: bool) -> tuple[Source, Source]:
        """Of both sides; one and the same without `columns`. To be called inside `unchanged`.

        Args:
            rows: Samples.
            columns: Samples, or ``None``.
            afresh: Probe the model, whatever is known of it.

        Returns:
            Both.
        """
        model, outputs, parameters, _, batch_size, memory = self
        left = Source(model, rows, outputs, parameters, batch_size, afresh=afresh, memory=memory)
        if columns is None:
            return left, left
        return left, Source(model, columns, outputs, parameters, batch_size, left.findings, memory=memory)


def request_of(
    model: nn.Module,
    outputs: str | int | Callable[[Any], Tensor] | None,
    params: Iterable[str] | Callable[[str], bool] | None,
    precision: str | None,
    batch_size: int | None,
    memory: int | None,
) -> Request:
    """The arguments as the user gave them, checked, with what ``None`` stands for.

    Args:
        model: As `gram` takes it.
        outputs: As `gram` takes it.
        params: As `gram` takes it.
        precision: As `gram` takes it.
        batch_size: As `gram` takes it.
        memory: As `gram` takes it.

    Returns:
        The request.

    Raises:
        TypeError: An argument has the wrong type, or parameters are in half precision.
        ValueError: An argument is out of its range.
    """
    asked = Outputs(outputs)
    parameters = select_parameters(model, params)
    precision = check_precision(precision, next(iter(parameters.values())))
    check_batch_size(batch_size)
    return Request(model, asked, parameters, precision, batch_size, check_memory(memory))


def check_precision(precision: str | None, parameter: Tensor) -> str:
    """The precision; the parameters' dtype where ``None``."""
    if precision is None:
        return _checks.dtype_name(parameter)
    _checks.check_option("precision", precision, PRECISIONS)
    return precision


def check_memory(memory: object) -> int:
    """The bytes that gradients may take at a time; the default where ``None``."""
    if memory is None:
        return MEMORY
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise TypeError(f"memory: got {type(memory).__name__}, wanted a number of bytes or None")
    if memory < 1:
        raise ValueError(f"memory: got {memory}, wanted at least 1 byte")
    return memory
