"""The information ratio of the labels, watched while a network trains."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdfast import _checks
from sdfast.ntk.eigenspace import Eigenspace, eigenspace
from sdfast.ntk.information import information_ratio
from sdfast.ntk.repeated import RepeatedGram
from sdfast.ops.self_distillation import AdaptiveAlpha, ClipLabel
from sdfast.ops.self_distillation.reference import batch_accuracy
from sdfast.train.history import History

__all__ = ["InformationProbe", "ProbeRecord"]


class ProbeRecord(NamedTuple):
    """One look at the kernel.

    Attributes:
        call: Which call of the probe it was, from 1.
        given: Information ratio of the labels as given.
        refined: Of α y + (1 − α) h(f), what self-distillation trains on.
        gain: refined − given.
        clean: Of the true labels; ``None`` where they are not known.
        gap: Between the k-th eigenvalue and the next; below 0.01 the ratios are unstable.
    """

    call: int
    given: float
    refined: float
    gain: float
    clean: float | None
    gap: float


@contextmanager
def mode_of_look(model: nn.Module, batch_norm: str) -> Iterator[None]:
    """The model in evaluation mode, its batch norms in the mode named; afterwards each module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for module in model.modules():
            if batch_norm == "train" and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        yield
    finally:
        for module, training in modes:
            module.training = training


