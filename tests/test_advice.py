"""What the commands say of a model: true to config.json, to vLLM, and to the engine's figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

from serve_app.advice import LENGTHS, check, engine_shape
from serve_app.capacity import GIB, capacity
from serve_app.errors import ConfigError
from serve_app.model_config import ModelConfig, read_model_config, vllm_architectures
from serve_app.pattern import FULL, LayerRule
from tests.advising import LLAMA_8B, config_of, invoke
from tests.tiny_models import ZOO, write_model

ROOT = Path(__file__).parent.parent


def window(tokens: int, **keys: Any) -> dict[str, Any]:
    """vLLM's engine arguments that ask for a sliding window."""
    return {"additional_config": {"local_attention": {"sliding_window": tokens, **keys}}}


# Which models


def test_the_architectures_are_vllms() -> None:
    from vllm.model_executor.models import ModelRegistry

    tables = vllm_architectures()
    parts = [names for table, names in tables.items() if table.endswith("_MODELS")]
    assert set(ModelRegistry.get_supported_archs()) <= set().union(*parts)
    assert "LlamaForCausalLM" in tables["_TEXT_GENERATION_MODELS"]


@pytest.mark.parametrize(
    ("keys", "supported", "words"),
    [
        ({}, True, "model file for LlamaForCausalLM"),
        ({"architectures": ["PhiForCausalLM"]}, True, "Transformers backend"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, True, "model file"),
        ({"architectures": ["WhisperFor"], "is_encoder_decoder": True}, False, "has an encoder"),
        ({"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512}, False, "MLA"),
        ({"architectures": ["BertModel"]}, False, "does not generate text"),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, False, "no attention"),
        ({"architectures": ["BrandNewForCausalLM"]}, None, "does not list BrandNewForCausalLM"),
    ],
)
def test_support(keys: dict[str, Any], supported: bool | None, words: str) -> None:
    found = config_of(**keys).support()
    assert found.supported is supported
    assert words in found.sentence
    assert found.sentence.endswith(".")


@pytest.mark.parametrize("name", list(ZOO))
def test_the_zoo_is_supported_and_its_rules_are_its_own(name: str, tmp_path: Path) -> None:
    config = read_model_config(str(write_model(name, tmp_path)))
    assert config.support().supported
    if name == "gemma2":
        assert config.native_rules() == (LayerRule("sliding_attention", 512), FULL) * 2
    elif name == "gemma3":
        assert config.native_rules() == (LayerRule("sliding_attention", 512),) * 3 + (FULL,)
    else:
        assert config.native_rules() == (FULL,) * 4


@pytest.mark.parametrize(
    "made",
    [
        transformers.Gemma2Config(num_hidden_layers=13),
        transformers.Gemma3TextConfig(num_hidden_layers=26),
        transformers.Cohere2Config(num_hidden_layers=16),
        transformers.GptOssConfig(num_hidden_layers=12),
        transformers.Llama4TextConfig(num_hidden_layers=16),
    ],
    ids=lambda made: made.model_type,
)
def test_native_rules_without_layer_types_are_hugging_faces(
    made: transformers.PreTrainedConfig,
) -> None:
    raw = {key: value for key, value in made.to_dict().items() if key != "layer_types"}
    kinds = [rule.kind for rule in ModelConfig(raw).native_rules()]
    assert kinds == made.layer_types


def test_layers_that_are_no_attention_take_no_cache() -> None:
    every_fourth = config_of(full_attention_interval=4)
    listed = config_of(layer_types=["linear_attention"] * 24 + ["full_attention"] * 8)
    for config in (every_fourth, listed):
        report = check("m", config, {})
        assert sum(rule is not None for rule in report.rules) == 8
        assert report.needs[0].full_bytes == 8 * 4096 * 4096
        assert any("24 of 32 layers are no attention" in line for line in report.advice)


# Against vLLM


@pytest.mark.parametrize("given", [{}, {"block_size": 64, "max_num_batched_tokens": 512}])
def test_engine_defaults_are_vllms_on_the_cpu(given: dict[str, int], tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    directory = str(write_model("llama", tmp_path))
    theirs = EngineArgs(directory, **given).create_engine_config(UsageContext.OPENAI_API_SERVER)
    ours = engine_shape(read_model_config(directory), given, device="cpu")
    assert ours.max_model_len == theirs.model_config.max_model_len
    assert ours.max_num_batched_tokens == theirs.scheduler_config.max_num_batched_tokens
    assert ours.max_num_seqs == theirs.scheduler_config.max_num_seqs
    assert ours.block_size == theirs.cache_config.block_size
    assert ours.in_flight_tokens == theirs.max_in_flight_tokens
    assert ours.gpu_memory_utilization == theirs.cache_config.gpu_memory_utilization


_ENGINE = """
import json, sys
from vllm import LLM

if __name__ == "__main__":
    llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
    cache = llm.llm_engine.vllm_config.cache_config
    print("FOUND", json.dumps([cache.num_gpu_blocks, cache.kv_cache_max_concurrency]))
"""


@pytest.mark.parametrize(
    "pattern",
    [
        {"sliding_window": 256, "attention_sinks": 64, "full_attention_every": 4},
        {"attention_chunk_size": 256},
    ],
    ids=["sinks, every fourth full", "all chunked"],
)
def test_capacity_is_what_a_real_engine_reports(pattern: dict[str, Any], tmp_path: Path) -> None:
    directory = str(write_model("llama", tmp_path))
    args: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 8,
        "block_size": 32,
        "additional_config": {"local_attention": pattern},
    }
    done = subprocess.run(
        [sys.executable, "-c", _ENGINE, directory, json.dumps(args)],
        env=os.environ
        | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a process less to start
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = (line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    blocks, concurrency = json.loads(found.removeprefix("FOUND"))
    report = check("m", read_model_config(directory), args, device="cpu")
    rules = tuple(rule for rule in report.rules if rule is not None)
    ours = capacity(rules, read_model_config(directory).shape, report.engine, GIB)
    assert (ours.blocks, ours.concurrency) == (blocks, pytest.approx(concurrency))


# The report


def test_a_window_saves_what_it_hides() -> None:
    report = check("m", config_of(), window(2048), gpu_bytes=80 * GIB)
    assert [need.length for need in report.needs] == list(LENGTHS)  # 131072 is the model's own
    assert report.needs[1].full_bytes == 32768 * 32 * 4096
    assert {need.plan_bytes for need in report.needs} == {(2048 + 16) * 32 * 4096}
    assert report.fit is not None
    assert report.fit.full.decoding == 3
    assert report.fit.plan.decoding > 200
    assert report.needs[2].plan_sequences == report.fit.plan.decoding
    assert report.support.supported
    assert not report.advice


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"additional_config": {"local_attention": {"attention_chunk_size": 512}}}, "forgotten"),
        (window(512, full_attention_every=4) | {"max_model_len": 512}, "saves nothing"),
        (window(512) | {"max_model_len": 8192}, "lower max_num_batched_tokens"),
        (window(512) | {"max_model_len": 200_000}, "vLLM refuses it"),
        (window(2048) | {"max_num_seqs": 2}, "fits the KV cache"),
        (
            window(2048, full_attention_every=2) | {"disable_hybrid_kv_cache_manager": True},
            "hybrid KV cache manager is off",
        ),
    ],
)
def test_advice(args: dict[str, Any], words: str) -> None:
    report = check("m", config_of(), args, gpu_bytes=80 * GIB)
    assert any(words in sentence for sentence in report.advice), report.advice


