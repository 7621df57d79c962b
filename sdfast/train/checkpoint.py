"""A training run on disk: everything its continuation depends on, in one file that is whole or not there."""

import os
import pickle
import random
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sdfast import _files
from sdfast.train import processes
from sdfast.train.history import History
from sdfast.train.settings import data_settings, function_values, functions, number_of_batches, plain, value_at, within

if TYPE_CHECKING:
    from sdfast.train.self_distiller import SelfDistiller

FORMAT = "sdfast training 3"

# What a checkpoint file is made of.
_CONTENTS = {
    "settings": dict, "functions": dict, "history": list, "stopped": bool, "step": int, "parts": dict, "random": dict,
    "generators": list, "others": list,
}  # fmt: skip

# All that unpacking a damaged file has been seen to raise.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, LookupError, struct.error, OSError, ValueError, TypeError,
    AttributeError, MemoryError, OverflowError, zipfile.BadZipFile,
)  # fmt: skip


# What DistributedDataParallel keeps the same in all processes, but for the model's buffers.
_SHARED = ("model", "optimizer", "scaler", "scheduler")


class Checkpoint:
    """The file of one training: model, optimizer, scheduler, scaler, random states, loader and history.

    Of several processes the first reads and writes it. It holds once what they share, and of each its buffers, random
    states, loader, method and history: one file, so that whenever a run dies all have the same epochs behind them.

    Args:
        path: Of the file; its folder must be there.
        distiller: Whose state it holds.
        train: The training batches.
        epochs: How many the training shall have.
        options: What else must be the same on resume.

    Raises:
        ValueError: There is no folder for the file.
        NotImplementedError: The training has state that no file can hold.
    """

    def __init__(
        self, path: str | os.PathLike, distiller: "SelfDistiller", train: Iterable, epochs: int, options: dict
    ) -> None:
        _refuse_unsaveable(distiller, train)
        self.path = Path(path)
        if processes.rank() == 0 and not self.path.parent.is_dir():
            raise ValueError(f"checkpoint: the folder of {self.path} does not exist; make it first")
        self.distiller = distiller
        self.train = train
        self.epochs = epochs
        self.settings = {**distiller.settings, **options, **data_settings(train), "processes": processes.count()}
        self.functions = function_values(distiller, epochs, number_of_batches(train))

    def start(self) -> tuple[History, bool, int]:
        """Restores the run if the file holds one, and else writes it as it is before the first epoch.

        A file with no epoch behind it holds nothing worth keeping: where it belongs to other settings, the training
        that wrote it never got going, and it is written anew.

        Returns:
            The history, whether a callback had ended the training, and the steps done.

        Raises:
            ValueError: The file is no checkpoint, belongs to other settings, or is further than the epochs wanted.
        """
        state = self._read()
        if state is None or not all(processes.together(lambda: self._accepts(state))):
            return self._begin()
        return processes.together(lambda: self._restore(state))[processes.rank()]

    def save(self, history: History, stopped: bool, step: int) -> None:
        """Writes the run as it is now."""
        state = self._state(history, stopped, step)
        first = processes.rank() == 0
        others = processes.gathered(None if first else self._own(state))[1:]
        processes.together(lambda: self._write({**state, "others": others}) if first else None)

    def _read(self) -> dict[str, Any] | None:
        """What the file holds for this process, or ``None`` where there is no file."""
        found: list[Any] = [None] * processes.count()

        def look() -> None:
            if processes.rank() == 0 and self.path.exists():
                state = read(self.path)
                found[:] = [_of_process(state, number) for number in range(processes.count())]

        processes.together(look)
        return processes.scattered(found)

    def _accepts(self, state: dict[str, Any]) -> bool:
        """Whether this training goes on from it; `False` where there is nothing in it to lose."""
        try:
            epochs = len(History.from_dicts(state["history"]))
            differences = self._differences(state)
        except _UNREADABLE as error:
            raise _unreadable(self.path, error) from error
        if differences and not epochs:
            return False
        if differences:
            shown = "; ".join(differences[:4]) + (f"; and {len(differences) - 4} more" if len(differences) > 4 else "")
            raise ValueError(
                f"checkpoint: {self.path} belongs to a training with other settings: {shown}; give it those, or name "
                "another file"
            )
        if epochs > self.epochs:
            raise ValueError(f"epochs: got {self.epochs}, but the checkpoint {self.path} has {epochs} behind it")
        if self._parts().keys() != state["parts"].keys() or len(_generators(self.train)) != len(state["generators"]):
            raise ValueError(f"checkpoint: {self.path} is no readable checkpoint (its parts are not this training's)")
        return True

    def _restore(self, state: dict[str, Any]) -> tuple[History, bool, int]:
        try:
            for name, part in self._parts().items():
                part.load_state_dict(state["parts"][name])
            _set_random_states(state["random"])
            for generator, saved in zip(_generators(self.train), state["generators"], strict=True):
                generator.set_state(saved)
        except _UNREADABLE as error:
            raise _unreadable(self.path, error) from error
        return History.from_dicts(state["history"]), state["stopped"], state["step"]

    def _state(self, history: History, stopped: bool, step: int) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "settings": self.settings,
            "functions": self.functions,
            "history": history.to_dicts(),
            "stopped": stopped,
            "step": step,
            "parts": {name: plain(part.state_dict()) for name, part in self._parts().items()},
            "random": _random_states(self.distiller.device),
            "generators": [generator.get_state() for generator in _generators(self.train)],
        }

    def _own(self, state: dict[str, Any]) -> dict[str, Any]:
        """What of a process's state only itself has."""
        buffers = {name for name, _ in self.distiller.model.named_buffers()}
        parts = {name: part for name, part in state["parts"].items() if name not in _SHARED}
        own = {name: value for name, value in state["parts"]["model"].items() if name in buffers}
        return _on_cpu({**state, "parts": parts, "buffers": own})

    def _write(self, state: dict[str, Any]) -> None:
        try:
            _files.write_atomically(self.path, lambda file: torch.save(state, file))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise NotImplementedError(f"checkpoint: the training's state cannot be saved: {error}") from error
        except RuntimeError as error:
            raise _cause(error) from None

    def _parts(self) -> dict[str, Any]:
        distiller = self.distiller
        parts = {"model": distiller.model, "optimizer": distiller.optimizer, "scaler": distiller.scaler}
        if distiller.scheduler is not None:
            parts["scheduler"] = distiller.scheduler
        if distiller.method is not None:
            parts["method"] = distiller.method
        if _has_state(self.train):
            parts["train"] = self.train
        return parts

    def _begin(self) -> tuple[History, bool, int]:
        self.save(History(), False, 0)
        processes.together(self._check_readable)
        return History(), False, 0

    def _check_readable(self) -> None:
        """Rather now than after a day of training."""
        if processes.rank() != 0:
            return
        try:
            read(self.path)
        except ValueError:
            self.path.unlink()
            raise NotImplementedError(
                "checkpoint: the state_dict of model, optimizer, scheduler or loader holds what cannot be read back "
                "safely, wanted tensors, numbers, strings, lists and dictionaries"
            ) from None

    def _differences(self, state: dict) -> list[str]:
        differences = []
        saved = state["settings"]
        for name in sorted(saved.keys() | self.settings.keys()):
            then, now = saved.get(name), self.settings.get(name)
            if then != now:
                short = name in ("model", "train.data") or len(f"{then}{now}") > 120
                differences.append(f"{name} differs" if short else f"{name} was {then!r} and is {now!r}")
        steps = number_of_batches(self.train)
        for name, function in functions(self.distiller).items():
            for point, then in state["functions"].get(name, []):
                # A shorter training may have no value there.
                now = value_at(function, point) if within(name, point, self.distiller, self.epochs, steps) else then
                if None not in (then, now) and then != now:
                    differences.append(f"{name}({', '.join(map(str, point))}) was {then!r} and is {now!r}")
                    break
        return differences


