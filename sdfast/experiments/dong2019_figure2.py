"""Figure 2 of Dong et al. 2019: the information ratio of labels falls as they are corrupted."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdfast import plots
from sdfast.experiments.claims import above
from sdfast.experiments.experiment import Common, Experiment, Summary
from sdfast.experiments.task import as_signs, checkpoint, draw_rows, load_signs, network, prepared
from sdfast.ntk import eigenspace, gram, noise_sweep
from sdfast.train.information_probe import mode_of_look
from sdfast.train.recipe import Recipe
from sdfast.train.records import mean_and_deviation, mean_text

NETWORKS = {"trained": plots.BLUE, "initial": plots.VERMILLION}
CODINGS = {"plain": "labels as ±1", "centred": "their mean taken off"}


@dataclass(frozen=True)
class Settings(Common):
    """Settings of the figure.

    Attributes:
        dataset: Name for `load_dataset`.
        positive: The classes that are labelled 1; all others are -1.
        model: Name for `make_model`.
        hidden: Widths of an ``mlp``.
        epochs: Of training, on clean labels.
        batch_size: Rows in a step.
        learning_rate: At the start; it falls by a cosine.
        weight_decay: Of SGD.
        samples: Of the test part, whose kernel and labels are looked at.
        pairs: k of the eigenspace.
        rates: Shares of the labels that are flipped.
        repeats: Draws of which labels, at each rate.
        batch_norm: Of the kernel: ``"eval"``, or ``"train"`` with the samples' own statistics, for those of a network
            that has just begun are not yet its own.
        checkpoints: Write one after every epoch.
    """

    dataset: str = "digits"
    positive: tuple[int, ...] = (2, 7)
    model: str = "mlp"
    hidden: tuple[int, ...] = (256, 256)
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    samples: int = 128
    pairs: int = 5
    rates: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    repeats: int = 20
    batch_norm: str = "train"
    checkpoints: bool = False


PAPER = Settings(seeds=3, jobs=1, dataset="cifar10", model="resnet56", epochs=200, checkpoints=True)


def run_seed(settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """The ratios of one draw of split, weights, order, samples and flips, by network and coding."""
    data, labels, _ = load_signs(settings, seed)
    rows = draw_rows(len(data.test_inputs), settings.samples, seed)
    inputs, signs = prepared(data, data.test_inputs[rows]), as_signs(data.test_labels[rows])
    make = network(data, settings.model, settings.hidden)
    recipe = Recipe(
        epochs=settings.epochs, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay, device=settings.device,
    )  # fmt: skip
    torch.manual_seed(seed)
    values = {"initial": _ratios(settings, make().to(settings.device), inputs, signs, seed)}
    path = checkpoint(settings, folder, settings.model)
    distiller, history = recipe.train(make, data, labels, seed, loss="mse", evaluate=False, checkpoint=path)
    values["trained"] = _ratios(settings, distiller.model, inputs, signs, seed)
    return {**values, "loss": history.last.loss, "accuracy": history.last.accuracy}


def _ratios(settings: Settings, model: nn.Module, inputs: Tensor, signs: Tensor, seed: int) -> dict[str, Any]:
    """The mean ratio at each rate, and the gap after the last eigenvalue counted."""
    with mode_of_look(model, settings.batch_norm):
        space = eigenspace(gram(model, inputs.to(settings.device), outputs="sum"), settings.pairs)
    known = replace(space, gap=float("inf"), angle=0.0)  # the gap is written down, not warned of
    values: dict[str, Any] = {"gap": space.gap}
    for coding in CODINGS:
        sweep = noise_sweep(
            known, signs[:, 0], rates=settings.rates, repeats=settings.repeats, center=coding == "centred", seed=seed
        )
        values[coding] = sweep.mean.tolist()
    return values


def summarise(settings: Settings, seeds: dict[int, dict[str, Any]]) -> Summary:
    """Ratios by rate, and whether they fall."""
    runs = list(seeds.values())
    plain = [run["trained"]["plain"] for run in runs]
    centred = [run["trained"]["centred"] for run in runs]
    low, high = (f"{100 * rate:.0f} %" for rate in (settings.rates[0], settings.rates[-1]))
    claims = [
        above(
            f"The information ratio falls from {low} to {high} flipped labels", [c[0] - c[-1] for c in plain], "", 1.0
        ),
        above(
            f"The ratio falls at every step from {low} to {high} (the smallest fall of each seed)",
            _smallest(plain),
            "",
            1.0,
        ),
        above(
            "It falls so with the labels' mean taken off too (the smallest fall of each seed)",
            _smallest(centred),
            "",
            1.0,
        ),
    ]
    columns = [(state, coding) for state in NETWORKS for coding in CODINGS]
    rows = [
        [f"{100 * rate:.0f} %", *(mean_text([run[s][c][i] for run in runs], digits=2) for s, c in columns)]
        for i, rate in enumerate(settings.rates)
    ]
    headers = ["labels flipped", *(f"{state} network, {CODINGS[coding]}" for state, coding in columns)]
    gaps = ", ".join(f"{s} {100 * min(run[s]['gap'] for run in runs):.0f} %" for s in NETWORKS)
    title = (
        f"Share of the labels' norm in the top {settings.pairs} eigenvectors of the kernel on {settings.samples} test "
        f"samples; the smallest gap after them: {gaps}"
    )
    first, last = (mean_and_deviation([curve[at] for curve in plain])[0] for at in (0, -1))
    holds = None if any(claim.holds is None for claim in claims) else all(claim.holds for claim in claims)
    verdict = {
        True: ", falling at every step as in the paper's figure",
        False: "; that it falls at every step, as in the paper's figure, is not shown",
        None: "",
    }
    reading = (
        f"The trained network's kernel holds {first:.2f} of the norm of clean labels in its top {settings.pairs} "
        f"eigenvectors, and {last:.2f} of labels of which {high} are flipped{verdict[holds]}. Labels drawn at random "
        f"would hold about {chance(settings):.2f}. The paper prints a curve and no numbers. The classes are unequal, "
        "so the constant vector makes part of the plain ratio; taking the mean off removes it."
    )
    return Summary(reading, claims, [(title, headers, rows)], lambda: _figure(settings, runs))


def chance(settings: Settings) -> float:
    """√(k/n): what a random direction holds in k of n dimensions."""
    return math.sqrt(settings.pairs / settings.samples)


def _smallest(curves: list[list[float]]) -> list[float]:
    """Each curve's smallest fall from one entry to the next."""
    return [min(a - b for a, b in pairwise(curve)) for curve in curves]


