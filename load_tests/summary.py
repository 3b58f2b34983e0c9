"""Figures of a run from its records: the table, the goodput and the verdict. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Protocol

from load_tests.stream import Record

DELAY_SHARE = 0.01  # of TTFT p99 that the schedule delay p99 may reach
DELAY_FLOOR_MS = 5.0  # timers tick in milliseconds and hosts have other work; TTFT includes it
CPU_LIMIT = 0.9  # of one core: the client is one thread
UNACCOUNTED_LIMIT = 0.001
FLOOR_SHARE = 0.1  # of a median TTFT that the client's own part of it may be


class Targets(Protocol):
    """What counts as good service for a length class."""

    @property
    def ttft_target_ms(self) -> float: ...
    @property
    def itl_target_ms(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One length class: counts, milliseconds, and rates per second of the run."""

    length_class: str
    count: int
    ok: int
    failed: int
    refused: dict[int, int]  # refusals by status; a request may be refused, wait and be served
    unfinished: int
    ttft_ms: tuple[float, float, float]  # p50, p95, p99
    itl_ms: tuple[float, float]  # p50, p95
    gap_ms: tuple[float, float]  # p50, p95
    e2e_ms: tuple[float, float]  # p50, p95
    output_tokens_s: float
    good: int | None  # met both targets; None where the class has none
    goodput_s: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the client itself was fit to measure. ``faults`` says why not."""

    faults: tuple[str, ...]
    schedule_delay_p99_ms: float
    allowed_delay_ms: float
    cpu_p95: float
    unaccounted: float

    @property
    def valid(self) -> bool:
        return not self.faults


def percentile(values: Iterable[float], q: float) -> float:
    """The ``q`` quantile (0 to 1), linear between ranks; NaN of nothing."""
    ranked = sorted(values)
    if not ranked:
        return math.nan
    place = q * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def rows(records: Sequence[Record], seconds: float, targets: Mapping[str, Targets]) -> list[Row]:
    """A row for each length class, in the order of ``targets``, then of prompt length; and one for
    all where there are several."""
    by_length = sorted(records, key=lambda record: record.prompt_tokens_asked)
    names = dict.fromkeys([*targets, *(record.length_class for record in by_length)])
    by_class = {n: [r for r in records if r.length_class == n] for n in names}
    made = [_row(n, rs, seconds, targets) for n, rs in by_class.items() if rs]
    return made if len(made) < 2 else [*made, _row("all", records, seconds, targets)]


def _row(
    name: str, records: Sequence[Record], seconds: float, targets: Mapping[str, Targets]
) -> Row:
    ok = [record for record in records if record.outcome == "ok"]
    ttft = [record.ttft_ms for record in ok if record.ttft_ms is not None]
    itl = [record.itl_ms for record in ok if record.itl_ms is not None]
    e2e = [record.e2e_ms for record in ok if record.e2e_ms is not None]
    gaps = sorted(gap for record in ok for gap in record.gaps_ms)
    targeted = all(record.length_class in targets for record in records)
    good = sum(is_good(record, targets[record.length_class]) for record in ok) if targeted else None
    return Row(
        length_class=name,
        count=len(records),
        ok=len(ok),
        failed=sum(record.outcome == "failed" for record in records),
        refused=dict(Counter(status for record in records for status in record.refused)),
        unfinished=sum(record.outcome == "unfinished" for record in records),
        ttft_ms=(percentile(ttft, 0.5), percentile(ttft, 0.95), percentile(ttft, 0.99)),
        itl_ms=(percentile(itl, 0.5), percentile(itl, 0.95)),
        gap_ms=(percentile(gaps, 0.5), percentile(gaps, 0.95)),
        e2e_ms=(percentile(e2e, 0.5), percentile(e2e, 0.95)),
        output_tokens_s=sum(record.output_tokens or 0 for record in ok) / seconds,
        good=good,
        goodput_s=None if good is None else good / seconds,
    )


def is_good(record: Record, targets: Targets) -> bool:
    """Answered within both targets; a one-token answer has no ITL to miss."""
    if record.outcome != "ok" or record.ttft_ms is None or record.ttft_ms > targets.ttft_target_ms:
        return False
    return record.itl_ms is None or record.itl_ms <= targets.itl_target_ms


def verdict(records: Sequence[Record], asked: int, cpu: Sequence[float]) -> Verdict:
    """Judge the client. ``asked`` counts the requests scheduled, ``cpu`` holds its share of one
    core, one sample a second."""
    delays = [1e3 * (r.sent - r.scheduled) for r in records if r.sent is not None]
    delay = percentile(delays, 0.99)
    ttft = percentile((r.ttft_ms for r in records if r.ttft_ms is not None), 0.99)
    allowed = max(DELAY_FLOOR_MS, 0.0 if math.isnan(ttft) else DELAY_SHARE * ttft)
    busy = percentile(cpu, 0.95)
    lost = 1 - sum(record.outcome != "unfinished" for record in records) / max(1, asked)
    faults = []
    if not records:
        faults.append("no request was sent")
    if delay > allowed:
        faults.append(
            f"requests left late: schedule delay p99 {delay:.1f} ms exceeds {allowed:.1f} ms (1 % "
            f"of TTFT p99, at least {DELAY_FLOOR_MS:g} ms)"
        )
    if busy >= CPU_LIMIT:
        faults.append(f"the client's own CPU was full: {busy:.0%} of one core")
    if lost > UNACCOUNTED_LIMIT:
        faults.append(f"{lost:.2%} of the requests have no outcome; 0.1 % may")
    return Verdict(tuple(faults), delay, allowed, busy, lost)


def floor_faults(floor: Mapping[str, float] | None, ttft_p50_ms: float) -> list[str]:
    """Why a client with this floor (`floor.client_floor`) may not compare servers of which the
    faster has a median TTFT of ``ttft_p50_ms``: its own part of both would hide the difference."""
    if floor is None:
        return []
    faults = []
    if floor["failed"]:
        faults.append(
            f"{floor['failed']} of {floor['requests']} requests to the null server failed"
        )
    if floor["ttft_p50_ms"] > FLOOR_SHARE * ttft_p50_ms:
        faults.append(
            f"the client's own part is too large: TTFT p50 {figure(floor['ttft_p50_ms'])} ms of a "
            f"null server exceeds {FLOOR_SHARE:.0%} of {figure(ttft_p50_ms)} ms"
        )
    return faults


def finite(value: Any) -> Any:
    """``value`` as JSON can hold it: dataclasses as objects, NaN as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return finite(asdict(value))
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


