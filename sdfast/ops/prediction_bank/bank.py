"""`PredictionBank`: a running mean of every sample's past predictions, read and written by the losses themselves."""

from typing import Any

import torch
from torch import Tensor, nn

from sdfast import _checks, _devices, _dispatch
from sdfast.ops.prediction_bank import gathering, inspection
from sdfast.ops.prediction_bank.description import ORDERS, BankDescription
from sdfast.ops.prediction_bank.inspection import SuspectedLabels
from sdfast.ops.prediction_bank.storage import Storage, read_rows, sparse_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SETTINGS = ("num_samples", "num_classes", "momentum", "order", "bias_correction", "warm_up", "top_k")


class PredictionBank(nn.Module):
    """One row of class probabilities a training sample: the running mean of what the model said of it.

    After a sample's n-th prediction p its row t is::

        t ← t + w (p − t),    w = (1 − momentum) / (1 − momentumⁿ)

    the exponential moving average with its bias corrected, so that t is a distribution from the first prediction on.
    The losses that take ``bank.rows(indices)`` read the rows and write the batch's predictions in the same kernel:
    `sdfast.self_distillation_loss` as ``source``, `sdfast.elr_loss` as ``rows``.

    Written is only where gradients are enabled and the bank is in training mode, once for each handle that `rows`
    returns, and never from logits whose softmax is not finite. The loss itself is the same with writing or without. Of
    an index that comes several times in a batch all occurrences read the row as it was before the batch (with
    ``"write_then_read"``: each that row with its own prediction in it), and the last occurrence alone is written. Rows
    whose label is ignored neither read nor write, and their index is not looked at. A sample without a prediction yet,
    or still warming up, is learned from its label alone (α = 1, no regularisation).

    Keep the bank beside a model wrapped in DistributedDataParallel, not in it: that broadcasts buffers at every step.

    Args:
        num_samples: Rows: the training set's size.
        num_classes: Columns: the classes of the logits.
        momentum: β in [0, 1). 0 keeps the last prediction alone: last epoch's, where a sample comes once an epoch.
        dtype: Of the rows: float32, bfloat16 or float64; `to` moves them but never changes it.
        order: ``"read_then_write"``: the target is what was known before this batch. ``"write_then_read"``: this
            batch's prediction is in it.
        device: Where the rows lie; that of the logits.
        bias_correction: False weighs every prediction 1 − momentum, from a row of zeros, as ELR's code does.
        warm_up: E: the first E predictions of each sample only go in. Counted a sample, so that no epoch has to be
            told: where each sample comes once an epoch these are the first E epochs.
        top_k: Keep only the k largest probabilities of a row (4 to 8 bytes each, and the mass of the rest spread
            evenly); ``None`` keeps all.
        unique: An index that comes twice in a batch is an error (on a GPU: all its rows but the last become NaN).

    Attributes:
        predictions: (num_samples, num_classes) rows, or with `top_k` (num_samples, k + 1), the rest's mass last.
        classes: (num_samples, k) int32 classes of a top-k row; (0, 0) otherwise.
        seen: (num_samples,) int32, how many predictions each row is the mean of.

    Raises:
        TypeError: A number or dtype is of the wrong kind.
        ValueError: A number is out of its range; the message names it.

    References:
        Laine, Aila 2017, "Temporal Ensembling" (the bias-corrected mean); Liu et al. 2020, "Early-Learning
        Regularization Prevents Memorization of Noisy Labels" (momentum 0.7, ``bias_correction=False``,
        ``"write_then_read"``).
    """

    predictions: Tensor
    classes: Tensor
    seen: Tensor
    _claims: Tensor
    _seen_at_gather: Tensor

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        momentum: float = 0.9,
        dtype: torch.dtype = torch.float32,
        order: str = "read_then_write",
        device: torch.device | str | None = None,
        *,
        bias_correction: bool = True,
        warm_up: int = 0,
        top_k: int | None = None,
        unique: bool = False,
    ) -> None:
        super().__init__()
        _check_count("num_samples", num_samples, 1)
        _check_count("num_classes", num_classes, 1)
        _check_count("warm_up", warm_up, 0)
        if not _checks.is_number(momentum) or not 0 <= momentum < 1:
            raise ValueError(f"momentum: got {momentum!r}, wanted a number in [0, 1)")
        if dtype not in DTYPES:
            raise TypeError(f"dtype: got {dtype}, wanted torch.float32, torch.bfloat16 or torch.float64")
        _checks.check_option("order", order, ORDERS)
        if device is not None:
            device = _devices.named(device)
        for name, flag in (("bias_correction", bias_correction), ("unique", unique)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: got {flag!r}, wanted True or False")
        if top_k is not None:
            _check_count("top_k", top_k, 1)
            if top_k >= num_classes:
                raise ValueError(f"top_k: got {top_k}, wanted fewer than the {num_classes} classes (None keeps all)")
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.momentum = float(momentum)
        self.order = order
        self.bias_correction = bias_correction
        self.warm_up = warm_up
        self.top_k = top_k
        self.unique = unique
        width = num_classes if top_k is None else top_k + 1
        integers: dict[str, Any] = {"dtype": torch.int32, "device": device}
        sparse = (num_samples, top_k) if top_k is not None else (0, 0)
        self.register_buffer("predictions", torch.zeros(num_samples, width, dtype=dtype, device=device))
        self.register_buffer("classes", torch.arange(sparse[1], **integers).repeat(sparse[0], 1))
        self.register_buffer("seen", torch.zeros(num_samples, **integers))
        self.register_buffer("_seen_at_gather", torch.zeros(num_samples, **integers))
        self.register_buffer("_claims", torch.zeros(num_samples, 2, **integers), persistent=False)

    def rows(self, indices: Tensor) -> "BankRows":
        """The handle of a batch's rows, for one step: `source` of a loss, or `rows` of `sdfast.elr_loss`.

        Args:
            indices: (...) integers, which sample each row of logits is of; on the bank's device.

        Returns:
            A handle that the loss reads and, the first time it is used with gradients enabled, writes.

        Raises:
            TypeError: The indices are no integer tensor.
            ValueError: They are on another device than the bank.
        """
        _checks.check_tensor("indices", indices)
        if indices.dtype not in _checks.INTEGRAL:
            raise TypeError(f"indices: got {_checks.dtype_name(indices)}, wanted an integer tensor of sample indices")
        if indices.device != self.seen.device:
            raise ValueError(f"indices: is on {indices.device}, wanted {self.seen.device} as the bank")
        return BankRows(self, indices)

    @torch.no_grad()
    def probabilities(self, indices: Tensor | None = None) -> Tensor:
        """The rows as they lie in the bank, zero where nothing has been seen.

        Args:
            indices: (...) integers; ``None`` for all samples.

        Returns:
            (..., num_classes) probabilities, float64 where the bank is, otherwise float32; a copy.
        """
        chosen = slice(None) if indices is None else inspection.checked_indices(self, indices)
        dtype = torch.float64 if self.predictions.dtype == torch.float64 else torch.float32
        predictions = self.predictions[chosen]
        if self.top_k is None:
            return predictions.to(dtype, copy=True)
        flat = read_rows(
            predictions.reshape(-1, self.top_k + 1),
            self.classes[chosen].reshape(-1, self.top_k),
            self.num_classes,
            dtype,
        )
        return flat.reshape(*predictions.shape[:-1], self.num_classes)

    @torch.no_grad()
    def start_from(self, labels: Tensor) -> None:
        """Sets every row to its given label, as SELC and self-adaptive training start: t = y.

        The label counts as one prediction seen, or as all of `warm_up`; with ``bias_correction=False`` it then decays
        as momentumⁿ, otherwise it weighs as much as any prediction.

        Args:
            labels: (num_samples,) class indices.

        Raises:
            IndexError: A label is no class.
            ValueError: There are not as many labels as samples.
        """
        labels = inspection.check_all_labels(self, labels)
        self.predictions.zero_()
        if self.top_k is None:
            self.predictions.scatter_(1, labels[:, None], 1)
        else:
            for begin in range(0, self.num_samples, 4096):
                part = slice(begin, begin + 4096)
                one_hot = torch.zeros(len(labels[part]), self.num_classes, device=labels.device)
                values, classes = sparse_rows(one_hot.scatter_(1, labels[part, None], 1), self.top_k)
                self.predictions[part] = values.to(self.predictions.dtype)
                self.classes[part] = classes
        self.seen.fill_(max(1, self.warm_up))
        self._seen_at_gather.copy_(self.seen)

    def suspected_labels(self, labels: Tensor, k: int) -> SuspectedLabels:
        """The k samples whose row disagrees most with their label.

        Disagreement is max_{c≠y} t_c − t_y, in [−1, 1]: above 0 the bank believes in another class.

        Args:
            labels: (num_samples,) class indices, the labels as given.
            k: How many at most; samples not seen yet are left out.

        Returns:
            Sample indices, their disagreement and the class the bank would give, worst first.

        Raises:
            IndexError: A label is no class.
            ValueError: There are not as many labels as samples, or `k` is no count of samples.
        """
        return inspection.suspected_labels(self, labels, k)

    def noise_rate(self, labels: Tensor) -> float:
        """The fraction of samples seen whose row has its largest entry at another class than their label.

        An estimate of how many labels are wrong, from above as long as the model has not learned the wrong ones: where
        the bank itself errs, that counts as noise.

        Args:
            labels: (num_samples,) class indices, the labels as given.

        Returns:
            The rate in [0, 1]; NaN where nothing has been seen.

        Raises:
            IndexError: A label is no class.
            ValueError: There are not as many labels as samples.
        """
        return inspection.noise_rate(self, labels)

    def gather(self, group: Any = None) -> None:
        """Makes the banks of all processes one: of every sample the row of the process that saw it since last time.

        Call it on every process, say after each epoch. Where several saw a sample, the one that saw it most often
        counts, and the lowest rank among equals.

        Args:
            group: A torch.distributed process group; ``None`` is the whole world.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ValueError: The processes' banks are of different sizes.
        """
        gathering.gather(self, group)

    def storage(self) -> Storage:
        """The tensors that an operation reads and writes."""
        held: dict[str, Any] = self._buffers  # not by attribute: a module looks those up in three dictionaries
        return Storage(held["predictions"], held["classes"], held["seen"], held["_claims"])

    def get_extra_state(self) -> dict:
        """The settings that the rows' meaning rests on."""
        return {name: getattr(self, name) for name in SETTINGS}

    def set_extra_state(self, state: dict) -> None:
        """Refuses the state of a bank with other settings.

        Args:
            state: What `get_extra_state` returned.

        Raises:
            ValueError: A setting differs.
        """
        if not isinstance(state, dict) or not set(SETTINGS) <= state.keys():
            raise ValueError(f"state: got {state!r}, wanted the settings that a PredictionBank has saved")
        for name in SETTINGS:
            if state[name] != getattr(self, name):
                raise ValueError(f"{name}: the saved bank has {state[name]!r}, this one {getattr(self, name)!r}")

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments: Any) -> None:
        # Before any tensor is copied: torch would fill what fits of another bank, and round the rest.
        if f"{prefix}_extra_state" in state_dict:
            self.set_extra_state(state_dict[f"{prefix}_extra_state"])
        saved, own = state_dict.get(f"{prefix}predictions", self.predictions), self.predictions
        if torch.promote_types(saved.dtype, own.dtype) != own.dtype:
            kept, given = _checks.dtype_name(own), _checks.dtype_name(saved)
            raise ValueError(f"dtype: the saved bank has {given}, this one {kept}, which would round its rows")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """What was given to the constructor."""
        dtype = _checks.dtype_name(self.predictions)
        shown = [f"{self.num_samples}, {self.num_classes}, momentum={self.momentum}, dtype={dtype}"]
        shown += [
            f"{name}={getattr(self, name)!r}" for name in ("order", "bias_correction", "warm_up", "top_k", "unique")
        ]
        return ", ".join(shown)

    def _apply(self, fn: Any, recurse: bool = True) -> "PredictionBank":
        # Moved or shared, never cast: ``model.half()`` is no wish to round what has been learned. Integers of the same
        # bits are what such a function leaves alone.
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.predictions.element_size()]
        dtype = self.predictions.dtype
        self.predictions = fn(self.predictions.view(bits)).view(dtype)
        for name in ("classes", "seen", "_seen_at_gather", "_claims"):
            setattr(self, name, fn(getattr(self, name)))
        return self


