"""What the methods with a prediction bank share."""

from typing import Any

from torch import Tensor

from sdfast.baselines.method import Method
from sdfast.ops.prediction_bank import BankRows, PredictionBank


class BankMethod(Method):
    """A method that keeps a running mean of every training sample's predictions.

    Attributes:
        bank: Where they are kept: ``method.bank.suspected_labels(labels, k)`` lists what it holds for wrong.
    """

    needs_indices = True

    def __init__(self, name: str, bank: PredictionBank, **options: Any) -> None:
        super().__init__(name, **options)
        self.bank = bank

    def rows(self, indices: Tensor | None) -> BankRows:
        """The bank's rows of a batch; `forward` has refused a batch without indices."""
        return self.bank.rows(indices)  # type: ignore[arg-type]
