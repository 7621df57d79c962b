"""The scalars of a model that are differentiated: which, and what becomes of their Gram matrices."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMES = ("sum", "trace", "mean", "per_class", "full")


class Outputs:
    """The outputs asked for, and the model output turned into a column for each scalar.

    Attributes:
        asked: ``None``, a name of `NAMES`, a class index, or a callable.
        form: ``"one"`` (n×n of a single scalar), ``"trace"``, ``"mean"``, ``"per_class"`` or ``"full"``; known after
            the first `columns`.
        classes: Number of columns; known after the first `columns`.
    """

    def __init__(self, asked: str | int | Callable[[Any], Tensor] | None) -> None:
        if isinstance(asked, bool) or not (asked is None or isinstance(asked, str | int) or callable(asked)):
            raise TypeError(f"outputs: got {type(asked).__name__}, wanted {_wanted()}")
        if isinstance(asked, str) and asked not in NAMES:
            raise ValueError(f"outputs: got {asked!r}, wanted {_wanted()}")
        self.asked = asked
        self.form = asked if asked in ("trace", "mean", "per_class", "full") else "one"
        self.classes = 0

    def columns(self, output: Any, samples: int) -> Tensor:
        """The scalars of each sample (samples, classes), differentiable.

        Raises:
            TypeError: The output, or what the callable gives, is no real floating tensor.
            ValueError: It has the wrong shape, or `outputs` is missing where it matters.
            IndexError: There is no output of that index.
        """
        if callable(self.asked):
            output = self.asked(output)
            _check_tensor("outputs: the callable gave", output)
            if output.shape != (samples,):
                raise ValueError(
                    f"outputs: the callable gave shape {tuple(output.shape)} for a batch of {samples} samples, wanted "
                    f"one scalar for each, ({samples},)"
                )
            columns = output[:, None]
        else:
            columns = self._of_tensor(output, samples)
        self.classes = columns.shape[1]
        return columns

    def _of_tensor(self, output: Any, samples: int) -> Tensor:
        _check_tensor("model: its output is", output, "; pass outputs=callable to turn it into one scalar per sample")
        if output.dim() == 0 or len(output) != samples or output.numel() == 0:
            raise ValueError(
                f"model: its output has shape {tuple(output.shape)} for a batch of {samples} samples, wanted "
                f"({samples}, ...)"
            )
        flat = output.reshape(samples, -1)
        classes = flat.shape[1]
        if self.asked is None and classes > 1:
            raise ValueError(
                f"outputs: the model has {classes} outputs; choose 'sum' (the gradient of their sum), 'trace' (the sum "
                "of the Gram matrices of each), 'mean' (trace / outputs), 'per_class' (outputs × n × n), 'full' "
                "(n × n × outputs × outputs), the index of one, or a callable"
            )
        if isinstance(self.asked, int):
            if not 0 <= self.asked < classes:
                raise IndexError(f"outputs: got {self.asked}, wanted an index in [0, {classes})")
            return flat[:, self.asked : self.asked + 1]
        if self.asked == "sum":
            return flat.sum(1, keepdim=True)
        return flat

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Of the result."""
        if self.form == "per_class":
            return (self.classes, rows, columns)
        if self.form == "full":
            return (rows, columns, self.classes, self.classes)
        return (rows, columns)

    def describe(self) -> str:
        """As a checkpoint remembers it."""
        if not callable(self.asked):
            return repr(self.asked)
        code = getattr(self.asked, "__code__", None)
        body = "" if code is None else f" {code.co_code.hex()} {code.co_consts!r}"
        return f"{getattr(self.asked, '__qualname__', type(self.asked).__qualname__)}{body}"


def _wanted() -> str:
    return f"one of {', '.join(map(repr, NAMES))}, the index of one output, or a callable"


def _check_tensor(start: str, value: Any, advice: str = "") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{start} {type(value).__name__}, wanted a tensor{advice}")
    if not value.is_floating_point():
        raise TypeError(f"{start} {str(value.dtype).removeprefix('torch.')}, wanted a real floating tensor{advice}")
    if not value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{start} a constant: it does not depend on any parameter that requires grad")
