"""What decides the course of a training, as plain values that a checkpoint can compare."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sdfast.data.fingerprint import data_hash, fixed_random, spread
from sdfast.ops.self_distillation import AdaptiveAlpha

if TYPE_CHECKING:
    from sdfast.train.self_distiller import SelfDistiller

POINTS = 32  # at which a function is compared

# What optimizers and schedulers note down beside their settings: it follows from them.
_DERIVED = (
    "initial_lr", "base_lrs", "last_epoch", "_last_lr", "_step_count", "_is_initial", "_get_lr_called_within_step"
)  # fmt: skip


def training_settings(distiller: "SelfDistiller") -> dict[str, Any]:
    """All that decides the course of a training besides its data and its functions."""
    loss, model = distiller.loss, distiller.model
    groups = [{**group, "params": len(group["params"])} for group in distiller.optimizer.param_groups]
    names = (
        "label_fn", "temperature", "mixing", "target_temperature", "loss", "ignore_index", "label_smoothing",
        "row_weight", "backend",
    )  # fmt: skip
    shapes = [(name, tuple(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    return {
        "alpha": _alpha_text(distiller.alpha),
        "method": None if distiller.method is None else distiller.method.extra_repr(),
        **{name: str(getattr(loss, name)) for name in names},
        "class_weight": None if loss.class_weight is None else str(loss.class_weight.tolist()),
        "model": f"{re.sub('0x[0-9a-f]+', '', repr(model))} {shapes}",  # without the addresses of functions
        "optimizer": type(distiller.optimizer).__name__,
        "scheduler": None if distiller.scheduler is None else type(distiller.scheduler).__name__,
        "scheduler_step": distiller.scheduler_step,
        "device": distiller.device.type,
        "amp": distiller.amp,
        "compile": distiller.compile,
        **_flat("optimizer", groups),
        **_flat("scheduler", {} if distiller.scheduler is None else distiller.scheduler.state_dict()),
    }


def data_settings(train: Iterable) -> dict[str, Any]:
    """What the training batches are, their contents as a hash."""
    described: dict[str, Any] = {"train": type(train).__name__, "train.batches": number_of_batches(train)}
    names = ("batch_size", "drop_last", "shuffle", "seed", "num_workers")
    described |= {f"train.{name}": getattr(train, name) for name in names if hasattr(train, name)}
    if hasattr(train, "sampler"):
        described["train.sampler"] = type(train.sampler).__name__
    if isinstance(getattr(train, "dataset", None), Sized):
        described["train.rows"] = len(train.dataset)  # type: ignore[attr-defined]
    described["train.data"] = data_hash(train)
    return described


def number_of_batches(train: Iterable) -> int | None:
    """How many batches an epoch has, where that is known: a DataLoader of a stream has a length that raises."""
    try:
        return len(train) if isinstance(train, Sized) else None
    except TypeError:
        return None


def functions(distiller: "SelfDistiller") -> dict[str, Callable]:
    """The functions of a training, by name: α of (epoch, step), and those of a scheduler."""
    found = {"alpha": distiller.alpha} if callable(distiller.alpha) else {}
    schedulers = [("scheduler", distiller.scheduler)]
    for name, scheduler in schedulers:  # SequentialLR and ChainedScheduler hold others, which are appended
        found |= {f"{name}.lr_lambda[{i}]": part for i, part in enumerate(getattr(scheduler, "lr_lambdas", []))}
        schedulers += [(f"{name}[{i}]", part) for i, part in enumerate(getattr(scheduler, "_schedulers", []))]
    return found


def function_values(distiller: "SelfDistiller", epochs: int, steps: int | None) -> dict[str, list]:
    """Values of each function at points spread over a training of `epochs` with `steps` batches in each."""
    batches = steps or 1
    values = {}
    for name, function in functions(distiller).items():
        points: list[tuple[int, ...]]
        if name == "alpha":
            points = [(e, e * batches + s) for e in spread(epochs, POINTS // 2) for s in sorted({0, batches // 2})]
        else:
            points = [(k,) for k in spread(_calls(distiller, epochs, steps), POINTS)]
        values[name] = [[list(point), value_at(function, point)] for point in points]
    return values


def value_at(function: Callable, point: Iterable[int]) -> Any:
    """The value as a plain one, or ``None`` where it changes from call to call."""
    values = []
    for _ in range(2):
        with fixed_random():
            value = function(*point)
        value = value.tolist() if isinstance(value, Tensor) else plain(value)
        values.append(value if isinstance(value, bool | int | float | list) else type(value).__name__)
    return values[0] if values[0] == values[1] else None


def within(name: str, point: Iterable[int], distiller: "SelfDistiller", epochs: int, steps: int | None) -> bool:
    """Whether a training of `epochs` comes to this point of the function of that name."""
    first = next(iter(point))
    return first < (epochs if name == "alpha" else _calls(distiller, epochs, steps))


def plain(value: Any) -> Any:
    """Lists, tuples and plain dictionaries with NumPy's scalars in them turned into Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (dict, defaultdict):
        return {plain(key): plain(part) for key, part in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def _calls(distiller: "SelfDistiller", epochs: int, steps: int | None) -> int:
    """How often a training steps its scheduler."""
    return epochs * (steps or 1) if distiller.scheduler_step == "step" else epochs


def _alpha_text(alpha: object) -> str:
    if isinstance(alpha, AdaptiveAlpha):
        return f"AdaptiveAlpha({alpha.ratio}, sync={alpha.sync})"
    if isinstance(alpha, Tensor):
        return str(alpha.tolist())
    return "a function" if callable(alpha) else repr(alpha)


def _flat(prefix: str, value: object) -> dict[str, Any]:
    """Nested settings as one dictionary of plain values: ``{"optimizer[0].lr": 0.1}``."""
    value = plain(value)
    if isinstance(value, dict):
        parts = [_flat(f"{prefix}.{str(key).lstrip('_')}", part) for key, part in value.items() if key not in _DERIVED]
    elif isinstance(value, list | tuple):
        parts = [_flat(f"{prefix}[{index}]", part) for index, part in enumerate(value)]
    elif isinstance(value, Tensor):
        return {prefix: str(value.tolist())}
    elif value is None or isinstance(value, bool | int | float | str):
        return {prefix: value}
    else:
        return {prefix: type(value).__name__}
    return {key: leaf for part in parts for key, leaf in part.items()}
