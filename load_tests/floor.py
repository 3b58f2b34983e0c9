"""The client's own floor: the run's first seconds sent again, to a server that takes no time."""

from __future__ import annotations

from collections.abc import Sequence

from load_tests.drive import open_loop
from load_tests.null_server import null_server
from load_tests.stream import Ask, Record
from load_tests.summary import figure, percentile

Floor = dict[str, float | int]

MOST_ITL_MS = 50.0  # a slow engine's pace would keep the replay open for minutes


def client_floor(
    sent: Sequence[tuple[float, Ask]], records: Sequence[Record], seconds: float
) -> Floor | None:
    """What the client measures of a server without any TTFT, at the arrivals of the run's first
    ``seconds`` (``sent``: when and what) and the pace of its streams; None if nothing was sent."""
    asks = [(at, ask) for at, ask in sent if at < seconds]
    if not asks:
        return None
    paces = [record.itl_ms for record in records if record.itl_ms is not None]
    pace = min(MOST_ITL_MS, percentile(paces, 0.5)) if paces else 0.0
    with null_server("--itl-ms", f"{pace:.3f}") as host:
        replayed = open_loop(host, asks, {})
    ttft = [record.ttft_ms for record in replayed if record.ttft_ms is not None]
    itl_error = [record.itl_ms - pace for record in replayed if record.itl_ms is not None]
    return {
        "requests": len(replayed),
        "failed": sum(record.outcome != "ok" for record in replayed),
        "ttft_p50_ms": percentile(ttft, 0.5),
        "ttft_p99_ms": percentile(ttft, 0.99),
        "itl_error_p50_ms": percentile(itl_error, 0.5),
    }


def floor_line(floor: Floor | None) -> str:
    """The floor in one line."""
    if floor is None:
        return "client floor: not measured"
    return (
        f"client floor at this rate, null server ({floor['requests']} requests): TTFT p50 "
        f"{figure(floor['ttft_p50_ms'])} ms, p99 {figure(floor['ttft_p99_ms'])} ms; ITL off by "
        f"{figure(floor['itl_error_p50_ms'])} ms"
    )
