"""Pictures of training runs, as PNG files. Needs matplotlib; nothing else in the package does."""

import importlib.util
import io
import math
import os
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sdfast import _files

if TYPE_CHECKING:
    from sdfast.train.history import History
    from sdfast.train.information_probe import ProbeRecord

# Okabe and Ito's colours, told apart by every kind of eye.
VERMILLION, BLUE, GREEN, ORANGE, GREY = "#D55E00", "#0072B2", "#009E73", "#E69F00", "#5F6368"


FEW = 16  # points of a curve, of which each is drawn as such


class Curve(NamedTuple):
    """One method over the epochs, or whatever the panel's horizontal axis is.

    Attributes:
        name: As the picture shows it.
        color: Of the line and its band.
        runs: (runs, epochs) values; the line is their mean, the band their smallest to largest, or what the panel says.
    """

    name: str
    color: str
    runs: Sequence[Sequence[float]]


class Panel(NamedTuple):
    """One pair of axes.

    Attributes:
        title: What is seen.
        curves: Drawn in this order, each named at its end.
        level: A horizontal line to compare with, or ``None``.
        level_name: What that line is.
        x_name: What the horizontal axis is.
        xs: Its values; ``None`` counts from 1.
        deviation: The band is mean ± standard deviation, not smallest to largest.
        percent: The values are fractions, shown in per cent; otherwise they are shown as they are.
        log_x: The horizontal axis is logarithmic.
    """

    title: str
    curves: Sequence[Curve]
    level: float | None = None
    level_name: str = ""
    x_name: str = "epoch"
    xs: Sequence[float] | None = None
    deviation: bool = False
    percent: bool = True
    log_x: bool = False

    @property
    def scale(self) -> float:
        """From a value to what is drawn."""
        return 100.0 if self.percent else 1.0


def why_not() -> str | None:
    """Why no picture can be drawn here, or ``None`` where one can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed: pip install matplotlib"
    return None


def save(figure: Any, path: str | os.PathLike) -> None:
    """Writes a figure as a PNG that is whole or not there."""
    _files.write_atomically(path, lambda file: file.write(png(figure)))


def png(figure: Any) -> bytes:
    """The bytes of a figure's PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def comparison(title: str, subtitle: str, panels: Sequence[Panel]) -> Any:
    """Curves over the epochs or anything else, panels side by side.

    Args:
        title: Of the whole picture: what it shows.
        subtitle: On what, in smaller print.
        panels: From left to right.

    Returns:
        A matplotlib figure.
    """
    figure = new_figure(5.8 * len(panels), 4.4)
    heads = [
        figure.text(0.0, 0.935, title, fontsize=14, fontweight="bold", color="#202124"),
        figure.text(0.0, 0.875, subtitle, fontsize=10, color=GREY),
    ]
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel)
    _make_room(figure, heads)
    return figure


