"""Algorithm 1 of Dong et al. 2019: learn from the given labels mixed with one's own current predictions."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from sdfast import _checks, _devices, _dispatch
from sdfast.baselines.method import Method
from sdfast.data.batches import Batches
from sdfast.nn import SelfDistillationLoss
from sdfast.ops.self_distillation import (
    AdaptiveAlpha,
    ClipLabel,
    GeneralizedCrossEntropy,
    LossStats,
    SmallLoss,
    self_distillation_loss,
)  # fmt: skip
from sdfast.ops.self_distillation.description import AS_STATE
from sdfast.ops.self_distillation.reference import batch_accuracy
from sdfast.train import processes
from sdfast.train.checkpoint import Checkpoint
from sdfast.train.history import EpochRecord, History
from sdfast.train.parts import AMP_DTYPES, amp_name, check_batches, check_method, check_parts
from sdfast.train.settings import number_of_batches, training_settings
from sdfast.train.sums import EpochSums, epoch_record

__all__ = ["SelfDistiller"]


class SelfDistiller:
    """Trains a classifier on its labels mixed with its own predictions.

    Each step is ``loss = self_distillation_loss(model(inputs), labels, alpha, …)``, backward, optimizer step: the loop
    one would write by hand, with bitwise the same result. The host reads the device once an epoch (and, with float16,
    once a step inside torch's GradScaler).

    Args:
        model: Maps inputs to logits (..., C). Moved to `device`.
        optimizer: Over parameters of `model`.
        alpha: Weight of the given label: a number, `sdfast.AdaptiveAlpha`, or a function of (epoch, step) that returns
            a number or a 0-d tensor; both count from 0, steps over the whole training.
        method: Instead of `alpha` and the loss's options, a method of `sdfast.baselines`; its state is in the
            checkpoints. One that keeps something of each sample wants batches with indices.
        label_fn: As in `sdfast.self_distillation_loss`, and so are all up to `backend`.
        temperature: Of the softmax.
        mixing: ``"arithmetic"`` or ``"geometric"``.
        target_temperature: Sharpens the mixed target.
        loss: ``"cross_entropy"``, ``"kl"``, ``"mse"`` or ``"brier"``.
        ignore_index: Rows with this index label count for nothing.
        label_smoothing: Of the given label, before mixing.
        class_weight: (C,).
        row_weight: A rule: ``"gce"``, `sdfast.GeneralizedCrossEntropy` or `sdfast.SmallLoss`.
        backend: Of the loss.
        scheduler: A torch scheduler of the learning rate.
        scheduler_step: After which the scheduler steps: ``"epoch"`` or ``"step"``.
        device: Where to train; ``None`` is where the model is.
        amp: ``"bfloat16"`` or ``"float16"`` (with a GradScaler; on GPUs only) for automatic mixed precision, or that
            torch.dtype.
        compile: Train and evaluate through ``torch.compile(model)``.

    Raises:
        TypeError: `model`, `optimizer` or `scheduler` is something else.
        ValueError: An option is impossible or does not go with the others; the message names it.
        NotImplementedError: The device or the scheduler cannot do what is asked.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        alpha: float | AdaptiveAlpha | Callable[[int, int], float | Tensor] | None = None,
        method: Method | None = None,
        label_fn: str | ClipLabel = "hardmax",
        temperature: float = 1.0,
        mixing: str = "arithmetic",
        target_temperature: float = 1.0,
        loss: str = "cross_entropy",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        row_weight: str | GeneralizedCrossEntropy | SmallLoss | None = None,
        backend: str | None = None,
        scheduler: LRScheduler | None = None,
        scheduler_step: str = "epoch",
        device: torch.device | str | None = None,
        amp: str | torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        check_parts(model, optimizer, scheduler)
        options: dict[str, Any] = {
            "label_fn": label_fn,
            "temperature": temperature,
            "mixing": mixing,
            "target_temperature": target_temperature,
            "loss": loss,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "class_weight": class_weight,
            "row_weight": row_weight,
            "backend": backend,
        }
        defaults = SelfDistiller.__init__.__kwdefaults__ or {}
        check_method(
            method, alpha, {k: v for k, v in options.items() if v is not defaults[k] and str(v) != str(defaults[k])}
        )
        if compile and method is not None and method.looks_into_model:
            raise NotImplementedError(
                f"compile: the method {method.name} looks into the model as it runs; compile=False"
            )
        _checks.check_option("scheduler_step", scheduler_step, ("epoch", "step"))
        self.device = next(model.parameters()).device if device is None else _devices.usable(device)
        self.amp = amp_name(amp, self.device)
        self.loss = SelfDistillationLoss(
            1.0 if alpha is None or callable(alpha) else alpha, return_stats=True, **options
        ).to(self.device)
        self._loss_options = {**options, "class_weight": self.loss.class_weight}  # as `self.loss` would gather them
        if backend is not None:
            _dispatch.choose(backend, self.device.type)  # refuses one that cannot serve the device, before any work
        self.alpha = alpha
        self.method = None if method is None else method.to(self.device)
        self.model = model.to(self.device)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scheduler_step = scheduler_step
        self.compile = compile
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "float16")
        if self.method is not None:
            self.method.watch(self.model)
        self._forward = torch.compile(self.model) if compile else self.model
        # DistributedDataParallel sends buffers around in every pass: one process that evaluates would wait for others.
        alone = isinstance(self.model, nn.parallel.DistributedDataParallel)
        self._evaluated: Any = self.model.module if alone else self._forward
        # As they are now: a checkpoint compares them with those of the run it continues.
        self.settings = training_settings(self)

    def fit(
        self,
        train: Iterable,
        epochs: int,
        eval: Iterable | None = None,
        callbacks: Sequence[Callable[["SelfDistiller", History], object]] = (),
        checkpoint: str | os.PathLike | None = None,
        progress: bool = True,
        *,
        clean_labels: Tensor | None = None,
        allow_nan: bool = False,
    ) -> History:
        """Trains for a number of epochs.

        A model in evaluation mode trains in training mode; one in training mode trains as it is, with what is frozen in
        evaluation mode (a BatchNorm) left so. Afterwards each module is in the mode it was in.

        Args:
            train: Any iterable of (inputs, labels) or (inputs, labels, indices) that can be passed over once an epoch:
                `sdfast.data.Batches`, a torch DataLoader, a list. Its ``set_epoch``, or its sampler's, is called.
            epochs: How many, those of the checkpoint included.
            eval: Batches on which the accuracy is measured after each epoch.
            callbacks: Each is called as ``callback(distiller, history)`` after an epoch, before its checkpoint; one
                that returns ``True`` ends the training, in all processes.
            checkpoint: A file written before the first epoch and after each. Where it exists the training continues
                from it, and ends with bitwise the weights of an uninterrupted run on the same machine and thread count,
                if the batches of an epoch depend on torch's, NumPy's and Python's random states and the epoch alone.
                Other settings are refused; docs/training.md says what is compared, and what is not.
            progress: Show a progress bar on a terminal.
            clean_labels: (N, ...) true labels of all training rows, to measure against; the batches must carry indices.
            allow_nan: Go on when the training loss is not finite.

        Returns:
            The history, that of the checkpoint included.

        Raises:
            TypeError: A batch is no (inputs, labels[, indices]) of tensors.
            ValueError: An argument is impossible, or the checkpoint belongs to other settings; the message says which.
            NotImplementedError: The checkpoint could not hold all of this training's state.
            FloatingPointError: An epoch's training loss is not finite. The checkpoint is that of the epoch before; the
                exception's ``history`` holds the epoch too.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"epochs: got {epochs!r}, wanted an integer >= 1")
        for name, batches in (("train", train), ("eval", eval)):
            check_batches(name, batches)
        if clean_labels is not None:
            _checks.check_tensor("clean_labels", clean_labels)
            _check_clean_rows(clean_labels, train)
            clean_labels = clean_labels.to(self.device)
        history, stopped, step = History(), False, 0
        saved = None
        if checkpoint is not None:
            saved = Checkpoint(checkpoint, self, train, epochs, {"eval": eval is not None})
            history, stopped, step = saved.start()
        modes = _modes(self.model)
        if not self.model.training:
            self.model.train()
        training_modes = _modes(self.model)  # what its owner froze stays frozen
        steps = number_of_batches(train)
        total = None if steps is None else steps * epochs
        with tqdm(total=total, initial=step, unit="step", disable=None if progress else True) as bar:
            try:
                for epoch in range(len(history), 0 if stopped else epochs):
                    began = time.perf_counter()
                    _set_modes(training_modes)
                    if self.method is not None:
                        self.method.set_epoch(epoch, epochs)
                    rate = float(self.optimizer.param_groups[0]["lr"])
                    sums, step = self._train_epoch(train, epoch, step, clean_labels, bar)
                    accuracy = None if eval is None else self.evaluate(eval)
                    history.append(epoch_record(epoch, sums, clean_labels is not None, accuracy, rate, began))
                    bar.set_postfix_str(_postfix(history.last, epochs), refresh=False)
                    if not sums[0] and not allow_nan:
                        raise ValueError(f"train: no row of epoch {epoch + 1} counts: its labels are all ignore_index")
                    if not math.isfinite(history.last.loss) and not allow_nan:
                        raise _not_finite(history)
                    votes = [callback(self, history) is True for callback in callbacks]
                    stopped = any(self._of_all(any(votes)))
                    if saved is not None:
                        saved.save(history, stopped, step)
                    if stopped:
                        break
            finally:
                _set_modes(modes)
        return history

    def evaluate(self, batches: Iterable) -> float:
        """The model's accuracy, in evaluation mode.

        Args:
            batches: An iterable of (inputs, labels) or (inputs, labels, indices).

        Returns:
            The share of rows whose largest logit is their label's, rows with the ignored label left out.

        Raises:
            ValueError: There is no row to count.
        """
        modes = _modes(self.model)
        self.model.eval()
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)  # correct, kept
        try:
            with torch.no_grad():
                for inputs, labels, _ in self._on_device(batches, "eval"):
                    with self._autocast():
                        logits = self._evaluated(inputs)
                    counts += torch.stack(self._correct(logits, labels))
        finally:
            _set_modes(modes)
        correct, kept = counts.tolist()
        if not kept:
            raise ValueError("eval: gave no row that counts, so there is no accuracy")
        return correct / kept

    def _train_epoch(
        self, train: Iterable, epoch: int, step: int, clean_labels: Tensor | None, bar: tqdm
    ) -> tuple[list[float], int]:
        """One pass over `train`: what `EpochSums` adds up, and the step reached."""
        ordered = train if hasattr(train, "set_epoch") else getattr(train, "sampler", None)
        set_epoch = getattr(ordered, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        sums, first = EpochSums(self.device), step
        for inputs, labels, indices in self._on_device(train, "train"):
            self.optimizer.zero_grad()
            with self._autocast():
                logits = self._forward(inputs)
                loss, stats = self._loss(logits, labels, indices, epoch, step)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scheduler is not None and self.scheduler_step == "step":
                self.scheduler.step()
            clean = None
            if clean_labels is not None:
                with torch.no_grad():
                    predictions = logits if self.method is None else self.method.predictions(logits)
                    clean = self._correct(predictions, _clean_rows(clean_labels, indices))
            sums.add(self._kept(labels, logits), loss, stats, clean)
            step += 1
            bar.update()
        if step == first:
            raise ValueError("train: gave no batch in an epoch; an iterable that can be used only once is used up")
        if self.scheduler is not None and self.scheduler_step == "epoch":
            self.scheduler.step()
        return sums.total(), step

    def _loss(
        self, logits: Tensor, labels: Tensor, indices: Tensor | None, epoch: int, step: int
    ) -> tuple[Tensor, LossStats | Tensor]:
        """The loss and its statistics, or the state that holds them."""
        if self.method is not None:
            return self.method(logits, labels, indices, return_stats=True)
        alpha = self.alpha(epoch, step) if callable(self.alpha) else self.alpha
        if alpha is None:
            raise TypeError(f"alpha: the function gave None for epoch {epoch}, step {step}, wanted a number")
        return self_distillation_loss(  # type: ignore[return-value]
            logits, labels, alpha, return_stats=AS_STATE, **self._loss_options
        )

    def _of_all(self, vote: bool) -> list[bool]:
        """That of every process which trains this model: one that went on alone would wait for ever."""
        shared = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return processes.together(lambda: vote) if shared else [vote]

    def _on_device(self, batches: Iterable, name: str) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for batch in batches:
            if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
                got = f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, Sized) else ''}"
                raise TypeError(
                    f"{name}: got a batch that is a {got}, wanted (inputs, labels) or (inputs, labels, indices)"
                )
            for part, value in zip(("inputs", "labels", "indices"), batch, strict=False):
                if not isinstance(value, Tensor) or value.layout is not torch.strided:
                    _checks.check_tensor(f"{name}: {part} of a batch", value)
            inputs, labels, *rest = (
                part if part.device == self.device else part.to(self.device, non_blocking=True) for part in batch
            )
            yield inputs, labels, rest[0] if rest else None

    def _autocast(self) -> AbstractContextManager:
        if self.amp is None and not torch.is_autocast_enabled(self.device.type):
            return nullcontext()  # which costs nothing
        return torch.autocast(self.device.type, AMP_DTYPES.get(self.amp or ""), enabled=self.amp is not None)

    def _correct(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = _checks.check_labels(logits, labels, self.loss.loss == "mse")
        return batch_accuracy(logits.reshape(-1, logits.shape[-1]), rows, self.loss.ignore_index)

    def _kept(self, labels: Tensor, logits: Tensor) -> Tensor | int:
        if labels.is_floating_point():
            return logits.numel() // logits.shape[-1]
        return labels.to(torch.int64) != self._loss_options["ignore_index"]  # uint8 would wrap -100 to a class


def _modes(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(module, module.training) for module in model.modules()]


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _clean_rows(clean_labels: Tensor, indices: Tensor | None) -> Tensor:
    if indices is None:
        raise ValueError(
            "clean_labels: the batches of train carry no indices to look them up by; use Batches(…, with_indices=True) "
            "or a data set of (inputs, label, index)"
        )
    try:
        return clean_labels[indices]
    except IndexError:  # on the CPU; a GPU would have to be asked in every step
        first, last = int(indices.min()), int(indices.max())
        raise ValueError(
            f"clean_labels: has {len(clean_labels)} rows, but a batch carries indices {first} to {last}"
        ) from None


def _check_clean_rows(clean_labels: Tensor, train: Iterable) -> None:
    """Refuses too few rows where the data say how many there are; indices of a subset may reach further."""
    data = train.inputs if isinstance(train, Batches) else getattr(train, "dataset", None)
    try:
        rows = len(data) if isinstance(data, Sized) else 0
    except TypeError:  # a stream
        rows = 0
    if clean_labels.dim() == 0 or len(clean_labels) < rows:
        shape = _checks.shape_text(clean_labels)
        raise ValueError(f"clean_labels: got shape {shape}, wanted a row for each of the {rows} of train")


def _postfix(record: EpochRecord, epochs: int) -> str:
    text = f"epoch {record.epoch}/{epochs}, loss {record.loss:.4f}, accuracy {100 * record.accuracy:.1f} %"
    return text if record.eval_accuracy is None else f"{text}, eval {100 * record.eval_accuracy:.1f} %"


def _not_finite(history: History) -> FloatingPointError:
    error = FloatingPointError(
        f"train: the loss of epoch {history.last.epoch} is {history.last.loss}; look for NaN in the inputs or lower "
        f"the learning rate ({history.last.learning_rate:g}), or go on with fit(…, allow_nan=True)"
    )
    error.history = history  # type: ignore[attr-defined]
    return error
