"""A Gram matrix as pictures: its spectrum, its entries by label, and what its top eigenspace holds of noisy labels."""

from typing import Any

import torch
from torch import Tensor

from sdfast import plots

LARGEST = 1000  # rows of a heat map: more would not be seen


def spectrum(values: Tensor, title: str) -> Any:
    """Eigenvalues from the largest down, and the share of the trace that the first k make up.

    Args:
        values: Eigenvalues, the largest first.
        title: Of the picture.

    Returns:
        A matplotlib figure.
    """
    figure = plots.new_figure(11, 4.2)
    figure.subplots_adjust(left=0.075, right=0.985, top=0.8, bottom=0.13, wspace=0.2)
    figure.text(0.012, 0.93, title, fontsize=13, fontweight="bold", color="#202124")
    left, right = figure.subplots(1, 2)
    ranks = torch.arange(1, len(values) + 1)
    positive = values > 0
    _style(left, "Eigenvalues", "rank")
    left.loglog(ranks[positive], values[positive], color=plots.BLUE, marker=".", markersize=4, linewidth=1)
    _style(right, "Share of the trace in the first k (%)", "k")
    share = 100 * values.cumsum(0) / values.sum()
    right.semilogx(ranks, share, color=plots.VERMILLION, linewidth=2)
    right.set_ylim(0, 102)
    return figure


def noise_sweep(results: dict[str, Any], k: int, subtitle: str) -> Any:
    """The information ratio against the share of flipped labels.

    Args:
        results: Of `retrieval.sweep_results`.
        k: Pairs of the eigenspace.
        subtitle: Of which kernel.

    Returns:
        A matplotlib figure.
    """
    return plots.comparison("Information ratio of flipped labels", subtitle, [sweep_panel(results, k)])


def sweep_panel(results: dict[str, Any], k: int) -> plots.Panel:
    """The panel of it, for a picture of several."""
    runs = list(zip(*results["ratios"], strict=True))  # (repeats, rates)
    return plots.Panel(
        f"Share of the labels in the top {k}, ± standard deviation",
        [plots.Curve("labels", plots.BLUE, runs)],
        x_name="labels flipped (%)",
        xs=[100 * rate for rate in results["rates"]],
        deviation=True,
        percent=False,
    )


def heat_map(gram: Tensor, labels: Tensor | None, title: str, size: float = 13) -> Any:
    """Cosines between gradients, H_ij / √(H_ii H_jj), samples in the order of their labels.

    Args:
        gram: (n, n).
        labels: (n,) classes, or ``None`` to keep the order.
        title: Of the picture.
        size: Of its letters.

    Returns:
        A matplotlib figure.
    """
    order = torch.arange(len(gram)) if labels is None else torch.argsort(labels, stable=True)
    order = order[:: -(-len(order) // LARGEST)]
    scale = gram.diagonal().clamp(min=0).sqrt()
    cosines = (gram / torch.outer(scale, scale)).nan_to_num(0)[order][:, order]
    figure = plots.new_figure(6.4, 6)
    figure.subplots_adjust(left=0.06, right=0.87, top=0.88, bottom=0.06)
    figure.text(0.02, 0.95, title, fontsize=size, fontweight="bold", color="#202124")
    axes = figure.add_subplot()
    image = axes.imshow(cosines.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    if labels is not None:
        classes, counts = torch.unique(labels[order], return_counts=True)
        middles = counts.cumsum(0) - counts / 2 - 0.5
        for ticks, names in ((axes.set_xticks, axes.set_xticklabels), (axes.set_yticks, axes.set_yticklabels)):
            ticks(middles.tolist())
            names([str(label) for label in classes.tolist()])
    axes.tick_params(colors=plots.GREY, length=0)
    return figure


def _style(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(below, fontsize=10, color=plots.GREY)
    axes.grid(color="#E4E6E9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