def _make_room(figure: Any, heads: Sequence[Any]) -> None:
    """As wide a figure as the names at the curves' ends, and the heads, need."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()

    def inches(text: Any) -> float:
        return text.get_window_extent(renderer).width / figure.dpi

    count, axis, numbers, edge = len(figure.axes), 3.55, 0.75, 0.15
    room = edge + max((inches(text) for axes in figure.axes for text in axes.texts), default=0.0)
    width = max(count * (numbers + axis + room), 2 * edge + max(map(inches, heads)))
    axis = width / count - numbers - room
    figure.set_size_inches(width, figure.get_figheight())
    for text in heads:
        text.set_x(edge / width)
    figure.subplots_adjust(
        left=numbers / width, right=1 - room / width, top=0.765, bottom=0.125, wspace=(numbers + room) / axis
    )


def training_curves(history: "History", subtitle: str = "", eval_name: str = "evaluation") -> Any:
    """Loss, accuracies and the targets of one run over its epochs.

    Args:
        history: Of the run.
        subtitle: What was trained on what; ``""`` for none.
        eval_name: What the evaluation data are, for the legend.

    Returns:
        A matplotlib figure.
    """
    figure = new_figure(13, 4.2)
    figure.subplots_adjust(left=0.045, right=0.985, top=0.83, bottom=0.12, wspace=0.2)
    figure.text(0.012, 0.94, subtitle, fontsize=11, color=GREY)
    loss, accuracy, targets = figure.subplots(1, 3)
    epochs = history["epoch"]
    marker = "o" if len(history) == 1 else None  # a line of one point is no line
    _style(loss, "Training loss")
    loss.plot(epochs, history["loss"], color=BLUE, marker=marker)
    _style(accuracy, "Accuracy (%)")
    names = {
        "accuracy": ("train, labels as given", ORANGE),
        "clean_accuracy": ("train, true labels", GREEN),
        "eval_accuracy": (eval_name, BLUE),
    }
    for column, (name, color) in names.items():
        values = [math.nan if value is None else 100 * value for value in history[column]]
        if not all(map(math.isnan, values)):
            accuracy.plot(epochs, values, color=color, label=name, marker=marker)
    accuracy.legend(frameon=False, fontsize=9)
    _style(targets, "How far the targets follow the given labels")
    weight = history["alpha"]
    targets.plot(epochs, weight, color=VERMILLION, label="alpha: mean weight of the given label", marker=marker)
    name = "agreement: targets led by the given label"
    targets.plot(epochs, history["agreement"], color=GREY, linestyle="--", label=name, marker=marker)
    finite = [value for value in weight if math.isfinite(value)]
    targets.set_ylim(min([-0.03, *finite]), max([1.2, *finite]))  # room for the legend, and for an α outside [0, 1]
    targets.legend(frameon=False, fontsize=9, loc="upper right")
    return figure


def information_curves(records: "Sequence[ProbeRecord]") -> Any:
    """The information ratios of a run and the gain, look by look.

    Args:
        records: Of an `InformationProbe`.

    Returns:
        A matplotlib figure.
    """
    figure = new_figure(10.5, 4.0)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.88, bottom=0.13, wspace=0.18)
    ratios, gains = figure.subplots(1, 2)
    calls = [record.call for record in records]
    marker = "o" if len(records) == 1 else None
    _style(ratios, "Information ratio of the labels")
    curves = {"given": ("as given", ORANGE), "refined": ("refined", VERMILLION), "clean": ("true", GREEN)}
    for column, (name, color) in curves.items():
        values = [getattr(record, column) for record in records]
        if None not in values:
            ratios.plot(calls, values, color=color, label=name, marker=marker)
    ratios.legend(frameon=False, fontsize=9)
    _style(gains, "Information gain: refined less given")
    gains.axhline(0, color=GREY, linewidth=1)
    gains.plot(calls, [record.gain for record in records], color=BLUE, marker=marker)
    for axes in (ratios, gains):
        axes.set_xlabel("call of the probe", fontsize=10, color=GREY)
    return figure


def new_figure(width: float, height: float) -> Any:
    """An empty white figure, in inches."""
    if (reason := why_not()) is not None:
        raise ModuleNotFoundError(reason)
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    return Figure(figsize=(width, height), facecolor="white")


def _draw_panel(axes: Any, panel: Panel) -> None:
    _style(axes, panel.title, panel.x_name)
    for curve in panel.curves:
        columns = [[panel.scale * value for value in column] for column in zip(*curve.runs, strict=True)]
        xs = range(1, len(columns) + 1) if panel.xs is None else panel.xs
        means = [sum(column) / len(column) for column in columns]
        low, high = [*map(min, columns)], [*map(max, columns)]
        if panel.deviation:
            spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
            low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=curve.color, alpha=0.2, linewidth=0)
        axes.plot(xs, means, color=curve.color, linewidth=2, marker="o" if len(columns) < FEW else None, markersize=4)
    last = max((len(run) for curve in panel.curves for run in curve.runs), default=1)
    if panel.xs is None:
        axes.set_xlim(0, max(last, 2))
    if panel.log_x:
        axes.set_xscale("log")
    if panel.xs is not None and len(panel.xs) < FEW:
        axes.minorticks_off()
        axes.set_xticks(list(panel.xs), [f"{x:g}" for x in panel.xs])
    if panel.percent:
        axes.set_ylim(_lower_end(panel), 101.5)
        axes.yaxis.set_major_formatter("{x:.0f} %")
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if panel.level is not None:
        axes.axhline(panel.scale * panel.level, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
        axes.annotate(
            panel.level_name,
            (1, panel.scale * panel.level),
            xycoords=("axes fraction", "data"),
            xytext=(-4, -14),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9,
            color=GREY,
        )
    _label_curves(axes, panel)


def _lower_end(panel: Panel) -> float:
    """The bottom of the axis: the later curves fill it, the first of many epochs may leave it."""
    runs = [run for curve in panel.curves for run in curve.runs]
    later = [100 * value for run in runs for value in run[4 if len(run) >= FEW else 0 :]]
    levels = [] if panel.level is None else [100 * panel.level]
    low = min((value for value in later + levels if math.isfinite(value)), default=0.0)
    return max(0.0, 10 * math.floor((low - 4) / 10))


def _label_curves(axes: Any, panel: Panel) -> None:
    """Each curve's name and last value stand where it ends, moved apart where they would meet."""
    low, high = axes.get_ylim()
    gap = 0.13 * (high - low)
    ends = sorted((panel.scale * sum(run[-1] for run in curve.runs) / len(curve.runs), curve) for curve in panel.curves)
    height = -math.inf
    for value, curve in ends:
        height = max(value, height + gap, low)
        axes.annotate(
            f"{curve.name}\n{value:.1f} %" if panel.percent else f"{curve.name}\n{value:.3g}",
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=curve.color,
            fontsize=10,
            fontweight="bold",
        )


def _style(axes: Any, title: str, x_name: str = "epoch") -> None:
    axes.set_title(title, fontsize=11, loc="left", color="#202124")
    axes.set_xlabel(x_name, fontsize=10, color=GREY)
    axes.grid(axis="y", color="#E4E6E9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#BDC1C6")
