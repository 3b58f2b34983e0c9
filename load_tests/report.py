"""A run as pictures: one HTML file that holds everything, and a PNG of each figure.

    python -m load_tests.report runs/benchmark-20260101-120000

Reads ``requests.jsonl`` and ``summary.json``; writes ``report.html`` and the PNGs beside them.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from load_tests.stream import Record
from load_tests.summary import figure

# Wide enough for a printed column, and its text readable on a phone.
SIZE_INCHES = (7.0, 4.2)
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

Series = dict[str, list[Record]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of a run.")
    parser.add_argument("run", type=Path, help="the folder that a load test wrote")
    print(write_report(parser.parse_args().run))


def write_report(run: Path) -> Path:
    """Draw ``run``'s figures; returns the HTML file.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: no request of it was answered.
    """
    records = read_records(run / "requests.jsonl")
    summary = json.loads((run / "summary.json").read_text())
    series = by_class([record for record in records if record.outcome == "ok"])
    if not series:
        raise ValueError(f"{run} holds no answered request: there is nothing to draw")
    figures = {
        "ttft": ("Time to first token, by length class", draw(ttft, series)),
        "itl": ("Time for each further token, by length class", draw(itl, series)),
        "length": ("Time to first token against prompt length", draw(against_length, series)),
        "time": ("Throughput over time", draw(over_time, series)),
    }
    for name, (_, png) in figures.items():
        (run / f"{name}.png").write_bytes(png)
    page = run / "report.html"
    page.write_text(render(summary, list(figures.values())))
    return page


def read_records(path: Path) -> list[Record]:
    """The records of a ``requests.jsonl``; keys that this version does not know are left out."""
    known = {field.name for field in fields(Record)}
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [Record(**{key: line[key] for key in known & line.keys()}) for line in lines]


def by_class(records: Sequence[Record]) -> Series:
    """Records by length class, short prompts first."""
    series: Series = {}
    for record in sorted(records, key=lambda record: record.prompt_tokens_asked):
        series.setdefault(record.length_class, []).append(record)
    return series


def draw(plot: Callable[[Axes, Series], None], series: Series) -> bytes:
    """A PNG of ``plot``."""
    with mpl.rc_context(STYLE):
        canvas = Figure(figsize=SIZE_INCHES, layout="constrained")
        plot(canvas.add_subplot(), series)
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
            style: Any = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markevery": [-1]}
            axes.step(values, shares, where="post", lw=2, label=name, **style)
    axes.set(xlabel=label, ylabel="requests within (%)", ylim=(0, 103), xscale="log")
    _plain_ticks(axes.xaxis)
    _legend(axes, series)


def against_length(axes: Axes, series: Series) -> None:
    for i, (name, records) in enumerate(series.items()):
        points = [(r.prompt_tokens_asked, r.ttft_ms) for r in records if r.ttft_ms is not None]
        lengths, times = zip(*points, strict=True)
        axes.plot(lengths, times, MARKERS[i % 7], color=COLOURS[i % 7], alpha=0.6, label=name)
    axes.set(xlabel="prompt (tokens)", ylabel="time to first token (ms)")
    axes.set(xscale="log", yscale="log")
    _plain_ticks(axes.xaxis, base=2)
    _plain_ticks(axes.yaxis)
    _legend(axes, series)


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


def _legend(axes: Axes, series: Series) -> None:
    """Above the plot, where it hides nothing; classes of a sweep are named by their length."""
    title = "prompt tokens" if all(name.isdigit() for name in series) else None
    columns = min(len(series), 5)
    axes.legend(title=title, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns)


def _plain_ticks(axis: Axis, base: int = 10) -> None:
    """Ticks of a log axis as plain numbers, few enough not to touch."""
    low, high = axis.get_view_interval()
    tens = (1, 3) if high > 30 * low else (1, 2, 5)
    axis.set_major_locator(LogLocator(base, tens if base == 10 else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Load test of {host}</title>
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem;
   margin: 1rem auto; padding: 0 1rem }}
 img {{ max-width: 100%; height: auto }}  figure {{ margin: 2rem 0; break-inside: avoid }}
 .wide {{ overflow-x: auto }}  table {{ border-collapse: collapse; white-space: nowrap }}
 th, td {{ padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ccc }}
 th:first-child, td:first-child {{ text-align: left }}  code {{ overflow-wrap: anywhere }}
 .VALID {{ color: #06603a }}  .INVALID {{ color: #a30000; font-weight: bold }}
</style>
<h1>Load test of {host}</h1>
<p class="{verdict}">{verdict}{faults}</p>
<div class="wide">{table}</div>
{figures}
<h2>How it was made</h2>
{facts}
</html>
"""
FACTS = ("started_at", "seconds", "command", "machine", "python", "locust", "commit", "floor")


def render(summary: dict[str, Any], figures: Sequence[tuple[str, bytes]]) -> str:
    """The page, with its pictures inside it."""
    faults = summary["verdict"]["faults"]
    return PAGE.format(
        host=html.escape(summary["host"]),
        verdict="VALID" if summary["valid"] else "INVALID",
        faults=html.escape(": " + "; ".join(faults) if faults else ""),
        table=_table(summary["classes"]),
        figures="\n".join(_picture(title, png) for title, png in figures),
        facts=_facts({name: summary.get(name) for name in FACTS}),
    )


HEADINGS = (
    *("class", "requests", "ok", "failed", "refused", "lost"),
    *("TTFT p50 ms", "p95", "p99", "ITL p50 ms", "p95", "e2e p50 ms", "p95"),
    *("output tok/s", "goodput req/s"),
)


def _table(classes: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th>{heading}" for heading in HEADINGS)
    rows = (
        (
            html.escape(row["length_class"]),
            *(str(row[name]) for name in ("count", "ok", "failed")),
            str(sum(row["refused"].values())),
            str(row["unfinished"]),
            *(figure(value) for value in (*row["ttft_ms"], *row["itl_ms"], *row["e2e_ms"])),
            figure(row["output_tokens_s"]),
            figure(row["goodput_s"]),
        )
        for row in classes
    )
    body = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _picture(title: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{data}"></figure>'
    )


def _facts(facts: dict[str, Any]) -> str:
    lines = (f"<tr><td>{name}<td><code>{_fact(value)}</code>" for name, value in facts.items())
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _fact(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else value
    return html.escape(str(text))


if __name__ == "__main__":
    main()
