"""The tables of docs/operation.md name everything that there is, and the guides agree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import Metric

from serve_app.capacity import GIB
from serve_app.config import GatewayConfig
from serve_app.errors import RequestError
from serve_app.metrics import GatewayMetrics
from serve_app.model_config import ModelConfig
from serve_app.proposal import propose
from serve_app.quality.picture import NOTATION
from tests.advising import LLAMA_8B

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OPERATION = (DOCS / "operation.md").read_text(encoding="utf-8")


def errors(of: type[RequestError] = RequestError) -> Iterator[type[RequestError]]:
    yield of
    for kind in of.__subclasses__():
        yield from errors(kind)


def shown_name(metric: Metric) -> str:
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def anchors(page: Path) -> set[str]:
    """Those that headings of a Markdown page have on the usual hosts."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def test_every_link_between_the_pages_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for target, _, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)(#([^)]+))?\)", text):
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(linked), f"{page.name}: {target}#{anchor}"


def test_the_readmes_figures_point_to_their_rows() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = readme.split("## What it does under load")[1].split("\n\n")[1].splitlines()[2:]
    assert len(rows) >= 5
    assert all("docs/measurements.md#" in row for row in rows)


def test_every_metric_is_in_the_table_with_its_type() -> None:
    for metric in GatewayMetrics().registry.collect():
        assert f"| `{shown_name(metric)}` | {metric.type} |" in OPERATION


def test_every_error_is_in_the_table_with_its_status() -> None:
    rows = [line for line in OPERATION.splitlines() if line.startswith("|")]
    for error in errors():
        assert any(str(error.status) in row and f"`{error.code}`" in row for row in rows), error


def test_every_key_of_the_gateway_is_in_the_table() -> None:
    for key in GatewayConfig.model_fields:
        assert f"`{key}`" in OPERATION


GUIDES = [(DOCS / name).read_text(encoding="utf-8") for name in ("guide.md", "guide.zh.md")]


def test_both_guides_have_the_same_sections_commands_and_tables() -> None:
    english, chinese = GUIDES
    for pattern in (r"^#+ ", r"^\|", r"^ *- ", r"^\d\. "):
        counts = [len(re.findall(pattern, guide, re.MULTILINE)) for guide in GUIDES]
        assert counts[0] == counts[1], pattern
    shown = [re.findall(r"^```\n\$ .*?^```", g, re.MULTILINE | re.DOTALL) for g in GUIDES]
    assert shown[0] == shown[1]
    assert len(shown[0]) == 5
    assert re.findall(r"^\s*local-attention .*", english, re.MULTILINE) == re.findall(
        r"^\s*local-attention .*", chinese, re.MULTILINE
    )


def test_the_guides_show_quality_in_todays_notation() -> None:
    assert all(f"\n{NOTATION}\n" in guide for guide in GUIDES)


def test_the_guides_plan_is_what_the_command_says_today() -> None:
    model = ModelConfig({**LLAMA_8B, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}})
    proposal = propose(
        "documents",
        "models/llama-3.1-8b",
        model,
        gpus=1,
        gpu_bytes=80 * GIB,
        max_model_len=131072,
    )
    assert proposal.to_yaml() in GUIDES[0]
