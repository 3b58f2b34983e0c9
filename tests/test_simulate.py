"""The simulate command, from a configuration to a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from serve_app.cli import app
from serve_app.config import load_config
from serve_app.pattern import LayerRule
from serve_app.simulate import plans, read_measured, repeat, times
from serve_app.simulator import Arrival

ROOT = Path(__file__).parent.parent
COST = {
    "measured_on": "a test",
    "layers": 4,
    "kv_tokens": 100_000,
    "start_s": 20,
    "step_s": 0.01,
    "prompt_token_s": 0.0001,
    "sequence_s": 0.001,
    "context_token_s": 0,
}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    config = {
        "model": "m",
        "served_model_name": "m",
        "device": "gpu",
        "engine_args": {"max_num_seqs": 8},
        "pools": {
            "short": {"max_model_len": 2048, "num_gpus": 0.5},
            "long": {
                "max_model_len": 16384,
                "tensor_parallel_size": 2,
                "local_attention": {"sliding_window": 512, "full_attention_every": 4},
                "autoscaling": {"max_replicas": 3, "target_tokens_per_replica": 9000},
            },
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "cost.json").write_text(json.dumps(COST))
    return tmp_path / "config.yaml", tmp_path / "cost.json"


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["simulate", *map(str, args)], env={"COLUMNS": "200"})


def test_plans_follow_the_configuration(files: tuple[Path, Path]) -> None:
    planned = {plan.name: plan for plan in plans(load_config(files[0]), read_measured(files[1]))}
    short, long = planned["short"], planned["long"]
    assert (short.gpus_per_replica, short.max_sequences) == (0.5, 8)
    assert long.gpus_per_replica == 2
    assert long.rules[:2] == (LayerRule("sliding_attention", 512),) * 2
    assert long.rules[3].kind == "full_attention"
    assert long.scaling is not None
    assert times(long, 10).scaling.max_replicas == 30  # type: ignore[union-attr]
    assert times(short, 10).replicas == 10


def test_a_row_for_each_scale(files: tuple[Path, Path], tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    generated = run(files[0], "--cost", files[1], "--seconds", 30, "--write", trace, "--scale", 1)
    assert generated.exit_code == 0, generated.output
    replayed = run(files[0], "--cost", files[1], "--trace", trace, "--scale", "1,20")
    assert replayed.exit_code == 0, replayed.output
    rows = [line for line in replayed.stdout.splitlines() if "/" in line and "│" in line]
    assert len(rows) == 2
    requests = [int(row.split("│")[2]) for row in rows]
    assert requests[1] == 20 * requests[0] == 20 * (len(trace.read_text().splitlines()) - 1)


def test_the_demo_needs_no_file_but_its_configuration() -> None:
    result = run(ROOT / "configs" / "demo-cpu.yaml", "--lengths", "lmsys-chat", "--seconds", 60)
    assert result.exit_code == 0, result.output
    measured = read_measured(ROOT / "configs" / "demo-cpu.cost.json")
    assert measured.measured_on in " ".join(result.stdout.split())


def test_shipped_step_times_are_those_of_the_demo_model() -> None:
    measured = read_measured(ROOT / "configs" / "demo-cpu.cost.json")
    model = json.loads((ROOT / "models" / "demo" / "config.json").read_text())
    assert measured.layers == model["num_hidden_layers"]
    assert measured.step_s > 0
    assert measured.prompt_token_s > 0


def test_repeating_keeps_the_span_of_a_trace() -> None:
    arrivals = [Arrival(float(second), 1, 1) for second in range(10)]
    more = repeat(arrivals, 3)
    assert len(more) == 30
    assert more[-1].time < 10
    assert more == sorted(more, key=lambda arrival: arrival.time)


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--lengths", "novels", "must be azure-conversation, azure-code or lmsys-chat"),
        ("--scale", "0", "must be numbers such as 1,10,100"),
        ("--trace", "nowhere.csv", "The trace nowhere.csv cannot be read"),
        (
            "--cost",
            "nowhere.json",
            "The cost model nowhere.json does not exist; benchmarks/cost_model.py measures one.",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(
    files: tuple[Path, Path], option: str, value: str, sentence: str
) -> None:
    result = run(files[0], "--cost", files[1], option, value)
    assert result.exit_code == 1
    assert sentence in result.stderr
