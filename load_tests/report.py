"""Runs as pictures: one HTML file that holds everything, and a PNG of each figure.

    python -m load_tests.report runs/benchmark-20260101-120000
    python -m load_tests.report runs/full runs/sliding --out runs/compared

Reads ``requests.jsonl``, ``summary.json`` and ``kv_usage.jsonl`` of one run or of several, which
are then compared: sweeps over prompt lengths by their labels, benchmarks over their rates. A folder
of runs stands for all of them. Writes ``report.html`` and the PNGs into ``--out``, by default the
first folder.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from load_tests import plots
from load_tests.plots import Rates, Series, Usage, by_class, draw
from load_tests.stream import Record
from load_tests.summary import figure

Figures = dict[str, tuple[str, bytes]]  # file name without its end: title and PNG


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of runs.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders that load tests wrote")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the first)")
    chosen = parser.parse_args()
    print(write_report(chosen.runs, chosen.out))


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What a load test left in its folder."""

    directory: Path
    summary: dict[str, Any]
    records: list[Record]
    kv_usage: Usage

    @property
    def label(self) -> str:
        return self.summary.get("label") or ""

    @property
    def name(self) -> str:
        return self.label or self.directory.name

    @property
    def answered(self) -> list[Record]:
        return [record for record in self.records if record.outcome == "ok"]


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Draw the figures of ``runs``; returns the HTML file.

    Raises:
        FileNotFoundError: a folder holds no finished run.
        ValueError: no request of a run was answered.
    """
    finished = [read_run(each) for path in runs for each in folders(path)]
    for run in finished:
        if not run.answered:
            raise ValueError(f"{run.directory} holds no answered request: there is nothing to draw")
    figures = of_one(finished[0]) if len(finished) == 1 else of_several(finished)
    out = out or runs[0]
    out.mkdir(parents=True, exist_ok=True)
    for name, (_, png) in figures.items():
        (out / f"{name}.png").write_bytes(png)
    page = out / "report.html"
    page.write_text(render(finished, figures))
    return page


def folders(path: Path) -> list[Path]:
    """The runs that ``path`` holds, or itself if it is one."""
    if (path / "summary.json").exists():
        return [path]
    found = sorted(each.parent for each in path.glob("*/summary.json"))
    return found or [path]  # whose reading says what is missing


def read_run(path: Path) -> FinishedRun:
    summary = json.loads((path / "summary.json").read_text())
    usage: Usage = {}
    if (path / "kv_usage.jsonl").exists():
        for line in map(json.loads, (path / "kv_usage.jsonl").read_text().splitlines()):
            for name, share in line["usage"].items():
                usage.setdefault(name, []).append((line["at"], share))
    return FinishedRun(path, summary, read_records(path / "requests.jsonl"), short_names(usage))


def short_names(usage: Usage) -> Usage:
    """Engines by their pool, numbered where it has several: replicas have long names."""
    pools = [name.partition(" ")[0] for name in usage]
    made: Usage = {}
    for pool, points in zip(pools, usage.values(), strict=True):
        number = sum(name.partition(" ")[0] == pool for name in made) + 1
        made[f"{pool} {number}" if pools.count(pool) > 1 else pool] = points
    return made


def read_records(path: Path) -> list[Record]:
    """The records of a ``requests.jsonl``; keys that this version does not know are left out."""
    known = {field.name for field in fields(Record)}
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [Record(**{key: line[key] for key in known & line.keys()}) for line in lines]


def of_one(run: FinishedRun) -> Figures:
    """A run by length class, by length and over time."""
    series = by_class(run.answered)
    drawn = {
        "ttft": ("Time to first token, by length class", draw(plots.ttft, series)),
        "itl": ("Time for each further token, by length class", draw(plots.itl, series)),
        "length": ("Time to first token against prompt length", draw(plots.against_length, series)),
        "time": ("Throughput over time", draw(plots.over_time, series)),
    }
    if run.kv_usage:
        drawn["kv"] = ("KV cache in use", draw(plots.kv_over_time, run.kv_usage))
    return drawn


def of_several(runs: Sequence[FinishedRun]) -> Figures:
    """Sweeps over lengths beside each other, and benchmarks over their rates."""
    drawn: Figures = {}
    if sweeps := [run for run in runs if run.summary.get("kind") == "long-context"]:
        series: Series = {}
        for run in sweeps:
            series.setdefault(run.name, []).extend(run.answered)
        drawn["length"] = (
            "Time to first token against prompt length",
            draw(plots.ttft_by_length, series),
        )
        drawn["decode"] = (
            "Time for each further token against prompt length",
            draw(plots.decode_by_length, series),
        )
    if rates := rates_of([run for run in runs if run.summary.get("kind") == "benchmark"]):
        drawn["goodput"] = ("Goodput over rate", draw(plots.goodput_over_rate, rates))
        drawn["throughput"] = ("Throughput over rate", draw(plots.throughput_over_rate, rates))
    names = [run.name for run in runs]
    if usage := {
        run.name if names.count(run.name) == 1 else run.directory.name: fullest(run.kv_usage)
        for run in runs
        if run.kv_usage
    }:
        title = "KV cache in use, the fullest engine of each run"
        drawn["kv"] = (title, draw(plots.kv_over_time, usage))
    return drawn


def fullest(usage: Usage) -> list[tuple[float, float]]:
    """The highest share of any engine at each time."""
    at: dict[float, float] = {}
    for points in usage.values():
        for time, share in points:
            at[time] = max(share, at.get(time, 0.0))
    return sorted(at.items())


def rates_of(runs: Sequence[FinishedRun]) -> Rates:
    """Offered, answered and good requests/s and output tokens/s of each run, by label."""
    rates: Rates = {}
    for run in sorted(runs, key=lambda run: float(run.summary["offered_requests_s"])):
        total, seconds = run.summary["classes"][-1], run.summary["seconds"]
        answered, good = total["ok"] / seconds, total["goodput_s"] or 0.0
        point = (run.summary["offered_requests_s"], answered, good, total["output_tokens_s"])
        rates.setdefault(run.label, []).append(point)
    return rates


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Load test of {title}</title>
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem;
   margin: 1rem auto; padding: 0 1rem }}
 img {{ max-width: 100%; height: auto }}  figure {{ margin: 2rem 0; break-inside: avoid }}
 .wide {{ overflow-x: auto }}  table {{ border-collapse: collapse; white-space: nowrap }}
 th, td {{ padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ccc }}
 th:first-child, td:first-child {{ text-align: left }}  code {{ white-space: pre-wrap }}
 .facts td {{ text-align: left; white-space: normal; vertical-align: top }}
 .VALID {{ color: #06603a }}  .INVALID {{ color: #a30000; font-weight: bold }}
</style>
<h1>Load test of {title}</h1>
{runs}
{figures}
<h2>How it was made</h2>
{facts}
</html>
"""
FACTS = {
    "started_at": "started",
    "seconds": "seconds",
    "offered_requests_s": "offered requests/s",
    "command": "command",
    "host": "server",
    "machine": "machine",
    "versions": "versions",
    "commit": "commit",
    "floor": "client's floor",
}


