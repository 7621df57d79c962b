"""Pictures: what is drawn is what was given."""

import pytest

pytest.importorskip("matplotlib")

from sdfast import plots


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


def test_one_epoch_can_be_drawn():
    curves = [plots.Curve("one", plots.BLUE, [[0.5]])]
    assert plots.png(plots.comparison("title", "subtitle", [plots.Panel("Accuracy", curves)])).startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib is not installed: pip install 'sdfast\[plot\]'"):
        plots.comparison("title", "subtitle", [panel()])
