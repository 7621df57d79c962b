"""Pictures: what is drawn is what was given."""

import pytest

pytest.importorskip("matplotlib")

from sdfast import plots
from sdfast.train import EpochRecord, History


def panel(**options):
    curves = [plots.Curve("one", plots.BLUE, [[0.5, 0.6], [0.7, 0.8]]), plots.Curve("two", plots.GREEN, [[0.1, 0.2]])]
    return plots.Panel("Accuracy", curves, **options)


def test_lines_are_means_in_per_cent_and_bands_reach_from_the_smallest_to_the_largest():
    figure = plots.comparison("title", "subtitle", [panel(level=0.64, level_name="right labels")])
    (axes,) = figure.axes
    one, two, level = axes.lines
    assert one.get_ydata().tolist() == pytest.approx([60, 70])
    assert two.get_ydata().tolist() == pytest.approx([10, 20])
    assert level.get_ydata() == pytest.approx([64, 64])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((50, 80))
    written = [text.get_text() for text in axes.texts]
    assert "one\n70.0 %" in written
    assert "right labels" in written


def test_names_of_curves_that_end_together_stand_apart():
    curves = [plots.Curve(name, plots.BLUE, [[0.2, 0.9]]) for name in ("one", "two")]
    (axes,) = plots.comparison("title", "subtitle", [plots.Panel("Accuracy", curves)]).axes
    low, high = axes.get_ylim()
    first, second = sorted(text.xy[1] for text in axes.texts)
    assert second - first >= 0.1 * (high - low)


@pytest.mark.parametrize("panels", [1, 2])
@pytest.mark.parametrize("subtitle", ["short", "long " * 30])
def test_nothing_that_is_written_is_cut_off_or_in_the_next_panel(panels, subtitle):
    names = ("one", "a method with a rather long name")
    curves = [plots.Curve(name, plots.BLUE, [[0.2, 0.5], [0.1, 0.3 + index]]) for index, name in enumerate(names)]
    figure = plots.comparison("title", subtitle, [plots.Panel("Accuracy", curves)] * panels)
    plots.png(figure)  # lays it out
    figure.dpi = 160
    width = figure.bbox.width
    ends = [text.get_window_extent().x1 for axes in figure.axes for text in axes.texts]
    assert max(*ends, *(text.get_window_extent().x1 for text in figure.texts)) <= width
    if panels == 2:
        numbers = min(label.get_window_extent().x0 for label in figure.axes[1].get_yticklabels())
        assert max(text.get_window_extent().x1 for text in figure.axes[0].texts) < numbers


def test_one_epoch_can_be_drawn():
    curves = [plots.Curve("one", plots.BLUE, [[0.5]])]
    assert plots.png(plots.comparison("title", "subtitle", [plots.Panel("Accuracy", curves)])).startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib is not installed: pip install matplotlib"):
        plots.comparison("title", "subtitle", [panel()])


def test_a_runs_picture_says_what_it_shows():
    records = [EpochRecord(n, 1.0 / n, 0.5, 0.75, 0.25, 0.4, 0.6, 0.1, 0.0) for n in (1, 2)]
    figure = plots.training_curves(History(records), "digits, noise", "test")
    assert [text.get_text() for text in figure.texts] == ["digits, noise"]
    _, accuracy, targets = figure.axes
    lines = {line.get_label(): line.get_ydata() for axes in (accuracy, targets) for line in axes.lines}
    assert {name: list(values) for name, values in lines.items()} == {
        "train, labels as given": [50, 50],
        "train, true labels": [75, 75],
        "test": [25, 25],
        "alpha: mean weight of the given label": [0.4, 0.4],
        "agreement: targets led by the given label": [0.6, 0.6],
    }


@pytest.mark.parametrize("alpha", [float("nan"), 1.5, -0.5])
def test_every_alpha_can_be_drawn(alpha):
    figure = plots.training_curves(History([EpochRecord(1, 1.0, 0.5, None, None, alpha, 0.6, 0.1, 0.0)]))
    low, high = figure.axes[2].get_ylim()
    assert alpha != alpha or low <= alpha <= high
