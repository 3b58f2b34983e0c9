"""Every figure, over many scales: its axes have units and nothing in it overlaps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from load_tests import plots
from tests.records import some_records

UNITS = ("(ms)", "(s)", "(%)", "(tokens)", "(requests/s)", "tokens/s", "requests/s")


def assert_readable(plot: Any, data: Any) -> Axes:
    """Draw, and look at labels, ticks and legend."""
    canvas = Figure(figsize=plots.SIZE_INCHES, layout="constrained")
    renderer = FigureCanvasAgg(canvas)
    axes: Axes = canvas.add_subplot()
    plot(axes, data)
    renderer.draw()
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        seen = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
        boxes = [tick.label1.get_window_extent().padded(2) for tick in seen]
        assert len(boxes) >= 2
        assert not any(one.overlaps(other) for one, other in pairwise(boxes))
        assert any(unit in axis.get_label_text() for unit in UNITS)
    if legend := axes.get_legend():
        box = legend.get_window_extent()
        assert not box.overlaps(axes.get_window_extent().padded(-1))
        assert canvas.bbox.containsx(box.x0)
        assert canvas.bbox.containsx(box.x1)
    return axes


@pytest.mark.parametrize("plot", [plots.ttft, plots.itl, plots.against_length, plots.over_time])
@pytest.mark.parametrize(
    "lengths",
    [
        {"short": 300, "long": 4000},
        {str(n): n for n in (1024, 4096, 16384, 65536, 131072)},
        {"short": 300},
    ],
)
@pytest.mark.parametrize("slowest", [5.0, 90_000.0])
def test_figures_of_a_run_are_readable(plot: Any, lengths: dict[str, int], slowest: float) -> None:
    assert_readable(plot, plots.by_class(some_records(lengths, slowest)))


@pytest.mark.parametrize("plot", [plots.ttft_by_length, plots.decode_by_length])
@pytest.mark.parametrize("slowest", [5.0, 90_000.0])
def test_sweeps_beside_each_other_are_readable(plot: Any, slowest: float) -> None:
    names = ("full", "sliding 2048", "chunked 2048, every 4th full", "sinks 64 + window 1984")
    sweep = some_records({str(2**n): 2**n for n in range(13, 18)}, slowest)
    axes = assert_readable(plot, dict.fromkeys(names, sweep))
    assert [line.get_label() for line in axes.get_lines()] == list(names)
    assert all(len(line.get_xdata()) == 5 for line in axes.get_lines())


@pytest.mark.parametrize("plot", [plots.goodput_over_rate, plots.throughput_over_rate])
@pytest.mark.parametrize("names", [("",), ("Serve's default router", "length-aware router")])
@pytest.mark.parametrize("scale", [0.1, 50.0])
def test_rates_are_readable(plot: Any, names: tuple[str, ...], scale: float) -> None:
    points = [(scale * n, scale * min(n, 5), scale * min(n, 4), 900 * scale) for n in range(1, 8)]
    assert_readable(plot, dict.fromkeys(names, points))


def test_goodput_lies_at_or_below_what_was_answered() -> None:
    axes = assert_readable(plots.goodput_over_rate, {"": [(1, 1, 1, 9), (2, 2, 1.5, 9)]})
    _, answered_line, good_line = axes.get_lines()
    assert list(answered_line.get_ydata()) == [1, 2]
    assert list(good_line.get_ydata()) == [1, 1.5]


@pytest.mark.parametrize("engines", [1, 6])
def test_kv_usage_is_readable_in_percent(engines: int) -> None:
    points = [(float(at), 0.01 * at) for at in range(60)]
    axes = assert_readable(plots.kv_over_time, {f"short {n}": points for n in range(engines)})
    assert max(axes.get_lines()[0].get_ydata()) == pytest.approx(59)
