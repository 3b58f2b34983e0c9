from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from load_tests import report
from load_tests.stream import Record
from load_tests.summary import finite, rows, verdict
from tests.records import some_records


def write_run(folder: Path, records: list[Record], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    (folder / "requests.jsonl").write_text(lines)
    judged = verdict(records, len(records), [0.1])
    summary = {"host": "http://h", "valid": True, "verdict": judged, "seconds": 9.0}
    summary |= {
        "kind": "benchmark",
        "offered_requests_s": 2.0,
        "classes": rows(records, 9.0, {}),
        "command": ["locust", "-f", "a<b"],
    }
    summary |= changes
    (folder / "summary.json").write_text(json.dumps(finite(summary)))
    return folder


MIX = some_records({"short": 300, "long": 4000}, slowest=3000)


def test_report_is_one_file_with_its_pictures_inside(tmp_path: Path) -> None:
    page = report.write_report([write_run(tmp_path / "run", MIX)])
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
    text = report.write_report([write_run(tmp_path / "run", MIX, **faults)]).read_text()
    assert '<p class="INVALID">INVALID: requests left late: 9 ms' in text


def test_a_run_without_an_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no answered request"):
        report.write_report([write_run(tmp_path / "run", [Record("short", 0.0, 9, "failed")])])


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text("")
    with pytest.raises(FileNotFoundError):
        report.write_report([tmp_path])


def test_kv_usage_is_drawn_where_the_server_showed_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", MIX)
    lines = [
        {"at": at, "usage": {"short a1": 0.1, "short b2": 0.4, "long c": 0.2}} for at in (1, 2)
    ]
    (run / "kv_usage.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    usage = report.read_run(run).kv_usage
    assert usage == {
        "short 1": [(1, 0.1), (2, 0.1)],
        "short 2": [(1, 0.4), (2, 0.4)],
        "long": [(1, 0.2), (2, 0.2)],
    }
    assert report.fullest(usage) == [(1, 0.4), (2, 0.4)]
    assert (report.write_report([run]).parent / "kv.png").exists()


def test_a_folder_of_runs_is_drawn_over_their_rates(tmp_path: Path) -> None:
    for rate in (4, 1, 2):
        changes = {"offered_requests_s": rate, "label": "ours"}
        write_run(tmp_path / f"rate-{rate}", MIX, **changes)
    page = report.write_report([tmp_path])
    assert page == tmp_path / "report.html"
    assert {each.stem for each in tmp_path.glob("*.png")} == {"goodput", "throughput"}
    assert page.read_text().count("<h3>ours</h3>") == 3
    runs = [report.read_run(each) for each in report.folders(tmp_path)]
    assert [point[0] for point in report.rates_of(runs)["ours"]] == [1, 2, 4]
    assert report.rates_of(runs)["ours"][0][1] == pytest.approx(40 / 9)


def test_sweeps_are_compared_by_their_labels(tmp_path: Path) -> None:
    sweep = some_records({"1024": 1024, "8192": 8192}, slowest=3000)
    runs = [
        write_run(tmp_path / name, sweep, kind="long-context", label=label)
        for name, label in (("a", "full"), ("b", "sliding <512>"))
    ]
    page = report.write_report(runs, tmp_path / "compared")
    assert {each.stem for each in page.parent.glob("*.png")} == {"length", "decode"}
    assert "sliding &lt;512&gt;" in page.read_text()
    assert page.parent == tmp_path / "compared"