COLUMNS = (  # heading, unit
    ("class", ""),
    ("n", ""),
    ("ok", ""),
    ("fail", ""),
    ("429", ""),
    ("503", ""),
    ("lost", ""),
    ("TTFT", "p50 ms"),
    ("TTFT", "p95"),
    ("TTFT", "p99"),
    ("ITL", "p50 ms"),
    ("ITL", "p95"),
    ("gap", "p50 ms"),
    ("gap", "p95"),
    ("e2e", "p50 ms"),
    ("e2e", "p95"),
    ("output", "tok/s"),
    ("goodput", "req/s"),
    ("goodput", "%"),
)


def table(made: Sequence[Row]) -> str:
    """The rows as text, numbers to the right."""
    return columns([*zip(*COLUMNS, strict=True), *(_cells(row) for row in made)], rule_after=2)


def _cells(row: Row) -> tuple[str, ...]:
    share = None if row.good is None else 100 * row.good / row.count
    counts = (row.count, row.ok, row.failed, row.refused.get(429, 0), row.refused.get(503, 0))
    times = (*row.ttft_ms, *row.itl_ms, *row.gap_ms, *row.e2e_ms)
    rates = (row.output_tokens_s, row.goodput_s, share)
    return (
        row.length_class,
        *(str(count) for count in (*counts, row.unfinished)),
        *(figure(value) for value in (*times, *rates)),
    )


def columns(cells: Sequence[Sequence[str]], rule_after: int) -> str:
    """Align ``cells``: the first column left, the others right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for number, row in enumerate(cells):
        if number == rule_after:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join((first, *rest)).rstrip())
    return "\n".join(lines)


def figure(value: float | None) -> str:
    """Three significant figures, and never fewer digits than the whole number has."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