def render(runs: Sequence[FinishedRun], figures: Figures) -> str:
    """The page, with its pictures inside it."""
    hosts = dict.fromkeys(run.summary["host"] for run in runs)
    return PAGE.format(
        title=html.escape(" and ".join(hosts)),
        runs="\n".join(_result(run, alone=len(runs) == 1) for run in runs),
        figures="\n".join(_picture(title, png) for title, png in figures.values()),
        facts="\n".join(_facts(run, alone=len(runs) == 1) for run in runs),
    )


def _result(run: FinishedRun, *, alone: bool) -> str:
    """A run's verdict and its table."""
    faults = run.summary["verdict"]["faults"]
    verdict = "VALID" if run.summary["valid"] else "INVALID"
    heading = "" if alone else f"<h2>{html.escape(run.name)}</h2>"
    says = html.escape(": " + "; ".join(faults) if faults else "")
    table = _table(run.summary["classes"])
    return f'{heading}<p class="{verdict}">{verdict}{says}</p>\n<div class="wide">{table}</div>'


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


def _facts(run: FinishedRun, *, alone: bool) -> str:
    title = "" if alone else f"<h3>{html.escape(run.name)}</h3>"
    lines = (
        f"<tr><td>{heading}<td><code>{_fact(run.summary.get(name))}</code>"
        for name, heading in FACTS.items()
    )
    return f'{title}<table class="facts">{"".join(lines)}</table>'


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{key} {_rounded(each)}," for key, each in value.items()]
    text = " ".join(map(str, value)).removesuffix(",") if isinstance(value, list) else value
    return html.escape(str(_rounded(text)))


def _rounded(value: Any) -> Any:
    return figure(value) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
