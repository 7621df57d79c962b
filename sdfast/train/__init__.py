"""Training on one's own predictions: a thin loop, its record, and checkpoints that resume bit for bit."""

from sdfast.train.history import EpochRecord, History
from sdfast.train.information_probe import InformationProbe, ProbeRecord
from sdfast.train.self_distiller import SelfDistiller

__all__ = ["EpochRecord", "History", "InformationProbe", "ProbeRecord", "SelfDistiller"]
