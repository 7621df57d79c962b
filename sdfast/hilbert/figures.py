"""The path as a table and as a picture."""

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np

from sdfast import plots
from sdfast.hilbert import _arrays

if TYPE_CHECKING:
    from sdfast.hilbert.path import DistillationPath

__all__ = ["dataframe", "plot", "prediction"]


def dataframe(path: "DistillationPath") -> Any:
    """One row a round, and an output where each has its own ε."""
    if importlib.util.find_spec("pandas") is None:
        raise ModuleNotFoundError("pandas is not installed: pip install pandas")
    import pandas

    per_output = not (path.joint or path.single)
    columns = {
        "c": path.c,
        "norm": path.norms,
        "training_error": path.training_error,
        "label_error": path.label_error,
        "degrees_of_freedom": path.degrees_of_freedom,
    }
    rounds, outputs = path.multipliers.shape
    table: dict[str, Any] = {"round": np.repeat(np.arange(1, rounds + 1), outputs)}
    if per_output:
        table["output"] = np.tile(np.arange(outputs), rounds)
    table |= {name: _arrays.to_numpy(values).reshape(-1) for name, values in columns.items()}
    if rounds and path.infeasible is None:
        table["gcv"] = np.repeat(_arrays.to_numpy(path.scores("gcv")), outputs)  # a score is of the whole round
    return pandas.DataFrame(table)


def plot(path: "DistillationPath") -> Any:
    """Bars of B_t for some rounds, then curves over all of them."""
    path.check_has_fits()
    figure = plots.new_figure(12.5, 7.2)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.93, bottom=0.08, wspace=0.28, hspace=0.42)
    grid = figure.add_gridspec(2, 4)
    _bars(figure.add_subplot(grid[0, :]), path)
    rounds = np.arange(1, len(path) + 1)
    curves = {
        "Multiplier c": path.c,
        "Norm of the targets": path.norms,
        "Error on the labels": path.label_error,
        "Degrees of freedom": path.degrees_of_freedom,
    }
    for column, (title, values) in enumerate(curves.items()):
        axes = figure.add_subplot(grid[1, column])
        _style(axes, title, "round")
        axes.plot(rounds, _arrays.to_numpy(values), marker="o", markersize=3, linewidth=1.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if title == "Multiplier c":
            axes.set_yscale("log")
    if path.joint or path.single:
        chosen = int(np.argmin(_arrays.to_numpy(path.scores())))
        errors = _arrays.to_numpy(path.label_error)
        figure.axes[3].plot(rounds[chosen], errors[chosen], "o", ms=11, fillstyle="none", color=plots.VERMILLION)
        figure.axes[3].annotate(
            "least GCV", (rounds[chosen], errors[chosen]), xytext=(-9, 4), textcoords="offset points", ha="right",
            color=plots.VERMILLION, fontsize=9,
        )  # fmt: skip
    return figure


def prediction(scores: Any, errors: Any, chosen: int, measured: Any, name: str, subtitle: str) -> Any:
    """What GCV predicts from the noisy labels beside what the clean test labels say, round by round.

    Args:
        scores: GCV (fits,).
        errors: Standard errors of its difference to the chosen round's.
        chosen: The round it picks.
        measured: What was measured on test data (fits,): larger is better.
        name: Of that measure.
        subtitle: On what data.

    Returns:
        A matplotlib figure.
    """
    figure = plots.new_figure(10, 4.2)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.76, bottom=0.13, wspace=0.2)
    peak = int(np.argmax(measured))
    what = "first help, then hurt" if 0 < peak < len(measured) - 1 else "only help" if peak else "only hurt here"
    figure.text(0.012, 0.93, f"Rounds of self-distillation {what}", fontsize=14, fontweight="bold")
    figure.text(0.012, 0.87, subtitle, fontsize=10, color=plots.GREY)
    left, right = figure.subplots(1, 2)
    rounds = np.arange(1, len(scores) + 1)
    _style(left, "Predicted from the noisy labels alone: GCV", "round")
    left.errorbar(rounds, scores, yerr=errors, color=plots.BLUE, marker="o", markersize=4, capsize=3)
    _style(right, name, "round")
    right.plot(rounds, measured, color=plots.GREEN, marker="o", markersize=4)
    for axes, values in ((left, scores), (right, measured)):
        axes.axvline(chosen, color=plots.VERMILLION, linestyle=(0, (4, 3)), linewidth=1)
        axes.plot(chosen, values[chosen - 1], "o", ms=11, fillstyle="none", color=plots.VERMILLION)
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.annotate(
        "predicted best", (chosen, 1), xycoords=("data", "axes fraction"), xytext=(5, -10), textcoords="offset points",
        color=plots.VERMILLION, fontsize=9,
    )  # fmt: skip
    return figure


def _style(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(below, fontsize=10, color=plots.GREY)
    axes.grid(axis="y", color="#E4E6E9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Any, path: "DistillationPath") -> None:
    """Entries of B_t from the largest eigenvalue down, a group of bars for each of at most five rounds."""
    shown = sorted({int(t) for t in np.linspace(1, len(path), min(5, len(path))).round()})
    rank = min(path.spectrum.rank, 40)
    _style(axes, "What is left of each eigenvector's part of the labels, B", "eigenvector, largest eigenvalue first")
    for place, t in enumerate(shown):
        kept = np.mean(_arrays.to_numpy(path.filter_columns(t)), axis=1)[::-1][:rank]  # of all outputs
        where = np.arange(1, rank + 1) + (place - (len(shown) - 1) / 2) * 0.8 / len(shown)
        lightness = 0.7 * (1 - (place + 1) / len(shown))  # later rounds are darker
        shade = (lightness, 0.45 + 0.7 * lightness, 0.7 + 0.35 * lightness)
        axes.bar(where, kept, width=0.8 / len(shown), color=shade, label=f"round {t}")
    axes.legend(fontsize=9, loc="upper right", framealpha=1, edgecolor="white")
