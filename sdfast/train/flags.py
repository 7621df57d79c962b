"""The flags of ``sdfast train``: what may go together, and what a run was started with."""

import argparse
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sdfast.baselines import options_of
from sdfast.train.data_flags import check_noise

SETTINGS = "settings.json"
CAN_RESUME = "; the same command with --resume continues"  # what an interrupted command says, once it can
MAX_WIDTH = 65536  # of a hidden layer: two of them are 16 GiB

# Options that do not change the result, and so are no settings of a run.
_NO_SETTINGS = (
    "command", "run", "when_interrupted", "given", "output", "resume", "json", "no_progress", "download",
)  # fmt: skip

# What the loss's flags are where nobody set them; a method has none of them.
_LOSS_DEFAULTS = {
    "label_fn": "hardmax", "temperature": 1.0, "loss": "cross_entropy", "label_smoothing": 0.0, "backend": None,
}  # fmt: skip

# Arguments of the library whose flag has another name.
_FLAGS = {
    "ratio": "alpha-ratio", "rate": "noise", "convention": "noise-convention", "transition": "noise-transition",
    "folder": "data", "learning_rate": "lr",
}  # fmt: skip
_SAME = (
    "backend", "device", "amp", "seed", "test_fraction", "alpha", "temperature", "model", "download",
    "rounds", "runs", "loss", "epochs", "batch_size", "momentum", "weight_decay", "schedule", "hidden",
)  # fmt: skip
_PATHS = ("noise_transition", "data")


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the result, as plain values."""
    values = {name: value for name, value in vars(arguments).items() if name not in _NO_SETTINGS}
    # A file is meant wherever the next command runs.
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in values.items()}


def take_settings(arguments: argparse.Namespace, epochs_done: int) -> None:
    """Gives the options that no flag set the values of the run in the output folder.

    Raises:
        ValueError: A flag differs from what the run was started with, or its settings cannot be read.
    """
    path = arguments.output / SETTINGS
    if not path.exists():
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--resume: {path} is no readable JSON: {error}") from None
    now = settings_of(arguments)
    if not isinstance(saved, dict) or saved.keys() - now.keys():
        raise ValueError(f"--resume: {path} holds no settings of this version of sdfast train")
    constant = saved.get("schedule") == "constant"
    free = {"epochs"} if constant else set()
    differing = [name for name in saved if name in arguments.given and name not in free and saved[name] != now[name]]
    if epochs_done and differing:
        told = "; ".join(f"{flag(name)} was {_shown(saved[name])} and is {_shown(now[name])}" for name in differing)
        why = "; the cosine schedule ends with the epochs it was made for" if "epochs" in differing else ""
        raise ValueError(
            f"--resume: the run in {arguments.output} has other settings: {told}{why}; leave them out to continue it, "
            "or name another --output"
        )
    for name in saved.keys() - arguments.given:
        value = saved[name]
        setattr(arguments, name, Path(value) if name in _PATHS and value is not None else value)
    for name, other in (("alpha", "alpha_ratio"), ("alpha_ratio", "alpha")):
        if name in arguments.given:
            setattr(arguments, other, None)
    if arguments.epochs < epochs_done:
        raise ValueError(
            f"--epochs: got {arguments.epochs}, but the run in {arguments.output} has {epochs_done} behind it"
        )


def check_resume(arguments: argparse.Namespace, there: bool) -> None:
    """Refuses to continue what was never begun: a mistyped folder would start a run of hours by default settings.

    Raises:
        ValueError: `there` is false.
    """
    if not there:
        raise ValueError(
            f"--resume: {arguments.output} holds nothing to continue, wanted the folder of a run that was begun; leave "
            "--resume out to start one"
        )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuses what the parts would refuse in words that are not the command's, and makes the default of α explicit.

    Raises:
        ValueError: An option is impossible, or does not go with the others; the message names the flag.
    """
    _check_method(arguments)
    if arguments.alpha is None and arguments.alpha_ratio is None and arguments.method is None:
        arguments.alpha_ratio = 1.0
    for name in ("epochs", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{flag(name)}: got {getattr(arguments, name)}, wanted at least 1")
    for name in ("lr", "momentum", "weight_decay"):
        value = getattr(arguments, name)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{flag(name)}: got {value}, wanted a finite number >= 0")
        _check_float32(name, value)
    for name in ("alpha", "label_smoothing"):
        value = getattr(arguments, name)
        unbounded = name == "alpha" and arguments.loss == "mse"
        if value is not None and not unbounded and not 0 <= value <= 1:
            raise ValueError(f"{flag(name)}: got {value}, wanted within [0, 1]")
    if any(width < 1 for width in arguments.hidden):
        raise ValueError(f"--hidden: got {arguments.hidden}, wanted widths of at least 1")
    if any(width > MAX_WIDTH for width in arguments.hidden):
        raise ValueError(f"--hidden: got {max(arguments.hidden)}, wanted widths of at most {MAX_WIDTH}")
    if arguments.alpha is not None:
        _check_float32("alpha", arguments.alpha)
    if arguments.label_fn == "identity" and arguments.loss != "mse":
        raise ValueError(
            f"--label-fn: identity gives no probabilities and goes with --loss mse only, not {arguments.loss}"
        )
    if arguments.temperature != 1 and arguments.label_fn != "softmax":
        raise ValueError(
            f"--temperature: got {arguments.temperature}, but only --label-fn softmax has one, not {arguments.label_fn}"
        )
    check_noise(arguments)


def _check_method(arguments: argparse.Namespace) -> None:
    if arguments.method is None:
        if arguments.option:
            raise ValueError(f"--option: {arguments.option[0]} is of a method, and there is no --method")
        return
    defaults = {"alpha": None, "alpha_ratio": None, **_LOSS_DEFAULTS}
    for name, default in defaults.items():
        value = getattr(arguments, name)
        if value != default:
            raise ValueError(f"{flag(name)}: got {value}, but --method {arguments.method} has a loss of its own")
    method_options(arguments)


def method_options(arguments: argparse.Namespace) -> dict[str, int | float]:
    """The options of the method as numbers by name.

    Raises:
        ValueError: One is no NAME=VALUE, the method has no such option, or lacks one without a default.
    """
    known = options_of(arguments.method)
    options: dict[str, int | float] = {}
    for text in arguments.option or ():
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            has = f"one of {', '.join(known)}" if known else "none: it has no options"
            raise ValueError(f"--option: got {text}, wanted NAME=VALUE with --method {arguments.method}, NAME {has}")
        try:
            options[name] = int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)
        except ValueError:
            raise ValueError(f"--option: got {text}, wanted a number after the =") from None
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise ValueError(f"--option: --method {arguments.method} wants {name}=VALUE, which has no default")
    return options


