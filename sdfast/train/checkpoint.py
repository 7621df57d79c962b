"""A training run on disk: everything its continuation depends on, in one file that is whole or not there."""

import os
import pickle
import random
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sdfast import _files
from sdfast.data.batches import Batches
from sdfast.train.history import History

if TYPE_CHECKING:
    from sdfast.train.self_distiller import SelfDistiller

FORMAT = "sdfast training 1"

# What optimizers and schedulers note down beside their settings: it follows from them.
_DERIVED = ("initial_lr", "base_lrs", "last_epoch", "_last_lr", "_step_count")


class Checkpoint:
    """The file of one training: model, optimizer, scheduler, scaler, random states, loader and history.

    Args:
        path: Of the file.
        distiller: Whose state it holds.
        train: The training batches.
        options: What else must be the same on resume.

    Raises:
        NotImplementedError: The training has state that no file can hold.
    """

    def __init__(self, path: str | os.PathLike, distiller: "SelfDistiller", train: Iterable, options: dict) -> None:
        _refuse_unsaveable(train)
        self.path = Path(path)
        self.distiller = distiller
        self.train = train
        self.settings = {**distiller.settings, **options, **_data_settings(train)}

    def start(self, epochs: int) -> tuple[History, bool, int]:
        """Restores the run if the file exists, and else writes it as it is before the first epoch.

        Returns:
            The history, whether a callback had ended the training, and the steps done.

        Raises:
            ValueError: The file is no checkpoint, belongs to other settings, or is further than `epochs`.
        """
        if not self.path.exists():
            self.save(History(), False, 0)
            return History(), False, 0
        state = self._read()
        self._compare(state["settings"])
        history = History.from_dicts(state["history"])
        if len(history) > epochs:
            raise ValueError(f"epochs: got {epochs}, but the checkpoint {self.path} has {len(history)} behind it")
        for name, part in self._parts().items():
            part.load_state_dict(state["parts"][name])
        _set_random_states(state["random"])
        for generator, saved in zip(_generators(self.train), state["generators"], strict=True):
            generator.set_state(saved)
        return history, state["stopped"], state["step"]

    def save(self, history: History, stopped: bool, step: int) -> None:
        """Writes the run as it is now."""
        state = {
            "format": FORMAT,
            "settings": self.settings,
            "history": history.to_dicts(),
            "stopped": stopped,
            "step": step,
            "parts": {name: part.state_dict() for name, part in self._parts().items()},
            "random": _random_states(self.distiller.device),
            "generators": [generator.get_state() for generator in _generators(self.train)],
        }
        _files.write_atomically(self.path, lambda file: torch.save(state, file))

    def _parts(self) -> dict[str, Any]:
        distiller = self.distiller
        parts = {"model": distiller.model, "optimizer": distiller.optimizer, "scaler": distiller.scaler}
        if distiller.scheduler is not None:
            parts["scheduler"] = distiller.scheduler
        if _has_state(self.train):
            parts["train"] = self.train
        return parts

    def _read(self) -> dict:
        try:
            # On the CPU: random states live there, and the parts move their own tensors.
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"checkpoint: {self.path} cannot be read as one: {reason}") from None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"checkpoint: {self.path} is no checkpoint of SelfDistiller.fit in the format {FORMAT!r}")
        return state

    def _compare(self, saved: dict) -> None:
        differences = []
        for name in sorted(saved.keys() | self.settings.keys()):
            then, now = saved.get(name), self.settings.get(name)
            if then != now:
                short = name == "model" or len(f"{then}{now}") > 120
                differences.append(f"{name} differs" if short else f"{name} was {then!r} and is {now!r}")
        if differences:
            shown = "; ".join(differences[:4]) + (f"; and {len(differences) - 4} more" if len(differences) > 4 else "")
            raise ValueError(f"checkpoint: {self.path} belongs to a training with other settings: {shown}")


