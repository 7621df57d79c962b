"""Table 1 of Dong et al. 2019: methods against the share of redrawn labels."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from sdfast import _files, plots
from sdfast.baselines import TwoNetworks, make_method
from sdfast.data import Dataset
from sdfast.data.images import evaluation_batches
from sdfast.experiments.claims import Claim, above
from sdfast.experiments.experiment import Common, Experiment, Summary
from sdfast.experiments.task import checkpoint, load_task, network, points
from sdfast.train.recipe import Recipe
from sdfast.train.records import mean_and_deviation
from sdfast.train.self_distiller import SelfDistiller

PLAIN, BOOTSTRAP, OURS = "cross-entropy", "bootstrap-hard", "self-distillation"
WORDS = {PLAIN: "cross entropy", BOOTSTRAP: "bootstrapping"}
METHODS = (PLAIN, BOOTSTRAP, "co-teaching", "d2l", "gce", "selc", "elr", "bank-self-distillation", OURS)
RATES = (0.0, 0.2, 0.4, 0.6, 0.8)
OVERFITS_FROM = 0.4
LOST = 0.05  # from the best epoch to the last: less is no overfitting

# Test accuracy (%) after the last epoch, by rate; None where nothing is printed. The paper's own Table 1, which took
# all rows but its own from elsewhere, and of MentorNet (DD, ResNet-101) the table of its authors' repository.
PUBLISHED: dict[str, dict[str, tuple[float | None, ...]]] = {
    "cifar10": {
        "co-teaching": (90.12, 86.19, 80.87, None, None),
        "d2l": (91.29, 86.64, 73.12, None, None),
        "gce": (None, 89.7, 87.62, 82.70, 67.92),
        OURS: (94.31, 93.75, 90.82, 86.72, 73.91),
        "WAT": (91.88, 89.12, 84.55, None, None),
        "MentorNet": (None, 91.4, 88.7, None, 46.3),
    },
    "fashion_mnist": {
        "co-teaching": (94.28, 91.24, 86.83, None, None),
        "d2l": (94.47, 89.12, 78.98, None, None),
        "gce": (None, 93.21, 92.60, 91.56, 88.33),
        OURS: (95.21, 94.58, 93.78, 92.63, 89.21),
        "WAT": (94.70, 93.37, 90.41, None, None),
    },
}
RIVALS = ("co-teaching", "d2l", "gce")  # of the paper's table

COLORS = {
    PLAIN: plots.VERMILLION, BOOTSTRAP: plots.ORANGE, "co-teaching": plots.ORANGE, "d2l": plots.GREY,
    "gce": plots.GREEN, "selc": plots.GREY, "elr": plots.GREEN, "bank-self-distillation": "#CC79A7", OURS: plots.BLUE,
}  # fmt: skip
PANELS = {
    "Test accuracy, last epoch: the paper's methods": (PLAIN, *RIVALS, OURS),
    "Test accuracy, last epoch: others": (PLAIN, BOOTSTRAP, "selc", "elr", "bank-self-distillation", OURS),
}


@dataclass(frozen=True)
class Settings(Common):
    """Settings of the table.

    Attributes:
        dataset: Name for `load_dataset`.
        model: Name for `make_model`.
        hidden: Widths of an ``mlp``.
        epochs: Of each training.
        batch_size: Rows in a step.
        learning_rate: At the start; it falls by a cosine.
        weight_decay: Of SGD.
        noises: Probabilities with which a label is redrawn over all classes.
        ratios: λ of 1 − α = λ · batch accuracy at each of them: the paper's for CIFAR-10. Its for Fashion-MNIST are
            0.6, 1, 1, 1.4, 1.6.
        methods: Names in `sdfast.baselines.METHODS`, each at its defaults but for λ, and for Co-teaching's share of
            wrong labels, which it is told.
        cnn_seeds: How many seeds also train ``small_cnn`` on the digits as pictures.
        cnn_noise: With this noise.
        cnn_epochs: Of those.
        checkpoints: Write one after every epoch.
    """

    dataset: str = "digits"
    model: str = "mlp"
    hidden: tuple[int, ...] = (256, 256)
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 0.0
    noises: tuple[float, ...] = RATES
    ratios: tuple[float, ...] = (1.0, 1.0, 1.0, 1.5, 1.5)
    methods: tuple[str, ...] = METHODS
    cnn_seeds: int = 2
    cnn_noise: float = 0.4
    cnn_epochs: int = 30
    checkpoints: bool = False


PAPER = Settings(
    seeds=3, jobs=1, dataset="cifar10", model="shake_shake26_32", epochs=600, learning_rate=0.2, weight_decay=1e-4,
    cnn_seeds=0, checkpoints=True,
)  # fmt: skip


class _Cells:
    """The trainings of a seed that are done, in a file: what a seed that was cut short goes on from."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "cells.json"
        self.values = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def put(self, name: str, value: dict[str, float]) -> None:
        self.values[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _files.write_text(self.path, json.dumps(self.values) + "\n")


def run_seed(settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """Every method at every noise rate, on one draw of split, noise, weights and order."""
    if len(settings.ratios) != len(settings.noises):
        raise ValueError(f"ratios: got {len(settings.ratios)}, wanted one for each of {len(settings.noises)} noises")
    cells = _Cells(folder)
    values = {
        str(noise): _row(settings, seed, folder, cells, settings.methods, (noise, ratio))
        for noise, ratio in zip(settings.noises, settings.ratios, strict=True)
    }
    if seed < settings.cnn_seeds:
        ratio = dict(zip(settings.noises, settings.ratios, strict=True)).get(settings.cnn_noise, 1.0)
        values["cnn"] = _row(settings, seed, folder, cells, (PLAIN, OURS), (settings.cnn_noise, ratio), cnn=True)
    return values


def _row(
    settings: Settings, seed: int, folder: Path, cells: _Cells, methods: tuple[str, ...], rule: tuple[float, float],
    cnn: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What methods reach at one noise rate."""
    noise, ratio = rule
    data, labels = load_task(settings, seed, noise, "digit_pictures" if cnn else None)
    for name in methods:
        cell = f"{'cnn-' if cnn else ''}{noise:g}-{name}"
        if cell not in cells.values:
            path = checkpoint(settings, folder, cell)
            cells.put(cell, _train(settings, name, ratio, data, labels, seed, cnn, path))
    wrong = float((labels != data.train_labels).double().mean())
    done = {name: cells.values[f"{'cnn-' if cnn else ''}{noise:g}-{name}"] for name in methods}
    return {"wrong_labels": wrong, **done}


def _train(
    settings: Settings, name: str, ratio: float, data: Dataset, labels: Tensor, seed: int, cnn: bool, path: str | None
) -> dict[str, float]:
    """One training: its last epoch's test accuracy, its best, and which epoch that was."""
    options: dict[str, Any] = {"ratio": ratio} if name in (OURS, "bank-self-distillation") else {}
    if name == "co-teaching":  # must be told how many labels are wrong; nobody else is
        options = {"forget_rate": round(float((labels != data.train_labels).double().mean()), 4)}
    epochs = settings.cnn_epochs if cnn else settings.epochs
    recipe = Recipe(
        epochs=epochs, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay, device=settings.device,
    )  # fmt: skip
    make = network(data, "small_cnn") if cnn else network(data, settings.model, settings.hidden)
    torch.manual_seed(seed)
    model = TwoNetworks(make(), make()) if name == "co-teaching" else make()
    model = model.to(settings.device)
    optimizer = recipe.optimizer(model)
    method = make_method(name, labels, data.num_classes, **options)
    scheduler = CosineAnnealingLR(optimizer, epochs)
    distiller = SelfDistiller(model, optimizer, method=method, scheduler=scheduler, device=settings.device)
    history = distiller.fit(
        recipe.batches(data, labels, seed),
        epochs,
        eval=evaluation_batches(data, device=settings.device),
        checkpoint=path,
        progress=False,
    )
    best = history.best
    return {"last": history["eval_accuracy"][-1], "best": best.eval_accuracy or 0.0, "best_epoch": best.epoch}


def summarise(settings: Settings, seeds: dict[int, dict[str, Any]]) -> Summary:
    """Accuracies after the last epoch, the drop from the best, and the paper's numbers beside them."""
    runs = list(seeds.values())
    noisy = [noise for noise in settings.noises if noise]
    claims = [claim for noise in noisy for claim in _claims(settings, runs, noise)]
    published = PUBLISHED.get(settings.dataset, PUBLISHED["cifar10"])
    where = "Fashion-MNIST" if published is PUBLISHED["fashion_mnist"] else "CIFAR-10"
    headers = ["method", *(f"{100 * noise:.0f} % redrawn" for noise in settings.noises)]
    tables: list[Any] = [
        (
            f"Test accuracy (%) on {settings.dataset} after the last epoch, mean ± standard deviation of {len(runs)} "
            "seeds; in brackets that of the best epoch, which only the test data know",
            headers,
            [[name, *(_cell(runs, noise, name) for noise in settings.noises)] for name in settings.methods],
        ),
        (
            "Points of test accuracy lost from the best epoch to the last",
            headers,
            [[m, *(points(_lost(runs, noise, m)) for noise in settings.noises)] for m in settings.methods],
        ),
        (
            f"The paper's numbers on {where} / ours on {settings.dataset}. WAT and MentorNet are shown as published, "
            "not run; MentorNet is not in the paper's table, its figures are those of its authors' repository",
            headers,
            [
                [name, *(_beside(settings, runs, published, noise, name) for noise in settings.noises)]
                for name in dict.fromkeys([*settings.methods, *published])
            ],
        ),
    ]
    cnn = [run["cnn"] for run in runs if "cnn" in run]
    if cnn:
        rows = [[m, points([r[m]["last"] for r in cnn]), points([r[m]["best"] for r in cnn])] for m in (PLAIN, OURS)]
        title = (
            f"small_cnn on the digits as pictures, {100 * settings.cnn_noise:.0f} % redrawn, {settings.cnn_epochs} "
            f"epochs, {len(cnn)} seeds"
        )
        tables.append((title, ["method", "last epoch (%)", "best epoch (%)"], rows))
    return Summary(_reading(settings, runs, claims, published), claims, tables, lambda: _figure(settings, runs))


def _last(runs: list[dict[str, Any]], noise: float, method: str) -> list[float]:
    return [run[str(noise)][method]["last"] for run in runs]


def _lost(runs: list[dict[str, Any]], noise: float, method: str) -> list[float]:
    return [run[str(noise)][method]["best"] - run[str(noise)][method]["last"] for run in runs]


def _mean(values: list[float]) -> float:
    return mean_and_deviation(values)[0]


def _cell(runs: list[dict[str, Any]], noise: float, method: str) -> str:
    best = _mean([run[str(noise)][method]["best"] for run in runs])
    return f"{points(_last(runs, noise, method))} ({100 * best:.1f})"


def _beside(settings: Settings, runs: list[dict[str, Any]], published: dict, noise: float, name: str) -> str:
    printed = _printed(published, noise, name)
    ours = f"{100 * _mean(_last(runs, noise, name)):.1f}" if name in settings.methods else "not run"
    return f"{'–' if printed is None else printed} / {ours}"


def _printed(published: dict, noise: float, name: str) -> float | None:
    return published[name][RATES.index(noise)] if name in published and noise in RATES else None


def _claims(settings: Settings, runs: list[dict[str, Any]], noise: float) -> list[Claim]:
    """What the paper says at a noise rate above 0, as far as the methods are there."""
    at, found = f"With {100 * noise:.0f} % of the labels redrawn", []
    for rival, name in WORDS.items():
        if {rival, OURS} <= set(settings.methods):
            pairs = zip(_last(runs, noise, OURS), _last(runs, noise, rival), strict=True)
            text = f"{at}, self-distillation ends with a higher test accuracy than {name}"
            found.append(above(text, [own - other for own, other in pairs]))
    if noise >= OVERFITS_FROM and {PLAIN, OURS} <= set(settings.methods):
        plain, ours = _lost(runs, noise, PLAIN), _lost(runs, noise, OURS)
        text = f"{at}, cross entropy overfits: its last epoch is more than {100 * LOST:.0f} points below its best"
        found.append(above(text, [drop - LOST for drop in plain], f"points beyond those {100 * LOST:.0f}"))
        text = f"{at}, self-distillation loses less than half as much from its best epoch to its last"
        halves = [one / 2 - other for one, other in zip(plain, ours, strict=True)]
        found.append(above(text, halves, "points below half"))
    return found


def _reading(settings: Settings, runs: list[dict[str, Any]], claims: list[Claim], published: dict) -> str:
    sentences = []
    for name in WORDS.values():
        verdicts = [claim.holds for claim in claims if claim.text.endswith(f"higher test accuracy than {name}")]
        if verdicts and None not in verdicts:
            above_it = f"{sum(map(bool, verdicts))} of {len(verdicts)} rates of noise"
            sentences.append(f"self-distillation ends above {name} at {above_it}")
    shown = [noise for noise in settings.noises if noise >= OVERFITS_FROM]
    if shown and {PLAIN, OURS} <= set(settings.methods):
        drops = {m: ", ".join(f"{100 * _mean(_lost(runs, noise, m)):.1f}" for noise in shown) for m in (PLAIN, OURS)}
        rates = ", ".join(f"{100 * noise:.0f}" for noise in shown)
        sentences.append(
            f"from its best epoch to its last, cross entropy loses {drops[PLAIN]} points at {rates} % noise, "
            f"self-distillation {drops[OURS]}"
        )
    if OURS in settings.methods:
        sentences += [_as_in_the_paper(settings, runs, published), _others(settings, runs)]
    text = ". ".join(sentence[0].upper() + sentence[1:] for sentence in sentences if sentence)
    return f"{text}. The accuracies themselves compare only at the paper preset, which has its data and its network."


def _as_in_the_paper(settings: Settings, runs: list[dict[str, Any]], published: dict) -> str:
    """In which of the paper's comparisons its order is ours, by the means."""
    same, other = 0, []
    for name in (name for name in RIVALS if name in settings.methods):
        for noise in settings.noises:
            theirs, own = _printed(published, noise, name), _printed(published, noise, OURS)
            if theirs is None or own is None:
                continue
            if (own > theirs) == (_mean(_last(runs, noise, OURS)) > _mean(_last(runs, noise, name))):
                same += 1
            else:
                other.append(f"{name} at {100 * noise:.0f} %")
    if not same and not other:
        return ""
    but = f"; not against {', '.join(other)}" if other else ""
    return (
        f"the paper puts self-distillation above Co-teaching, D2L and GCE wherever it prints both; by the means, so do "
        f"we in {same} of {same + len(other)} of these comparisons{but}"
    )


def _others(settings: Settings, runs: list[dict[str, Any]]) -> str:
    """Who ends above self-distillation, among the methods that the paper's table lacks."""
    parts = []
    noisy = [noise for noise in settings.noises if noise]
    for name in ("selc", "elr", "bank-self-distillation"):
        if name in settings.methods and noisy:
            ahead = sum(_mean(_last(runs, n, name)) > _mean(_last(runs, n, OURS)) for n in noisy)
            parts.append(f"{name} at {ahead}")
    if not parts:
        return ""
    return (
        f"of the methods that the paper does not have, above it end {', '.join(parts)} of {len(noisy)} rates of noise"
    )


def _figure(settings: Settings, runs: list[dict[str, Any]]) -> Any:
    panels = []
    for title, names in PANELS.items():
        shown = [name for name in names if name in settings.methods]
        curves = [
            plots.Curve(name, COLORS[name], [[run[str(n)][name]["last"] for n in settings.noises] for run in runs])
            for name in shown
        ]
        if curves:
            percent = [100 * noise for noise in settings.noises]
            panels.append(plots.Panel(title, curves, x_name="% of labels redrawn", xs=percent, deviation=True))
    subtitle = f"{settings.model} on {settings.dataset}; mean ± standard deviation of {len(runs)} seeds"
    return plots.comparison("Learning from wrong labels, method by method", subtitle, panels)


EXPERIMENT = Experiment(
    title="Methods against noise",
    source="Dong et al. 2019, Table 1",
    question=(
        "How much test accuracy does each way of learning keep when more and more training labels are wrong? "
        "Bootstrapping (bootstrap-hard) mixes labels and predictions in fixed parts; in Co-teaching two networks "
        "show each other the samples that they find easy; D2L leaves the labels for predictions once the network's "
        "features grow complex; GCE is a loss that pulls less at what is hard to fit; SELC and ELR hold on to earlier "
        "predictions; bank-self-distillation mixes labels with the mean of a sample's past predictions."
    ),
    presets={"small": Settings(), "paper": PAPER},
    run_seed=run_seed,
    summarise=summarise,
    unstated=(
        "which label function made its table (here: hardmax), whether λ times the accuracy may exceed 1 (here it is "
        "cut off), whether a redrawn label may stay (here it may: fewer are wrong than redrawn), and its epochs "
        "for Fashion-MNIST. Its other rows are quoted from elsewhere, on other networks. Here every method has the "
        "same network, and its own paper's options."
    ),
)