def read(path: Path) -> dict[str, Any]:
    """What is in a checkpoint file.

    Args:
        path: Of the file.

    Returns:
        The state that `Checkpoint.save` wrote.

    Raises:
        ValueError: It is none, or damaged.
    """
    try:
        # On the CPU: random states live there, and the parts move their own tensors.
        state = torch.load(path, map_location="cpu", weights_only=True)
        if torch.serialization.get_crc32_options():  # torch writes checksums, and does not look at them
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(damaged)
    except PermissionError:
        raise  # says it all
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"checkpoint: {path} is no checkpoint of SelfDistiller.fit in the format {FORMAT!r}")
    missing = [name for name, kind in _CONTENTS.items() if type(state.get(name)) is not kind]
    if missing:
        raise ValueError(f"checkpoint: {path} is no readable checkpoint (it lacks {', '.join(missing)})")
    return state


def _cause(error: BaseException) -> BaseException:
    """What the file system said, where torch's writer stopped with an error of its own on top of it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _unreadable(path: Path, error: BaseException) -> ValueError:
    """Without torch's own words, which advise to load what the file cannot be trusted with."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return ValueError(f"checkpoint: {path} is no readable checkpoint ({reason}); delete it to start anew")


def _of_process(state: dict[str, Any], number: int) -> dict[str, Any]:
    """The state of one of the processes that a file holds; the first one's where it holds none of that number."""
    others = state["others"]
    if not 0 < number <= len(others):
        return state
    own = dict(others[number - 1])
    parts = {**state["parts"], **own.pop("parts")}
    parts["model"] = {**parts["model"], **own.pop("buffers")}
    return {**state, **own, "parts": parts}


def _on_cpu(value: Any) -> Any:
    """A copy whose tensors lie where another process can have them."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(part) for key, part in value.items()}
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


def _refuse_unsaveable(distiller: "SelfDistiller", train: Iterable) -> None:
    if processes.count() > 1 and not isinstance(distiller.model, nn.parallel.DistributedDataParallel):
        raise NotImplementedError(
            f"checkpoint: {processes.count()} processes train models of their own; wanted one between them, as "
            "DistributedDataParallel"
        )
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