def _figure(settings: Settings, runs: list[dict[str, Any]]) -> Any:
    panels = []
    for coding, name in CODINGS.items():
        curves = [plots.Curve(s, color, [run[s][coding] for run in runs]) for s, color in NETWORKS.items()]
        xs = [100 * rate for rate in settings.rates]
        panels.append(
            plots.Panel(
                f"Information ratio, {name}", curves, level=chance(settings), level_name="a random vector",
                x_name="labels flipped (%)", xs=xs, deviation=True, percent=False,
            )
        )  # fmt: skip
    return plots.comparison(
        "Corrupted labels hold less of what a network learns first",
        f"{settings.model} on {settings.dataset} {set(settings.positive)}; mean ± standard deviation of {len(runs)} "
        "seeds",
        panels,
    )


EXPERIMENT = Experiment(
    title="The information in noisy labels",
    source="Dong et al. 2019, Figure 2",
    question="How much of the labels lies in the directions that a network learns first, and what does noise do to it?",
    presets={"small": Settings(), "paper": PAPER},
    run_seed=run_seed,
    summarise=summarise,
    unstated=(
        "whether the network is trained (here both), how labels are coded (here ±1) and centred (here both), what a "
        "corrupted label becomes (here the other sign, of exactly that share), the mode of batch normalisation (here "
        "that of training, where a network has any), and the epochs."
    ),
)