class InformationProbe:
    """Every so many calls: the network's tangent kernel on a fixed batch, and what the labels hold in its top k.

    A callback of `SelfDistiller.fit`, called after each epoch; in a loop of your own call ``probe(model)`` after
    each step. Dong et al. 2019, figure 5. The model is looked at in evaluation mode, and left as it is. How it uses its
    parameters is found out at the first look, at every tenth, and after a change of its modules or parameters; memory
    for its gradients, at most 256 MiB, is held from look to look.

    Args:
        inputs: The batch (n, ...), always the same.
        labels: As given: class indices (n,), or targets (n,) or (n, C) in floats.
        every: Calls from one look to the next; the first call is one.
        k: Pairs of the eigenspace.
        alpha: Weight of the given labels in the refined ones: a number, or `sdfast.AdaptiveAlpha`, whose accuracy is
            that of the probe's own batch.
        label_fn: h, of a model that learns float targets: ``"identity"`` or `sdfast.ClipLabel`. Of class indices it is
            ``"hardmax"``. ``None``: identity and hardmax.
        clean_labels: The true labels, of the same form.
        outputs: Of `sdfast.ntk.gram`; ``None`` takes ``"trace"``, which of a model with one output is its own kernel.
        center: Take the mean of each column off first; see `sdfast.ntk.information_ratio`.
        batch_norm: ``"eval"``, with running statistics; or ``"train"``: the batch's own, at the price of n backward
            passes a look.

    Raises:
        TypeError: The inputs or labels are no tensors.
        ValueError: An option is impossible, or the labels do not fit the inputs.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        *,
        every: int = 1,
        k: int = 5,
        alpha: float | AdaptiveAlpha = 0.5,
        label_fn: str | ClipLabel | None = None,
        clean_labels: Tensor | None = None,
        outputs: Any = None,
        center: bool = False,
        batch_norm: str = "eval",
    ) -> None:
        _checks.check_tensor("inputs", inputs)
        for name, value in (("labels", labels), ("clean_labels", clean_labels)):
            if value is None:
                continue
            _checks.check_tensor(name, value)
            if value.dim() not in (1, 2) or len(value) != len(inputs):
                shape = _checks.shape_text(value)
                raise ValueError(f"{name}: got shape {shape}, wanted a row for each of the {len(inputs)} inputs")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: got {every!r}, wanted an integer of at least 1")
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(inputs):
            raise ValueError(f"k: got {k!r}, wanted 1 to {len(inputs)}, the probe's samples")
        if isinstance(alpha, AdaptiveAlpha):
            if alpha.sync:
                raise ValueError("alpha: sync=True goes over processes, but a probe has one batch of its own")
        elif not _checks.is_number(alpha) or not 0 <= alpha <= 1:
            raise ValueError(f"alpha: got {alpha!r}, wanted a number within [0, 1] or an AdaptiveAlpha")
        default = "identity" if labels.is_floating_point() else "hardmax"
        label_fn = default if label_fn is None else label_fn
        if label_fn != default and not (isinstance(label_fn, ClipLabel) and labels.is_floating_point()):
            wanted = "'identity' or a ClipLabel" if labels.is_floating_point() else "'hardmax'"
            raise ValueError(f"label_fn: got {label_fn!r}, wanted {wanted} with labels of {_checks.dtype_name(labels)}")
        _checks.check_option("batch_norm", batch_norm, ("eval", "train"))
        self.inputs, self.labels, self.clean_labels = inputs, labels, clean_labels
        self.every, self.k, self.outputs, self.center = every, k, outputs, center
        self.alpha: float | AdaptiveAlpha = alpha if isinstance(alpha, AdaptiveAlpha) else float(alpha)
        self.label_fn, self.batch_norm = label_fn, batch_norm
        self._kernel = RepeatedGram("trace" if outputs is None else outputs)
        self.calls = 0
        self.records: list[ProbeRecord] = []
        self.space: Any = None  # the Eigenspace of the latest look, and
        self.refined: Any = None  # the refined labels then

    def __call__(self, trained: Any, history: History | None = None) -> None:
        """Looks, where it is time to.

        Args:
            trained: The model, or a `SelfDistiller`.
            history: Of the training: its last epoch gets the ratio and the gain.
        """
        self.calls += 1
        if (self.calls - 1) % self.every == 0:
            record = self.look(trained if isinstance(trained, nn.Module) else trained.model)
            if history:
                seen = history.last._replace(information_ratio=record.given, information_gain=record.gain)
                history.records[-1] = seen

    def look(self, model: nn.Module) -> ProbeRecord:
        """Looks now.

        Args:
            model: As it is at this moment.

        Returns:
            The record, which `records` holds too.

        Raises:
            ValueError: Its outputs do not go with the labels.
        """
        with mode_of_look(model, self.batch_norm):
            kernel, outputs = self._kernel(model, self.inputs)
        outputs = outputs.reshape(len(self.inputs), -1)
        space = eigenspace(kernel, self.k, start=self.space)
        self.space = space
        record = self._record(space, outputs.double())
        self.records.append(record)
        return record

    def _record(self, space: Eigenspace, outputs: Tensor) -> ProbeRecord:
        given, alpha = self._targets(self.labels, outputs), self.alpha
        if isinstance(alpha, AdaptiveAlpha):
            right, kept = batch_accuracy(outputs, given, ignore_index=-100)
            alpha = 1 - min(1.0, alpha.ratio * int(right) / int(kept))
        refined = self.refined = alpha * given + (1 - alpha) * self._beliefs(outputs)
        clean = None if self.clean_labels is None else self._ratio(space, self._targets(self.clean_labels, outputs))
        before, after = self._ratio(space, given), self._ratio(space, refined)
        return ProbeRecord(self.calls, before, after, after - before, clean, space.gap)

    def _beliefs(self, outputs: Tensor) -> Tensor:
        if isinstance(self.label_fn, ClipLabel):
            return (4 * outputs / (1 - 2 * self.label_fn.rho)).clamp(-1, 1)
        if self.label_fn == "hardmax":
            return F.one_hot(outputs.argmax(1), outputs.shape[1]).double()
        return outputs

    def _targets(self, labels: Tensor, outputs: Tensor) -> Tensor:
        classes = outputs.shape[1]
        if not labels.is_floating_point():
            if classes == 1 or not bool(((labels >= 0) & (labels < classes)).all()):
                raise ValueError(
                    f"labels: got class indices, wanted 0 <= label < {classes}, the outputs of the model, or floats"
                )
            return F.one_hot(labels.to(outputs.device, torch.int64), classes).double()
        targets = labels.to(outputs.device, torch.float64).reshape(len(labels), -1)
        if targets.shape != outputs.shape:
            raise ValueError(
                f"labels: got shape {_checks.shape_text(labels)}, wanted {_checks.shape_text(outputs)} as the outputs"
            )
        return targets

    def _ratio(self, space: Eigenspace, targets: Tensor) -> float:
        quiet = replace(space, gap=math.inf, angle=0.0)  # the gap is recorded, not warned of at every look
        return information_ratio(quiet, targets, center=self.center, joint=True).item()

    def plot(self, path: Any) -> None:
        """Draws the ratios and the gain over the looks as a PNG; needs matplotlib.

        Args:
            path: Of the PNG.

        Raises:
            ValueError: There is no record yet.
        """
        from sdfast import plots

        if not self.records:
            raise ValueError("probe: has not looked yet, so there is nothing to plot")
        plots.save(plots.information_curves(self.records), path)
