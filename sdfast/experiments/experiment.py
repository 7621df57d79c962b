"""What an experiment is: settings by preset, one seed's work, and what all seeds together say."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sdfast.experiments.claims import Claim

# The figures and tables of the two papers that can be run, in the papers' order.
NAMES = (
    "dong2019_figure1",
    "dong2019_figure2",
    "dong2019_figure4",
    "dong2019_figure5",
    "dong2019_table1",
    "theorem1",
    "mobahi2020_figure2",
    "mobahi2020_figure3",
    "appendix_early_stopping",
    "rounds_predicted",
)


@dataclass(frozen=True)
class Common:
    """What every experiment's settings have.

    Attributes:
        seeds: How many.
        jobs: Processes of one thread each; 1 is this one, with all its threads.
        device: Where to train.
        data: Folder of the data set, where it has one.
        download: Let torchvision fetch it.
    """

    seeds: int = 10
    jobs: int = 2
    device: str = "cpu"
    data: str | None = None
    download: bool = False


@dataclass
class Summary:
    """What all seeds together say.

    Attributes:
        reading: What agrees with the paper and what does not, in plain sentences.
        claims: The paper's claims, tested.
        tables: (title, headers, rows), the paper's numbers beside ours.
        figure: A matplotlib figure, made when called; it needs matplotlib.
    """

    reading: str
    claims: Sequence[Claim] = ()
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[object]]]] = ()
    figure: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Experiment:
    """A figure, a table or a theorem that ``sdfast reproduce`` runs.

    Attributes:
        title: In a line.
        source: Paper and place.
        question: What is asked, for who has not read the paper.
        presets: Settings by name; ``paper`` is the paper's, as far as it tells them.
        run_seed: (settings, seed, folder) -> plain values; the folder is for what it resumes from.
        summarise: (settings, seed -> values) -> `Summary`.
        unstated: What the paper does not say, and what stands in for it.
    """

    title: str
    source: str
    question: str
    presets: dict[str, Any]
    run_seed: Callable[[Any, int, Path], dict[str, Any]]
    summarise: Callable[[Any, dict[int, dict[str, Any]]], Summary]
    unstated: str = ""


def load(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in NAMES:
        raise ValueError(f"NAME: got {name!r}, wanted one of {', '.join(NAMES)}")
    return importlib.import_module(f"sdfast.experiments.{name}").EXPERIMENT


def changed(settings: Any, changes: Sequence[str]) -> Any:
    """The settings with ``name=value`` texts applied, each value read as the type that stands there now.

    Raises:
        ValueError: There is no such setting, or the value is of another type.
    """
    values: dict[str, Any] = {}
    known = {field.name for field in fields(settings)}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--set: got {change!r}, wanted NAME=VALUE with one of {', '.join(sorted(known))}")
        values[name] = _as(getattr(settings, name), text, change)
    return replace(settings, **values)


def _as(now: Any, text: str, change: str) -> Any:
    try:
        if isinstance(now, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(now, tuple):
            return tuple(_as(now[0], part, change) for part in text.split(","))
        return text if now is None or isinstance(now, str) else type(now)(text)
    except (ValueError, KeyError):
        kind = f"values like {now[0]!r} with commas between" if isinstance(now, tuple) else type(now).__name__
        raise ValueError(f"--set: got {change!r}, wanted a value of kind {kind}, as {now!r} is") from None
