"""The comparisons' own arithmetic, on runs of the null server's shape; no engine starts here."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from benchmarks import against_vllm, attention_kinds, routers
from load_tests.report import FinishedRun, read_run
from load_tests.stream import Record
from load_tests.summary import finite, rows, verdict
from serve_app.config import load_config


def answered(name: str, tokens: int, ttft: float, at: float = 0.0) -> Record:
    record = Record(name, at, tokens, "ok", sent=at, ended=at + 1, status=200)
    record.ttft_ms, record.itl_ms, record.e2e_ms, record.output_tokens = ttft, 5.0, 900.0, 32
    return record


def run_of(folder: Path, records: list[Record], label: str) -> FinishedRun:
    folder.mkdir()
    (folder / "requests.jsonl").write_text("".join(json.dumps(asdict(r)) + "\n" for r in records))
    judged = verdict(records, len(records), [0.1])
    summary = {"label": label, "seconds": 10.0, "valid": True, "verdict": judged}
    (folder / "summary.json").write_text(
        json.dumps(finite(summary | {"classes": rows(records, 10.0, {})}))
    )
    return read_run(folder)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("kind", ["full", "sliding", "chunked", "sinks"])
def test_every_kind_makes_a_configuration_that_can_be_served(
    tmp_path: Path, device: str, kind: str
) -> None:
    scale = attention_kinds.SCALES[device]
    pattern = attention_kinds.patterns(scale)[kind]
    attention_kinds.write_config(device, pattern, tmp_path / "config.yaml")
    config = load_config(tmp_path / "config.yaml")
    args = config.engine_args_of("only")
    local = args.get("additional_config", {}).get("local_attention", {})
    assert {name: local[name] for name in pattern} == pattern
    longest = max(int(x[:-1]) * 1024 if x[-1] == "k" else int(x) for x in scale.lengths.split(","))
    assert longest + scale.output <= config.pools["only"].max_model_len


def test_a_local_query_sees_the_same_number_of_keys_in_every_kind() -> None:
    scale = attention_kinds.SCALES["gpu"]
    known = attention_kinds.patterns(scale)
    visible = [
        known["sliding"]["sliding_window"],
        known["chunked"]["attention_chunk_size"],
        known["sinks"]["sliding_window"] + known["sinks"]["attention_sinks"],
    ]
    assert visible == [scale.visible] * 3


def test_sequences_held_are_vllms_own_figure(tmp_path: Path) -> None:
    line = "INFO [x.py:1] Maximum concurrency for 131,072 tokens per request: 7.53x\n"
    assert attention_kinds.held(f"(Engine) {line}") == (131072, 7.53)
    assert attention_kinds.held("nothing") is None
    sweep = run_of(tmp_path / "s", [answered("8192", 8192, t) for t in (100.0, 200.0, 400.0)], "f")
    crowd = run_of(tmp_path / "c", [answered("8192", 8192, 900.0)] * 4, "f")
    shown = attention_kinds.table([attention_kinds.Measured("full", sweep, crowd, (131072, 7.5))])
    assert "| full | 8,192 | 0.20 | 5.00 | 0/3 |" in shown
    assert "| full | 7.5 of 131,072 tokens | 4 | 4 | 12.8 | valid |" in shown


def test_rounds_of_a_system_are_taken_together_and_classes_apart(tmp_path: Path) -> None:
    mix = "short=0.9:100-200:8:100:10,long=0.1:1000:8:500:20"
    fast = [answered("short", 150, 50.0)] * 3 + [answered("long", 1000, 400.0)]
    slow = [answered("short", 150, 150.0)] * 3 + [answered("long", 1000, 600.0)]
    runs = [
        run_of(tmp_path / "pools-4-0", fast, "ours"),
        run_of(tmp_path / "pools-4-1", slow, "ours"),
        run_of(tmp_path / "default-4-0", slow, "theirs"),
    ]
    lines = routers.table(runs, mix).splitlines()[2:]
    assert [line.split(" | ")[1:3] for line in lines] == [
        ["short", "ours"],
        ["short", "theirs"],
        ["long", "ours"],
        ["long", "theirs"],
    ]
    assert lines[0].startswith("| 4 | short | ours | 6 | 6 | 100 |")
    assert lines[0].endswith("| 0.15 | 50.0% |")
    assert lines[1].endswith("| 0 | 0.0% |")


@pytest.mark.parametrize("name", routers.LABELS)
@pytest.mark.parametrize("shape", ["tiny", "gpu"])
def test_every_system_has_its_configuration(name: str, shape: str) -> None:
    path = routers.CONFIGS / f"{routers.SYSTEMS[name][1]}-{shape}.yaml"
    assert yaml.safe_load(path.read_text())["pools"]


def test_vllm_gets_our_arguments_as_flags() -> None:
    arguments = {"block_size": 32, "enforce_eager": True, "enable_prefix_caching": False}
    arguments |= {"served_model_name": ["bench"], "additional_config": {"a": 1}}
    assert list(against_vllm.flags(arguments)) == [
        *("--block-size", "32", "--enforce-eager", "--no-enable-prefix-caching"),
        *("--served-model-name", "bench", "--additional-config", '{"a": 1}'),
    ]


@pytest.mark.parametrize(
    ("rate", "ttft", "says"),
    [(10, 54, ("1.000", "0.97: met", "+4.00 ms", "+5: met")), (9, 56, ("0.900", "0.97: MISSED"))],
)
def test_the_verdict_against_vllm(rate: float, ttft: float, says: tuple[str, ...]) -> None:
    vllm, ours = against_vllm.Side(10, 50), against_vllm.Side(rate, ttft)
    shown = against_vllm.verdict(8, [(vllm, ours)], client_cpu=0.2)
    assert all(each in shown for each in says), shown
    assert "INVALID" not in shown
    assert "INVALID" in against_vllm.verdict(8, [(vllm, ours)], client_cpu=0.95)


def test_the_median_start_is_judged_and_the_others_are_shown() -> None:
    vllm = against_vllm.Side(10, 50)
    ours = [against_vllm.Side(rate, ttft) for rate, ttft in ((9.9, 60), (8, 49), (11, 52))]
    shown = against_vllm.verdict(1, [(vllm, each) for each in ours], client_cpu=0.2)
    assert "0.990 [0.800 to 1.100] of vLLM's (target at least 0.97: met)" in shown
    assert "+2.00 [-1.00 to +10.0] ms (target at most +5: met)" in shown