def test_a_model_too_large_for_the_gpu_is_told() -> None:
    for memory, words in ((16, "leave no room"), (22, "Not one request")):
        report = check("m", config_of(), {}, gpu_bytes=memory * GIB)
        assert any(words in sentence for sentence in report.advice), report.advice


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (window(0), "sliding_window"),
        (window(512, full_attention_layers=[40]), "layer 40"),
        (window(512, attention_chunk_size=64), "layer_types"),
        (
            {"additional_config": {"local_attention": {"attention_chunk_size": 100}}},
            "multiple of 16",
        ),
        (
            {
                "additional_config": {"local_attention": {"attention_chunk_size": 96}},
                "block_size": 64,
            },
            "does not divide",
        ),
    ],
)
def test_a_refused_plan_is_not_supported(args: dict[str, Any], words: str) -> None:
    report = check("m", config_of(), args)
    assert report.support.supported is False
    assert words in report.support.sentence


def test_overrides_are_vllms() -> None:
    report = check("m", config_of(), {"hf_overrides": {"attention_chunk_size": 512}})
    assert set(report.rules) == {LayerRule("chunked_attention", 512)}
    nested = ModelConfig({"architectures": ["X"], "text_config": dict(LLAMA_8B)})
    fewer = check("m", nested, {"hf_overrides": {"text_config": {"num_hidden_layers": 8}}})
    assert len(fewer.rules) == 8


