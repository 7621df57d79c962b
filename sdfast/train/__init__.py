"""Training on one's own predictions: thin loops, their records, and checkpoints that resume bit for bit."""

from sdfast.train.history import EpochRecord, History
from sdfast.train.information_probe import InformationProbe, ProbeRecord
from sdfast.train.recipe import Recipe
from sdfast.train.rounds import DistilledRounds, distill_rounds
from sdfast.train.self_distiller import SelfDistiller
from sdfast.train.teacher import TeacherSweep, teacher_sweep

__all__ = [
    "DistilledRounds",
    "EpochRecord",
    "History",
    "InformationProbe",
    "ProbeRecord",
    "Recipe",
    "SelfDistiller",
    "TeacherSweep",
    "distill_rounds",
    "teacher_sweep",
]