def _check_float32(name: str, value: float) -> None:
    largest = torch.finfo(torch.float32).max
    if abs(value) > largest:
        raise ValueError(f"{flag(name)}: got {value}, wanted at most {largest:.3g}, the largest float32")


@contextmanager
def named_as_flags(**others: str) -> Iterator[None]:
    """Errors that name an argument of the library name the flag of it; `others` have another flag here."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        name, rest = re.match(r"(\w*)(.*)", str(error), re.DOTALL).groups()  # type: ignore[union-attr]
        known = name in _FLAGS or name in _SAME
        rest = re.sub(r"^='(\w+)'", r" \1", rest)  # backend='cuda': as it is typed
        rest = rest.replace("download=True", "--download")
        raise type(error)(f"{flag(others.get(name, name))}{rest}" if known else str(error)) from None


def flag(name: str) -> str:
    """An option's name as it is typed."""
    return f"--{_FLAGS.get(name, name).replace('_', '-')}"


def describe(settings: dict[str, Any]) -> str:
    """A run in one line: data, noise, α."""
    noise = f"{settings['noise_kind']} label noise {settings['noise']:g}" if settings["noise"] else "no label noise"
    if settings["noise"] and settings["noise_convention"] == "others":
        noise += " (to other classes)"
    if settings["method"] is not None:
        options = f" ({', '.join(settings['option'])})" if settings["option"] else ""
        return f"{settings['dataset']}, {noise}; {settings['method']}{options}"
    if settings["alpha"] is None:
        alpha = f"1 − alpha = {settings['alpha_ratio']:g} · batch accuracy"
    else:
        alpha = f"alpha = {settings['alpha']:g}"
    return f"{settings['dataset']}, {noise}; {alpha}, label function {settings['label_fn']}, loss {settings['loss']}"


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