class BankRows:
    """The rows of one batch in a `PredictionBank`, for one step; made by `PredictionBank.rows`.

    Attributes:
        bank: The bank.
        indices: (...) which sample each row is of.
        written: Whether this handle's one write has been done.
    """

    def __init__(self, bank: PredictionBank, indices: Tensor) -> None:
        self.bank = bank
        self.indices = indices
        self.written = False

    def probabilities(self) -> Tensor:
        """(..., num_classes) rows as they lie in the bank now; a copy."""
        return self.bank.probabilities(self.indices)

    def without_kernel(self, backend: str | None) -> tuple[str, ...]:
        """Backends that ``backend=None`` passes over: CUDA has no kernel for rows of top-k."""
        return ("cuda",) if backend is None and self.bank.top_k is not None else ()

    def describe(self, strength: float = 0.0, clamp: float = 0.0) -> BankDescription:
        """What a loss tells its operation of the bank, whether it is to write included."""
        bank = self.bank
        update = bank.training and torch.is_grad_enabled() and not self.written and not will_be_recomputed()
        return BankDescription(
            bank.momentum, bank.bias_correction, bank.order == "write_then_read", bank.warm_up, bank.unique, update,
            float(strength), float(clamp),
        )  # fmt: skip


def check_rows(name: str, rows: object, logits: Tensor) -> None:
    """Refuses what is no handle of rows, or one that does not fit the logits."""
    if not isinstance(rows, BankRows):
        raise TypeError(f"{name}: got {type(rows).__name__}, wanted bank.rows(indices) of a sdfast.PredictionBank")
    if rows.indices.shape != logits.shape[:-1]:
        raise ValueError(
            f"indices: got shape {_checks.shape_text(rows.indices)}, wanted {tuple(logits.shape[:-1])} (one a row) for "
            f"logits {_checks.shape_text(logits)}"
        )
    bank = rows.bank
    if logits.shape[-1] != bank.num_classes:
        raise ValueError(f"{name}: the bank has {bank.num_classes} classes, the logits {logits.shape[-1]}")
    if bank.seen.device != logits.device:
        raise ValueError(f"{name}: the bank is on {bank.seen.device}, wanted {logits.device} as the logits")
    if _dispatch.functorch_is_active():
        raise NotImplementedError(
            f"{name}: a PredictionBank is written as it is read, which torch.func transforms do not allow; pass "
            f"bank.probabilities(indices).log() as the source instead"
        )


def will_be_recomputed() -> bool:
    """Whether this is the first pass of an activation checkpoint, which is thrown away: the recomputation writes.

    A checkpoint that is not reentrant runs this very code again in the backward, and both passes must read the same
    rows. (A reentrant one disables gradients in its first pass, so there the rule of gradients says the same.)
    """
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook.")


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an integer")
    if value < least:
        raise ValueError(f"{name}: got {value}, wanted at least {least}")
