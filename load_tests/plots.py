"""The figures of a report, each a function that fills one pair of axes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from load_tests.stream import Record
from load_tests.summary import percentile

# Wide enough for a printed column, and its text readable on a phone.
SIZE_INCHES = (7.0, 4.2)
LEGEND_CHARACTERS = 56  # in a row of the legend, as wide as the figure
STYLE: Any = {
    "font.size": 12,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 150,
}
# Okabe and Ito's colours, told apart without red-green vision; the markers by print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"

Series = dict[str, list[Record]]  # answered requests by length class or by run
Rates = dict[str, list[tuple[float, float, float, float]]]  # see `goodput_over_rate`
Usage = dict[str, list[tuple[float, float]]]  # seconds since the start, share of KV blocks


def by_class(records: Sequence[Record]) -> Series:
    """Records by length class, short prompts first."""
    series: Series = {}
    for record in sorted(records, key=lambda record: record.prompt_tokens_asked):
        series.setdefault(record.length_class, []).append(record)
    return series


def draw(plot: Callable[[Axes, Any], None], data: Any) -> bytes:
    """A PNG of ``plot``."""
    with mpl.rc_context(STYLE):
        canvas = Figure(figsize=SIZE_INCHES, layout="constrained")
        plot(canvas.add_subplot(), data)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png")
    return buffer.getvalue()


def ttft(axes: Axes, series: Series) -> None:
    _distribution(axes, series, "ttft_ms", "time to first token (ms)")


def itl(axes: Axes, series: Series) -> None:
    _distribution(axes, series, "itl_ms", "time per output token (ms)")


def _distribution(axes: Axes, series: Series, metric: str, label: str) -> None:
    """The share of requests answered within a time: the further left, the better."""
    for i, (name, records) in enumerate(series.items()):
        values = sorted(v for r in records if (v := getattr(r, metric)) is not None)
        if values:
            shares = [100 * (rank + 1) / len(values) for rank in range(len(values))]
            axes.step(values, shares, where="post", label=name, markevery=[-1], **_style(i))
    axes.set(xlabel=label, ylabel="requests within (%)", ylim=(0, 103), xscale="log")
    _plain_ticks(axes.xaxis)
    _legend(axes, series)


def against_length(axes: Axes, series: Series) -> None:
    """Every request of a run, by length class."""
    for i, (name, records) in enumerate(series.items()):
        points = [(r.prompt_tokens_asked, r.ttft_ms) for r in records if r.ttft_ms is not None]
        lengths, times = zip(*points, strict=True)
        axes.plot(lengths, times, MARKERS[i % 7], color=COLOURS[i % 7], alpha=0.6, label=name)
    _length_axes(axes, "time to first token (ms)")
    _legend(axes, series)


def ttft_by_length(axes: Axes, runs: Series) -> None:
    """Medians of several sweeps over prompt lengths."""
    _medians(axes, runs, lambda record: record.ttft_ms, "median time to first token (ms)")


def decode_by_length(axes: Axes, runs: Series) -> None:
    _medians(axes, runs, lambda record: record.itl_ms, "median time per output token (ms)")


def _medians(
    axes: Axes, runs: Series, metric: Callable[[Record], float | None], label: str
) -> None:
    for i, (name, records) in enumerate(runs.items()):
        values: dict[int, list[float]] = {}
        for record in records:
            if (value := metric(record)) is not None:
                values.setdefault(record.prompt_tokens_asked, []).append(value)
        lengths = sorted(values)
        medians = [percentile(values[length], 0.5) for length in lengths]
        axes.plot(lengths, medians, label=name, **_style(i))
    _length_axes(axes, label)
    _legend(axes, runs)


def _length_axes(axes: Axes, label: str) -> None:
    axes.set(xlabel="prompt (tokens)", ylabel=label, xscale="log", yscale="log")
    _plain_ticks(axes.xaxis, base=2)
    _plain_ticks(axes.yaxis)


def over_time(axes: Axes, series: Series) -> None:
    """Output tokens of the answers that ended in each slice of the run, as a rate."""
    records = [record for each in series.values() for record in each]
    end = max(record.ended or 0.0 for record in records)
    slice_s = max(1.0, end / 60)
    tokens = [0] * (int(end / slice_s) + 1)
    for record in records:
        tokens[int((record.ended or 0.0) / slice_s)] += record.output_tokens or 0
    edges = [i * slice_s for i in range(len(tokens) + 1)]
    axes.stairs([n / slice_s for n in tokens], edges, color=COLOURS[0], lw=2, fill=True, alpha=0.5)
    axes.set(xlabel="time since the start (s)", ylabel="output tokens/s of answers ended")
    axes.set_ylim(bottom=0)


def kv_over_time(axes: Axes, usage: Usage) -> None:
    """Share of KV blocks in use by engine."""
    for i, (name, points) in enumerate(usage.items()):
        times, shares = zip(*points, strict=True)
        percent = [100 * share for share in shares]
        every = max(1, len(points) // 8)
        axes.plot(times, percent, label=name, markevery=every, **_style(i))
    axes.set(xlabel="time since the start (s)", ylabel="KV cache in use (%)")
    axes.set_ylim(bottom=0)
    _legend(axes, usage)


def goodput_over_rate(axes: Axes, rates: Rates) -> None:
    """``rates``: for each label the offered, answered and good requests/s and output tokens/s of
    each run. Good ones met their targets. The grey line is a server that answers all."""
    highest = max(point[0] for points in rates.values() for point in points)
    axes.plot([0, highest], [0, highest], color="0.6", lw=1)
    for i, (name, points) in enumerate(rates.items()):
        offered, answered, good, _ = zip(*points, strict=True)
        axes.plot(offered, answered, ls="--", **_style(i))
        axes.plot(offered, good, label=name, **_style(i))
    _rate_axes(axes, "good requests/s (dashed: answered)")
    _legend(axes, rates)


def throughput_over_rate(axes: Axes, rates: Rates) -> None:
    for i, (name, points) in enumerate(rates.items()):
        axes.plot([p[0] for p in points], [p[3] for p in points], label=name, **_style(i))
    _rate_axes(axes, "output tokens/s")
    _legend(axes, rates)


def _rate_axes(axes: Axes, label: str) -> None:
    axes.set(xlabel="offered rate (requests/s)", ylabel=label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % 7], "marker": MARKERS[number % 7], "lw": 2}


def _legend(axes: Axes, names: Iterable[str]) -> None:
    """Above the plot, where it hides nothing; classes of a sweep are named by their length."""
    names = list(names)
    if names == [""]:
        return
    title = "prompt tokens" if all(name.isdigit() for name in names) else None
    fitting = LEGEND_CHARACTERS // (max(map(len, names)) + 6)
    columns = max(1, min(len(names), fitting))
    axes.legend(title=title, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns)


def _plain_ticks(axis: Axis, base: int = 10) -> None:
    """Ticks of a log axis as plain numbers, few enough not to touch."""
    low, high = axis.get_view_interval()
    tens = (1, 3) if high > 30 * low else (1, 2, 5)
    axis.set_major_locator(LogLocator(base, tens if base == 10 else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())