# The commands


def test_check_prints_layers_needs_and_fit(llama_8b: str) -> None:
    plan = '{"sliding_window": 2048, "full_attention_every": 16}'
    result = invoke("check", llama_8b, "--local-attention", plan, "--gpu-memory", "80")
    assert result.exit_code == 0
    assert "sliding_attention of 2048: layers 0-14, 16-30" in result.output
    assert "full_attention: layers 15, 31" in result.output
    assert "1,048,576" in result.output
    assert "128.0 GiB" in result.output
    assert "Of 80 GiB, about 15.0 are weights" in result.output


def test_check_json(llama_8b: str) -> None:
    result = invoke("check", llama_8b, "--hf-overrides", '{"sliding_window": 1024}', "--json")
    assert result.exit_code == 0
    (report,) = json.loads(result.output)
    assert report["support"]["supported"] is True
    assert report["rules"][0] == {"kind": "sliding_attention", "span": 1024, "sinks": 0}
    assert [need["length"] for need in report["needs"]] == list(LENGTHS)
    assert report["fit"] is None


def test_check_of_a_configuration_reports_each_pool(llama_8b: str) -> None:
    result = invoke("check", llama_8b, "--config", str(ROOT / "configs/demo-cpu.yaml"), "--json")
    assert result.exit_code == 0
    reports = {report["pool"]: report for report in json.loads(result.output)}
    assert {rule["kind"] for rule in reports["short"]["rules"]} == {"full_attention"}
    assert reports["long"]["rules"][0]["span"] == 512
    assert reports["long"]["engine"]["block_size"] == 32
    assert reports["long"]["engine"]["kv_cache_dtype"] == "float32"


def test_check_of_a_refused_plan_exits_with_1(llama_8b: str) -> None:
    result = invoke("check", llama_8b, "--local-attention", '{"sliding_window": 0}')
    assert result.exit_code == 1
    assert "not supported: " in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Name a model"),
        (("/nowhere",), "does not exist"),
        (("MODEL", "--local-attention", "{"), "not JSON"),
        (("MODEL", "--local-attention", "{}", "--config", "x.yaml"), "not both"),
    ],
)
def test_check_needs_a_model(llama_8b: str, words: tuple[str, ...], message: str) -> None:
    result = invoke("check", *(llama_8b if word == "MODEL" else word for word in words))
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_neither_torch_nor_vllm_is_imported(llama_8b: str) -> None:
    script = (
        "import sys, time, serve_app.advice as a; start = time.perf_counter(); "
        f"a.check_command({llama_8b!r}, gpu_memory=80.0); took = time.perf_counter() - start; "
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules); assert took < 2, took"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_local_attention_command_has_both(llama_8b: str) -> None:
    from serve_app.cli import app

    assert "plan: none" in CliRunner().invoke(app, ["check", llama_8b]).output
    wrong = CliRunner().invoke(app, ["check", "/nowhere"])
    assert wrong.exit_code == 1
    assert "error: /nowhere does not exist" in wrong.output
    words = ["plan", "--task", "code", "--model", llama_8b, "--gpu-memory", "80"]
    assert "pools:" in CliRunner().invoke(app, [*words, "--max-model-len", "32768"]).output
