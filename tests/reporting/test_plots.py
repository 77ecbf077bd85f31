from __future__ import annotations

import dataclasses
import math

import matplotlib as mpl
import numpy as np
import pytest
from reporting_example import comparison

from lossmith.reporting import Curve, write_plots
from lossmith.reporting.curves import Line, arm_curves, band, frame, points, thinned
from lossmith.reporting.palette import strokes
from lossmith.reporting.plots import difference_figure, loss_figure


def test_three_plots_are_written_with_the_same_bytes_each_time(tmp_path):
    first = write_plots(comparison(), tmp_path / "a")
    again = write_plots(comparison(), tmp_path / "b")
    assert [path.name for path in first] == ["loss-by-tokens.png", "loss-by-seconds.png", "differences.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in first)
    assert len(list((tmp_path / "a").iterdir())) == 3  # no temporary file


def test_drawing_leaves_the_global_state_of_matplotlib_alone(tmp_path):
    before, backend = dict(mpl.rcParams), mpl.get_backend()
    write_plots(comparison(), tmp_path)
    assert dict(mpl.rcParams) == before
    assert mpl.get_backend() == backend


@pytest.mark.parametrize("arms", [("one",), tuple(f"arm {i}" for i in range(12)), ("_x", "$a$", "<b>", "日本\n")])
@pytest.mark.parametrize("seeds", [1, 2])
def test_one_arm_twelve_arms_and_odd_names_can_be_drawn(tmp_path, arms, seeds):
    written = write_plots(comparison(arms=arms, seeds=seeds), tmp_path)
    assert len(written) == (2 if len(arms) == 1 else 3)


def test_plots_without_data_are_not_written(tmp_path):
    given = comparison()
    runs = tuple(dataclasses.replace(r, train=Curve(), evaluation=Curve(), error="x") for r in given.runs)
    assert write_plots(dataclasses.replace(given, runs=runs), tmp_path) == []
    no_evaluation = tuple(dataclasses.replace(r, evaluation=Curve()) for r in given.runs)
    figure = loss_figure(dataclasses.replace(given, runs=no_evaluation), "tokens")
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["Training"]


def test_the_drawn_mean_is_the_mean_over_seeds():
    given = comparison(arms=("base", "new"), seeds=3)
    figure = loss_figure(given, "tokens")
    assert figure is not None
    thick = [line for line in figure.axes[0].lines if line.get_linewidth() == 2]
    expected = np.mean([run.evaluation.values for run in given.runs if run.arm == "new"], axis=0)
    np.testing.assert_allclose(thick[1].get_ydata(), expected, rtol=1e-12)


def test_the_drawn_intervals_are_those_of_the_table():
    from lossmith.reporting import summarise

    given = comparison()
    figure = difference_figure(given)
    assert figure is not None
    drawn = [line.get_xdata() for line in figure.axes[0].lines if line.get_linewidth() == 2.4]
    for ends, arm in zip(drawn, summarise(given).arms[1:], strict=True):
        assert arm.primary.difference is not None
        assert tuple(ends) == (arm.primary.difference.low, arm.primary.difference.high)


def test_failed_runs_are_drawn_but_not_averaged():
    given = comparison(arms=("base", "new"), seeds=2)
    runs = (*given.runs[:3], dataclasses.replace(given.runs[3], error="NaN at step 3"))
    new = arm_curves(dataclasses.replace(given, runs=runs), "evaluation", "tokens")[1]
    assert [line.finished for line in new.lines] == [True, False]
    assert new.band is not None
    np.testing.assert_array_equal(new.band.mean, given.runs[2].evaluation.values)


def test_non_finite_points_are_left_out_and_order_is_restored():
    curve = Curve((1, 2, 3, 4), (40, 20, 30, 10), (), (1.0, math.nan, math.inf, 4.0))
    x, y = points(curve, "tokens")
    assert (x.tolist(), y.tolist()) == ([10.0, 40.0], [4.0, 1.0])
    assert len(points(curve, "seconds")[0]) == 0
    with pytest.raises(ValueError, match="equal lengths"):
        points(Curve((1,), (1,), (1.0,), (1.0, 2.0)), "tokens")


def test_long_curves_are_thinned_to_group_means_that_keep_the_overall_mean_and_the_end():
    x = np.arange(10_001.0)
    y = np.sin(x)
    short_x, short_y = thinned(x, y)
    assert len(short_x) == 400
    assert (short_x[-1], short_y[-1]) == (x[-1], y[-1])
    assert short_y[:-1].mean() == pytest.approx(y[:-1].mean(), abs=1e-3)


def test_seeds_measured_at_other_points_are_interpolated_within_their_common_range():
    lines = [
        Line(0, True, np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 4.0])),
        Line(1, True, np.array([1.0, 3.0]), np.array([3.0, 5.0])),
    ]
    found = band(lines)
    assert found is not None
    assert found.x.tolist() == [1.0, 2.0, 3.0]
    assert found.mean.tolist() == pytest.approx([2.0, 3.0, 4.0], rel=1e-15)  # (x + (x + 2)) / 2
    assert (found.low.tolist(), found.high.tolist()) == ([1.0, 2.0, 3.0], [3.0, 4.0, 5.0])
    assert band([]) is None


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_huge_constant_and_single_points_have_a_frame():
    given = comparison(arms=("base", "new"), seeds=1)
    for values in ((1e300, 1e300), (2.0, 2.0), (0.0, 0.0), (-1e308, 1e308)):
        curve = Curve((1, 2), (10, 20), (1.0, 2.0), values)
        runs = tuple(dataclasses.replace(run, evaluation=curve, train=Curve()) for run in given.runs)
        changed = dataclasses.replace(given, runs=runs)
        limits = frame(arm_curves(changed, "evaluation", "tokens"))
        assert limits is None or limits[0] < limits[1]
        assert loss_figure(changed, "tokens") is not None


def test_twelve_arms_have_twelve_strokes():
    given = comparison(arms=tuple(f"arm {i}" for i in range(12)), seeds=1)
    assert len(set(strokes(given).values())) == 12
