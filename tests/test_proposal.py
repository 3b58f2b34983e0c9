"""What is proposed for a task: a configuration that loads, fits, and says why it is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.capacity import GIB
from serve_app.config import load_config
from serve_app.errors import ConfigError, LocalAttentionError
from serve_app.proposal import BANDS, Task, propose
from tests.advising import config_of, invoke


@pytest.mark.parametrize("task", list(BANDS))
@pytest.mark.parametrize("gpu", [24, 80, 141])
def test_a_proposal_is_a_configuration_that_fits(
    task: Task, gpu: int, llama_8b: str, tmp_path: Path
) -> None:
    words = ["plan", "--task", task, "--model", llama_8b, "--gpu-memory", str(gpu)]
    result = invoke(*words, "--max-model-len", "32768")
    assert result.exit_code == 0, result.exception
    (tmp_path / "proposal.yaml").write_text(result.output)
    pool = load_config(tmp_path / "proposal.yaml").pools[task]
    assert pool.local_attention is not None
    low, high = BANDS[task]
    assert low <= (pool.local_attention.sliding_window or 0) <= high

    again = invoke(
        "check", "--config", str(tmp_path / "proposal.yaml"), "--gpu-memory", str(gpu), "--json"
    )
    (report,) = json.loads(again.output)
    assert 0 < pool.engine_args["max_num_seqs"] <= report["fit"]["plan"]["decoding"]
    assert report["fit"]["plan"]["decoding"] > report["fit"]["full"]["decoding"]
    assert not report["advice"]


def test_less_memory_leaves_fewer_full_layers() -> None:
    every = []
    for gpu in (141, 48, 32, 20):
        found = propose(
            "general", "m", config_of(), gpus=1, gpu_bytes=gpu * GIB, max_model_len=65536
        )
        pattern = found.application["pools"]["general"]["local_attention"]
        every.append(pattern.get("full_attention_every", 1000))
    assert every == sorted(every)
    assert every[0] == 4
    assert every[-1] == 1000


@pytest.mark.parametrize(
    ("keys", "gpu", "length", "words"),
    [
        ({}, 12, 32768, "--tensor-parallel"),
        ({}, 80, 512, "next to nothing"),
        ({"kv_lora_rank": 512}, 80, 32768, "MLA"),
    ],
)
def test_what_cannot_be_planned_is_said(
    keys: dict[str, Any], gpu: int, length: int, words: str
) -> None:
    with pytest.raises((ConfigError, LocalAttentionError), match=words):
        propose(
            "general", "m", config_of(**keys), gpus=1, gpu_bytes=gpu * GIB, max_model_len=length
        )


def test_an_unknown_task_is_named(llama_8b: str) -> None:
    words = ["plan", "--task", "poetry", "--model", llama_8b, "--gpu-memory", "80"]
    result = invoke(*words, "--max-model-len", "32768")
    assert "poetry" in str(result.exception)


def test_the_yaml_says_why(llama_8b: str) -> None:
    words = ["plan", "--task", "code", "--model", llama_8b, "--gpu-memory", "80"]
    result = invoke(*words, "--max-model-len", "200000")
    assert "# Sequences of 200000 tokens that fit while they decode" in result.output
    assert "vLLM refuses it" in result.output
    assert yaml.safe_load(result.output)["served_model_name"] == "llama-8b"
