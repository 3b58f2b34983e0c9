"""A table and a picture of a verdict.

The picture is three panels below each other with the same rows, the dearest plan first, so that
plans are told apart by their names beside them and not by colour, however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from serve_app.quality.verdict import Row, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTATION = (
    "window 256+64: the last 256 and the first 64 tokens are visible; 1/4 full: every 4th layer "
    "sees all."
)
_MIB = 2**20
# A phone 400 pixels wide leaves 9 point text legible; so does a printed column.
_WIDTH_INCHES = 6.0
_ROW_INCHES = 0.27
_STYLE: Any = {"font.size": 9, "axes.titlesize": 11, "axes.titleweight": "bold", "savefig.dpi": 150}
_STRONGEST_RISE = 0.5  # where the colour of a rise in perplexity ends
_DARK = 0.6  # of a colour scale, from where text on it is white
_WITHIN, _BEYOND, _REFERENCE = "#0072B2", "#c8c8c8", "#555555"


def table(verdict: Verdict, longest: int) -> Table:
    """A row for each plan."""
    reference = verdict.rows[0].name
    shown = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # so that it fits 80 columns
        pad_edge=False,
        title=f"Quality against {reference}, sequences up to {longest:,} tokens",
        title_justify="left",
    )
    shown.add_column("plan", no_wrap=True)
    for name in ("perplexity", "worst rise", "found", "agrees", "KV cache", "decode"):
        shown.add_column(name, justify="right", no_wrap=" " not in name)
    for row in verdict.rows:
        shown.add_row(
            row.name,
            f"{row.perplexity:,.2f}",
            f"{row.worst_rise:+.1%}",
            f"{row.found:.0%}",
            f"{row.agreement:.0%}",
            f"{row.kv_bytes / _MIB:,.1f} MiB",
            f"{row.decode_ms:.1f} ms",
        )
    return shown


def draw(verdict: Verdict, path: Path, model: str) -> None:
    """Write a PNG: codes found, the rise in perplexity, and the KV cache."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = verdict.rows
    panel = _ROW_INCHES * len(rows)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCHES, 3 * panel + 4.6))
        figure.set_layout_engine("constrained", h_pad=0.12)
        figure.suptitle(f"Attention plans for {model}", x=0.01, ha="left", fontsize=12)
        found, rises, cost = figure.subplots(3, 1)
        _draw_found(found, rows)
        _draw_rises(rises, rows)
        _draw_cost(cost, verdict)
        figure.savefig(path)


def _draw_found(axes: Axes, rows: Sequence[Row]) -> None:
    cells = rows[0].cells
    shares = [[100 * cell.found for cell in row.cells] for row in rows]
    image = axes.imshow(shares, vmin=0, vmax=100, cmap="Blues", aspect="auto")
    lengths = sorted({cell.length for cell in cells})
    each = len(cells) // len(lengths)
    for index in range(1, len(lengths)):
        axes.axvline(index * each - 0.5, color="black", linewidth=1)
    axes.set_xticks(
        [(index + 0.5) * each - 0.5 for index in range(len(lengths))],
        [f"{length:,}" for length in lengths],
    )
    axes.set_xlabel("context (up to so many tokens); in each, the fact's depth")
    colours = axes.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    colours.set_ticks([0, 50, 100])
    _name_rows(axes, rows, "Hidden facts found (%)")


def _draw_rises(axes: Axes, rows: Sequence[Row]) -> None:
    """The reference's row has its perplexity, the others how much higher theirs is."""
    full = rows[0]
    shares = [[rise.rise for rise in row.rises] for row in rows]
    axes.imshow(shares, vmin=0, vmax=_STRONGEST_RISE, cmap="Oranges", aspect="auto")
    for y, row in enumerate(rows):
        for x, rise in enumerate(row.rises):
            said = _short(rise.perplexity) if row is full else f"{round(100 * rise.rise):+d}"
            color = "white" if rise.rise > _DARK * _STRONGEST_RISE else "black"
            axes.text(x, y, said, ha="center", va="center", color=color)
    axes.set_xticks(
        range(len(full.rises)), [f"{rise.low:,}-\n{rise.high:,}" for rise in full.rises]
    )
    axes.set_xlabel("distance from the start (tokens)")
    _name_rows(axes, rows, f"Perplexity of {full.name}, and the rise over it (%)")


def _short(number: float) -> str:
    if number >= 10_000:
        return f"{number / 1000:,.0f}k"
    return f"{number:.1f}" if number < 100 else f"{number:,.0f}"


def _draw_cost(axes: Axes, verdict: Verdict) -> None:
    rows = verdict.rows
    for y, row in enumerate(rows):
        within = row.name in verdict.within
        color = _REFERENCE if y == 0 else _WITHIN if within else _BEYOND
        axes.barh(y, row.kv_bytes / _MIB, color=color, height=0.7)
        rise = f"{row.worst_rise:+.0%}, " if y else ""
        best = verdict.recommended is not None and row.name == verdict.recommended.name
        axes.text(
            row.kv_bytes / _MIB,
            y,
            f" {row.decode_ms:.1f} ms; {rise}{row.found:.0%} found{' (best)' if best else ''}",
            va="center",
            weight="bold" if best else "normal",
        )
    axes.set_xlim(0, 2.2 * rows[0].kv_bytes / _MIB)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(
        "KV cache of the longest sequence (MiB)\n"
        "beside it: time of a decoded token; worst rise, facts found"
    )
    _name_rows(axes, rows, f"Cost (blue: within a loss of {verdict.loss:.0%})")


def _name_rows(axes: Axes, rows: Sequence[Row], title: str) -> None:
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_yticks([y + 0.5 for y in range(len(rows) - 1)], minor=True)
    axes.grid(axis="y", which="minor", color="white", linewidth=1)
    axes.tick_params(axis="y", which="minor", length=0)
    axes.set_title(title, loc="left")
