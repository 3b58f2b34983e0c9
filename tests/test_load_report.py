from __future__ import annotations

import json
import random
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from load_tests import report
from load_tests.stream import Record
from load_tests.summary import finite, rows, verdict


def answered(name: str, tokens: int, ttft: float, at: float) -> Record:
    record = Record(name, at, tokens, "ok", sent=at, ended=at + 1, status=200)
    record.ttft_ms, record.itl_ms, record.e2e_ms, record.output_tokens = ttft, ttft / 20, 900.0, 32
    return record


def some_records(lengths: dict[str, int], slowest: float) -> list[Record]:
    rng = random.Random(0)
    return [
        answered(name, tokens, rng.uniform(0.1, 1) * slowest * tokens / max(lengths.values()), i)
        for name, tokens in lengths.items()
        for i in range(20)
    ]


def write_run(folder: Path, records: list[Record], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    (folder / "requests.jsonl").write_text(lines)
    judged = verdict(records, len(records), [0.1])
    summary = {"host": "http://h", "valid": True, "verdict": judged, "seconds": 9.0}
    summary |= {"classes": rows(records, 9.0, {}), "command": ["locust", "-f", "a<b"], **changes}
    (folder / "summary.json").write_text(json.dumps(finite(summary)))
    return folder


UNITS = ("(ms)", "(s)", "(%)", "(tokens)", "tokens/s")
MIX = some_records({"short": 300, "long": 4000}, slowest=3000)


def test_report_is_one_file_with_its_pictures_inside(tmp_path: Path) -> None:
    page = report.write_report(write_run(tmp_path / "run", MIX))
    text = page.read_text()
    assert text.count('src="data:image/png;base64,') == 4
    assert "src=" not in text.replace('src="data:', "")  # nothing is fetched
    assert "href=" not in text
    assert "<td>short<td>20<td>20" in text
    assert "a&lt;b" in text
    assert '<p class="VALID">' in text
    pictures = sorted(page.parent.glob("*.png"))
    assert [picture.stem for picture in pictures] == ["itl", "length", "time", "ttft"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_an_invalid_run_says_so_at_its_top(tmp_path: Path) -> None:
    faults = {"valid": False, "verdict": {"faults": ["requests left late: 9 ms"]}}
    text = report.write_report(write_run(tmp_path / "run", MIX, **faults)).read_text()
    assert '<p class="INVALID">INVALID: requests left late: 9 ms' in text


def test_a_run_without_an_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no answered request"):
        report.write_report(write_run(tmp_path / "run", [Record("short", 0.0, 9, "failed")]))


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text("")
    with pytest.raises(FileNotFoundError):
        report.write_report(tmp_path)


@pytest.mark.parametrize("plot", [report.ttft, report.itl, report.against_length, report.over_time])
@pytest.mark.parametrize(
    "lengths",
    [
        {"short": 300, "long": 4000},
        {str(n): n for n in (1024, 4096, 16384, 65536, 131072)},
        {"short": 300},
    ],
)
@pytest.mark.parametrize("slowest", [5.0, 90_000.0])
def test_labels_have_units_and_do_not_overlap(
    plot: Any, lengths: dict[str, int], slowest: float
) -> None:
    canvas = Figure(figsize=report.SIZE_INCHES, layout="constrained")
    renderer = FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    plot(axes, report.by_class(some_records(lengths, slowest)))
    renderer.draw()
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        seen = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
        boxes = [tick.label1.get_window_extent().padded(2) for tick in seen]
        assert len(boxes) >= 2
        assert not any(one.overlaps(other) for one, other in pairwise(boxes))
        assert any(
            unit in axis.get_label_text() for unit in ("(ms)", "(s)", "(%)", "(tokens)", "/s")
        )
    if legend := axes.get_legend():
        assert not legend.get_window_extent().overlaps(axes.get_window_extent().padded(-1))
        assert canvas.bbox.containsx(legend.get_window_extent().x1)
