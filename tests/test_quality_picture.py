"""The table and the picture of a verdict."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.image import imread
from rich.console import Console

from serve_app.quality.grid import make_grid
from serve_app.quality.picture import draw, table
from serve_app.quality.verdict import judge
from tests.test_quality_verdict import RESULTS, result, verdict


def test_the_table_has_a_line_for_each_plan() -> None:
    output = io.StringIO()
    Console(width=80, file=output).print(table(verdict(), 1024))
    text = output.getvalue()
    assert all(name in text for name in RESULTS)
    assert "+22.1%" in text
    assert "sequences up to 1,024 tokens" in text


def test_the_picture_grows_with_its_plans_and_keeps_its_width(tmp_path: Path) -> None:
    plans = make_grid(
        windows=[256, 512, 1024, 2048],
        chunks=[],
        sinks=[0, 64],
        full_every=[0, 4],
        longest=4096,
        layers=8,
    ).plans
    results = {name: result((1.0, 1.5), (True, False, True, False), 7) for name in plans}
    many = judge(
        plans, results, dict.fromkeys(plans, 2**30), loss=0.05, longest=4096, vocabulary=264
    )
    draw(verdict(), tmp_path / "three.png", "small")
    draw(many, tmp_path / "seventeen.png", "large")
    three, seventeen = (imread(tmp_path / f"{name}.png").shape for name in ("three", "seventeen"))
    assert three[1] == seventeen[1] == 900
    assert seventeen[0] > 2 * three[0]
