"""Figure 5 of Dong et al. 2019: the information that self-distillation adds to noisy labels, iteration by iteration."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdfast import _files, plots
from sdfast.data import Batches
from sdfast.experiments.claims import above
from sdfast.experiments.experiment import Common, Experiment, Summary
from sdfast.experiments.task import checkpoint, draw_rows, load_signs, network, prepared
from sdfast.ntk import information_ratio
from sdfast.ops.self_distillation import AdaptiveAlpha, ClipLabel
from sdfast.train.information_probe import InformationProbe
from sdfast.train.recipe import Recipe
from sdfast.train.records import mean_and_deviation, mean_text
from sdfast.train.self_distiller import SelfDistiller

MOSTLY = 0.95  # of the looks have a gain of at least 0: what "mostly" is taken to mean
CODINGS = {"plain": ("labels as ±1", plots.BLUE), "centred": ("their mean taken off", plots.GREEN)}


@dataclass(frozen=True)
class Settings(Common):
    """Settings of the figure.

    Attributes:
        dataset: Name for `load_dataset`.
        positive: The classes that are labelled 1; all others are -1.
        model: Name for `make_model`.
        hidden: Widths of an ``mlp``.
        iterations: Steps of training.
        every: Steps from one look at the kernel to the next.
        batch_size: Rows in a step.
        learning_rate: Constant.
        weight_decay: Of SGD.
        noise: Probability with which a label is redrawn over both classes; half of it is the ρ of the label function.
        ratio: λ of 1 − α = λ · batch accuracy; just above 1/(2a), a the share of labels that stay right (.8 here),
            below which a belief never outweighs a wrong label. At 1 the networks of seeds 1000 and 1001, which are not
            among those run, believed in the larger class alone for hundreds of iterations.
        samples: Of the training part, whose kernel and labels are looked at.
        pairs: k of the eigenspace.
        batch_norm: Of the kernel: ``"eval"``, or ``"train"`` with the samples' own statistics, for those of a network
            that has just begun are not yet its own.
        checkpoints: Write one after every look.
    """

    dataset: str = "digits"
    positive: tuple[int, ...] = (2, 7)
    model: str = "mlp"
    hidden: tuple[int, ...] = (256, 256)
    iterations: int = 1500
    every: int = 20
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    noise: float = 0.4
    ratio: float = 0.65
    samples: int = 128
    pairs: int = 5
    batch_norm: str = "train"
    checkpoints: bool = False


PAPER = Settings(seeds=3, jobs=1, dataset="cifar10", model="resnet56", checkpoints=True)


class Stretches:
    """Batches of a training as epochs of a few steps each, so that a trainer looks up, and saves, so often.

    Args:
        batches: Passed over again and again, each pass in the next epoch's order.
        steps: In a stretch.
    """

    def __init__(self, batches: Batches, steps: int) -> None:
        self.batches, self.steps = batches, steps
        self.position = 0
        self._stream = self._from(0)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in islice(self._stream, self.steps):
            self.position += 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """The next stretch is this one."""
        if self.position != epoch * self.steps:
            self.position = epoch * self.steps
            self._stream = self._from(self.position)

    def fingerprint(self) -> str:
        """That of the batches, by which a checkpoint knows its data again."""
        return self.batches.fingerprint()

    def _from(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        passed, first = divmod(step, len(self.batches))
        while True:
            self.batches.set_epoch(passed)
            yield from islice(self.batches, first, None)
            passed, first = passed + 1, 0


def run_seed(settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """The looks of one training, the first before its first step."""
    data, given, true = load_signs(settings, seed, settings.noise)
    alpha, label_fn = AdaptiveAlpha(settings.ratio), ClipLabel(settings.noise / 2)
    rows = draw_rows(len(given), settings.samples, seed)
    inputs = prepared(data, data.train_inputs[rows])
    probe = InformationProbe(
        inputs, given[rows], k=settings.pairs, alpha=alpha, label_fn=label_fn, clean_labels=true[rows], outputs="sum",
        batch_norm=settings.batch_norm,
    )  # fmt: skip
    looks: list[dict[str, list[float]]] = []
    file = folder / "looks.json" if settings.checkpoints else None
    if file is not None and file.exists():
        looks = json.loads(file.read_text(encoding="utf-8"))

    def look(distiller: SelfDistiller, history: Any) -> None:
        del looks[len(history) :]  # those after the checkpoint that is gone on from
        probe.look(distiller.model)
        space = replace(probe.space, gap=math.inf, angle=0.0)  # the gap is written down, not warned of
        found: dict[str, list[float]] = {}
        vectors = (given[rows], probe.refined, true[rows])
        for coding in CODINGS:
            ratios = [information_ratio(space, v, center=coding == "centred", joint=True).item() for v in vectors]
            found[coding] = ratios
        looks.append(found)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            _files.write_text(file, json.dumps(looks) + "\n")

    recipe = Recipe(
        batch_size=settings.batch_size, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay,
        schedule="constant", device=settings.device,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = network(data, settings.model, settings.hidden)()
    distiller = recipe.distiller(model, alpha=alpha, loss="mse", label_fn=label_fn)
    if not looks:
        look(distiller, ())
    stretches = Stretches(recipe.batches(data, given, seed), settings.every)
    distiller.fit(
        stretches, settings.iterations // settings.every, callbacks=[look], progress=False,
        checkpoint=checkpoint(settings, folder, settings.model),
    )  # fmt: skip
    names = ("given", "refined", "true")
    values = {
        c: dict(zip(names, map(list, zip(*(one[c] for one in looks), strict=True)), strict=True)) for c in CODINGS
    }
    return {**values, "wrong_labels": float((given[rows] != true[rows]).double().mean())}


def gains(run: dict[str, Any], coding: str) -> list[float]:
    """Refined less given, look by look."""
    return [after - before for after, before in zip(run[coding]["refined"], run[coding]["given"], strict=True)]


def summarise(settings: Settings, seeds: dict[int, dict[str, Any]]) -> Summary:
    """How often the gain is at least 0, and how large it is."""
    runs = list(seeds.values())
    claims, rows, shares = [], [], {}
    for coding, (name, _) in CODINGS.items():
        curves = [gains(run, coding) for run in runs]
        shares[coding] = [sum(gain >= 0 for gain in curve) / len(curve) for curve in curves]
        means = [mean_and_deviation(curve)[0] for curve in curves]
        claims += [
            above(
                f"The information gain is at least 0 in more than {100 * MOSTLY:.0f} % of the looks ({name})",
                [share - MOSTLY for share in shares[coding]],
            ),
            above(f"The mean gain over a training is above 0 ({name})", means, "", 1.0),
        ]
        rows.append(
            [
                name, mean_text(shares[coding], 100), mean_text(means, digits=2),
                mean_text([min(curve) for curve in curves], digits=2), _last_loss(settings, curves),
                *(mean_text([run[coding][column][-1] for run in runs], digits=2) for column in ("given", "true")),
            ]
        )  # fmt: skip
    headers = ["", "looks with gain ≥ 0 (%)", "mean gain", "smallest gain", "last iteration with gain < 0",
               "ratio of the labels as given, last look", "of the true labels"]  # fmt: skip
    wrong = 100 * mean_and_deviation([run["wrong_labels"] for run in runs])[0]
    looks = len(runs[0]["plain"]["given"])
    title = f"{looks} looks in {settings.iterations} iterations, {wrong:.0f} % of the labels looked at wrong"
    paper = ["paper (CIFAR-10, ResNet-56)", '"mostly" (a curve, no number)', *[""] * (len(headers) - 2)]
    share, gain = (mean_and_deviation(values)[0] for values in (shares["plain"], [*map(_mean, runs)]))
    reading = (
        f"In {100 * share:.0f} % of the looks the labels that self-distillation trains on have a higher information "
        f"ratio (in the kernel's top {settings.pairs} eigenvectors) than the labels as given; on average by "
        f"{gain:.2f}."
    )
    verdict = claims[0].holds
    if verdict is not None:
        reading += (
            " So the gain is mostly above 0, as in the paper's figure."
            if verdict
            else f" That it is so in more than {100 * MOSTLY:.0f} % of them, as the paper's figure suggests, is "
            "not shown."
        )
    return Summary(reading, claims, [(title, headers, [*rows, paper])], lambda: _figure(settings, runs, wrong))


def _mean(run: dict[str, Any]) -> float:
    return mean_and_deviation(gains(run, "plain"))[0]


def _last_loss(settings: Settings, curves: list[list[float]]) -> str:
    """The latest iteration of any seed whose gain is negative."""
    lost = [settings.every * at for curve in curves for at, gain in enumerate(curve) if gain < 0]
    return str(max(lost)) if lost else "none"


def _figure(settings: Settings, runs: list[dict[str, Any]], wrong: float) -> Any:
    xs = [settings.every * at for at in range(len(runs[0]["plain"]["given"]))]
    curves = [
        plots.Curve(name, color, [gains(run, coding) for run in runs]) for coding, (name, color) in CODINGS.items()
    ]
    names = {"given": plots.ORANGE, "refined": plots.VERMILLION, "true": plots.GREEN}
    ratios = [plots.Curve(name, color, [run["plain"][name] for run in runs]) for name, color in names.items()]
    options: dict[str, Any] = {"x_name": "iteration", "xs": xs, "percent": False}
    return plots.comparison(
        "What self-distillation adds to noisy labels",
        f"{settings.model} on {settings.dataset} {set(settings.positive)}, {wrong:.0f} % wrong labels; mean and range "
        f"of {len(runs)} seeds",
        [
            plots.Panel("Information gain", curves, level=0.0, level_name="no gain", **options),
            plots.Panel("Information ratio, labels as ±1", ratios, **options),
        ],
    )


EXPERIMENT = Experiment(
    title="The information gain of self-distillation",
    source="Dong et al. 2019, Figure 5",
    question="Do labels that are mixed with the network's own predictions hold more of what the network learns first?",
    presets={"small": Settings(), "paper": PAPER},
    run_seed=run_seed,
    summarise=summarise,
    unstated=(
        "the noise (here 40 % redrawn), the label function (here that of Theorem 1, ρ the share of wrong labels), λ "
        "(here .65: at 1 such a network may believe in the larger class alone, and the constant vector then makes all "
        "of the gain), whose labels are looked at (here a fixed batch of the training part), the mode of batch "
        "normalisation (here that of training, where a network has any), and what mostly means (here more than 95 % of "
        "the looks)."
    ),
)