def training_settings(distiller: "SelfDistiller") -> dict[str, Any]:
    """All that decides the course of a training besides its data."""
    loss, model, alpha = distiller.loss, distiller.model, distiller.alpha
    named = getattr(alpha, "__qualname__", type(alpha).__name__) if callable(alpha) else repr(alpha)
    groups = [{**group, "params": len(group["params"])} for group in distiller.optimizer.param_groups]
    names = ("label_fn", "temperature", "loss", "ignore_index", "label_smoothing", "backend")
    return {
        "alpha": named,
        **{name: str(getattr(loss, name)) for name in names},
        "class_weight": None if loss.class_weight is None else str(loss.class_weight.tolist()),
        "model": str([(name, tuple(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]),
        "optimizer": type(distiller.optimizer).__name__,
        "scheduler": None if distiller.scheduler is None else type(distiller.scheduler).__name__,
        "scheduler_step": distiller.scheduler_step,
        "device": distiller.device.type,
        "amp": distiller.amp,
        "compile": distiller.compile,
        **_flat("optimizer", groups),
        **_flat("scheduler", {} if distiller.scheduler is None else distiller.scheduler.state_dict()),
    }


def _flat(prefix: str, value: object) -> dict[str, Any]:
    """Nested settings as one dictionary of plain values: ``{"optimizer[0].lr": 0.1}``."""
    if isinstance(value, dict):
        parts = [_flat(f"{prefix}.{key}", part) for key, part in value.items() if key not in _DERIVED]
    elif isinstance(value, list | tuple):
        parts = [_flat(f"{prefix}[{index}]", part) for index, part in enumerate(value)]
    elif isinstance(value, Tensor):
        return {prefix: str(value.tolist())}
    elif value is None or isinstance(value, bool | int | float | str):
        return {prefix: value}
    else:
        return {prefix: type(value).__name__}
    return {key: leaf for part in parts for key, leaf in part.items()}


def number_of_batches(train: Iterable) -> int | None:
    """How many batches an epoch has, where that is known: a DataLoader of a stream has a length that raises."""
    try:
        return len(train) if isinstance(train, Sized) else None
    except TypeError:
        return None


def _refuse_unsaveable(train: Iterable) -> None:
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise NotImplementedError("checkpoint: holds the state of one process, and torch.distributed runs several")
    if getattr(train, "persistent_workers", False):
        raise NotImplementedError(
            "checkpoint: persistent workers keep random states that no checkpoint holds; use persistent_workers=False"
        )


def _has_state(train: Iterable) -> bool:
    return hasattr(train, "state_dict") and hasattr(train, "load_state_dict")


def _generators(train: Iterable) -> list[torch.Generator]:
    """The generators that a loader and its samplers draw from; without any they draw from torch's own."""
    batch_sampler = getattr(train, "batch_sampler", None)
    owners: tuple[Any, ...] = (
        train,
        getattr(train, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    found = {id(owner.generator): owner.generator for owner in owners if hasattr(owner, "generator")}
    return [generator for generator in found.values() if isinstance(generator, torch.Generator)]


def _data_settings(train: Iterable) -> dict[str, Any]:
    described: dict[str, Any] = {"train": type(train).__name__, "train.batches": number_of_batches(train)}
    names = ("batch_size", "drop_last", "shuffle", "seed", "num_workers")
    described |= {f"train.{name}": getattr(train, name) for name in names if hasattr(train, name)}
    if isinstance(train, Batches):
        described["train.data"] = train.fingerprint()
    elif hasattr(train, "sampler"):
        described["train.sampler"] = type(train.sampler).__name__
        if isinstance(getattr(train, "dataset", None), Sized):
            described["train.rows"] = len(train.dataset)  # type: ignore[attr-defined]
    return described


def _random_states(device: torch.device) -> dict[str, Any]:
    numpy_state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, gauss = numpy_state
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), torch.tensor(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state_all()
    elif device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, *rest = states["numpy"]
    np.random.set_state((name, numbers.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    for device_type in states.keys() - {"python", "numpy", "torch"}:
        if device_type == "cuda":
            torch.cuda.set_rng_state_all(states["cuda"])
        else:
            torch.get_device_module(device_type).set_rng_state(states[device_type])
