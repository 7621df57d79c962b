"""The demo's panels on the kernel: what the network could learn, how noise hides it, what its own beliefs add."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdfast import plots, report
from sdfast.data import Dataset, NoisyLabels
from sdfast.ntk import eigenspace, figures, gram, information_ratio, retrieval
from sdfast.train import InformationProbe

SAMPLES = 128
TOP = 10  # as many as there are classes


class Watched(NamedTuple):
    """A training run seen through its kernel.

    Attributes:
        results: For results.json.
        matrix: The kernel at the end (SAMPLES, SAMPLES).
        labels: The true labels of its samples.
    """

    results: dict[str, Any]
    matrix: Tensor
    labels: Tensor


def watch(data: Dataset, noisy: NoisyLabels, train: Callable[[InformationProbe], torch.nn.Module]) -> Watched:
    """Trains with a probe on the first samples, then takes the trained network's kernel on them apart.

    Args:
        data: The probe's samples are the first of its training part.
        noisy: The labels that are trained on.
        train: The run, given the probe as its callback; it returns the network.

    Returns:
        What was seen.
    """
    inputs, labels = data.train_inputs[:SAMPLES], data.train_labels[:SAMPLES]
    probe = InformationProbe(inputs, noisy.labels[:SAMPLES], clean_labels=labels, k=TOP)
    model = train(probe)
    matrix = gram(model.eval(), inputs, outputs="mean")
    space = eigenspace(matrix, TOP)
    targets = retrieval.coded(labels, data.num_classes)
    sweep = retrieval.sweep(space, targets, retrieval.RATES, retrieval.REPEATS, center=False)
    results = {
        "samples": SAMPLES,
        "eigenvalues": torch.linalg.eigvalsh(matrix.double()).flip(0).tolist(),
        "eigenspace": retrieval.space_results(space),
        "information_ratio": float(information_ratio(space, targets, joint=True)),
        "noise_sweep": retrieval.sweep_results(sweep),
        "probe": [record._asdict() for record in probe.records],
    }
    return Watched(results, matrix, labels)


def draw(watched: Watched) -> dict[str, Any]:
    """The figures by file name."""
    results = watched.results
    where = f"NTK of {results['samples']} training samples after self-distillation"
    return {
        "heatmap.png": figures.heat_map(watched.matrix, watched.labels, f"{where}, by true label", size=11),
        "spectrum.png": figures.spectrum(torch.tensor(results["eigenvalues"]), where),
        "information.png": _information(results),
    }


def _information(results: dict[str, Any]) -> Any:
    """The ratio over flipped labels, and ratios and gain over the epochs."""
    records, k = results["probe"], results["eigenspace"]["k"]
    curves = {
        "given": ("as given", plots.ORANGE),
        "refined": ("refined", plots.VERMILLION),
        "clean": ("true", plots.GREEN),
    }
    ratios = [plots.Curve(name, color, [[r[column] for r in records]]) for column, (name, color) in curves.items()]
    gain = [plots.Curve("gain", plots.BLUE, [[record["gain"] for record in records]])]
    epochs = [record["call"] for record in records]
    return plots.comparison(
        f"Information ratio: what labels hold of the top {k} eigenvectors of the tangent kernel",
        f"{results['samples']} training samples; refined: half the given label, half the network's own hard prediction",
        [
            figures.sweep_panel(results["noise_sweep"], k),
            plots.Panel("Ratio along training", ratios, xs=epochs, percent=False),
            plots.Panel("Gain along training: refined less given", gain, xs=epochs, percent=False, level=0.0),
        ],
    )


def table(results: dict[str, Any]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Headers and rows: the probe at some epochs."""
    records = results["probe"]
    places = sorted({round(step * (len(records) - 1) / 4) for step in range(5)})
    rows = [
        (str(r["call"]), f"{r['given']:.3f}", f"{r['clean']:.3f}", f"{r['refined']:.3f}", f"{r['gain']:+.3f}")
        for r in (records[place] for place in places)
    ]
    return ("epoch", "labels as given", "true labels", "refined labels", "gain"), rows


def reading(results: dict[str, Any]) -> str:
    """What the numbers are, in a sentence or two."""
    gains = [record["gain"] for record in results["probe"]]
    sweep = results["noise_sweep"]
    return (
        f"The gain is 0 or more in {sum(gain >= 0 for gain in gains)} of {len(gains)} epochs. In the trained network's "
        f"kernel the true labels have a ratio of {sweep['mean'][0]:.2f}, and {sweep['mean'][-1]:.2f} where "
        f"{100 * sweep['rates'][-1]:.0f} % of them are flipped."
    )


def section(results: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The part of the page."""
    content = [
        report.picture(pictures[name], description)
        for name, description in (
            ("information.png", reading(results)),
            ("heatmap.png", "Cosines between the gradients of the samples, in the order of their true labels"),
            ("spectrum.png", "Eigenvalues of the kernel, and their share of its trace"),
        )
        if name in pictures
    ]
    content += [
        report.text(
            "The information ratio is the share of the labels within the top eigenspace of the network's tangent "
            "kernel, which gradient descent learns first; the gain is what mixing in the network's own predictions "
            "adds."
        ),
        report.table(*table(results)),
        report.text(f"{reading(results)} The same for any network by sdfast ntk --topk --noise-sweep."),
    ]
    return report.section("What the network can learn", *content)
