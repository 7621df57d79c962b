"""`PredictionBank`, the running mean of past predictions, and the losses on it."""

from sdfast.ops.prediction_bank.bank import BankRows, PredictionBank
from sdfast.ops.prediction_bank.elr import elr_loss
from sdfast.ops.prediction_bank.inspection import SuspectedLabels

__all__ = ["BankRows", "PredictionBank", "SuspectedLabels", "elr_loss"]
