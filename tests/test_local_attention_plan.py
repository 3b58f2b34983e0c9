"""From configuration to a plan: the sources in order, and every refusal as a sentence."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import LocalAttentionError
from serve_app.local_attention import entry
from serve_app.local_attention.plan import (
    CHUNK_VARIABLE,
    NATIVE,
    Plan,
    advice,
    choose_block_size,
    make_plan,
    plan_in_force,
    refuse_engine,
)
from serve_app.pattern import FULL, LayerRule

LLAMA = {"model_type": "llama", "num_hidden_layers": 8}
QWEN = {
    "model_type": "qwen2",
    "num_hidden_layers": 8,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 6,
}


def plan(config: Any = LLAMA, **sources: Any) -> Plan | None:
    return make_plan(config, **{"environment": {}, **sources})


def rules(config: Any = LLAMA, **sources: Any) -> tuple[LayerRule, ...]:
    found = plan(config, **sources)
    assert found is not None
    return found.rules


def window(span: int, sinks: int = 0) -> LayerRule:
    return LayerRule("sliding_attention", span, sinks)


def chunk(span: int) -> LayerRule:
    return LayerRule("chunked_attention", span)


def test_the_first_source_wins() -> None:
    config = {**LLAMA, "attention_chunk_size": 64}
    additional = {"local_attention": {"sliding_window": 32}}
    environment = {CHUNK_VARIABLE: "16"}
    overrides = {"attention_chunk_size": 128}
    everything = {"additional": additional, "overrides": overrides, "environment": environment}
    assert rules(config, **everything) == (window(32),) * 8
    assert rules(config, overrides=overrides, environment=environment) == (chunk(128),) * 8
    assert rules(config, environment=environment) == (chunk(64),) * 8
    assert rules(LLAMA, environment=environment) == (chunk(16),) * 8
    assert plan(LLAMA) is None


def test_config_and_engine_object_agree() -> None:
    """``check`` reads config.json, the engine Hugging Face's object made from it."""
    for keys in (
        {"attention_chunk_size": 64},
        {"attention_chunk_size": 64, "use_irope": True},
        {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3},
        {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 8},
        {"sliding_window": 64, "use_sliding_window": False},
    ):
        raw = {**QWEN, **keys}
        made = transformers.Qwen2Config(**raw)
        assert plan(raw) == plan(made), keys


def test_irope_leaves_every_fourth_layer_full() -> None:
    found = rules({**LLAMA, "attention_chunk_size": 64, "use_irope": True})
    assert [index for index, rule in enumerate(found) if rule == FULL] == [3, 7]


def test_layer_types_say_which_layer() -> None:
    kinds = ["sliding_attention", "full_attention", "linear_attention", "sliding_attention"]
    config = {**LLAMA, "num_hidden_layers": 4, "sliding_window": 8, "layer_types": kinds}
    assert rules(config) == (window(8), FULL, FULL, window(8))


def test_a_window_that_qwen_turned_off_stays_off() -> None:
    assert plan(QWEN) is None
    assert plan({**LLAMA, "sliding_window": 0}) is None


def test_an_override_is_meant() -> None:
    """Even where the checkpoint's own keys would have it ignored."""
    full = {**QWEN, "layer_types": ["full_attention"] * 8}
    assert rules(full, overrides={"sliding_window": 512}) == (window(512),) * 8
    phi = {**LLAMA, "sliding_window": 2047}
    assert rules(phi, overrides={"attention_chunk_size": 512}) == (chunk(512),) * 8
    nested = {"text_config": {"attention_chunk_size": 512}}
    assert rules({"text_config": LLAMA}, overrides=nested) == (chunk(512),) * 8


@pytest.mark.parametrize("model_type", sorted(NATIVE))
def test_native_models_keep_their_own_unless_told(model_type: str) -> None:
    config = {**LLAMA, "model_type": model_type, "sliding_window": 64, "attention_chunk_size": 64}
    assert plan(config, environment={CHUNK_VARIABLE: "16"}) is None
    told = {"local_attention": {"sliding_window": 32, "attention_sinks": 4}}
    assert rules(config, additional=told) == (window(32, 4),) * 8


def test_an_override_of_another_kind_tells_a_native_model() -> None:
    gemma = {**LLAMA, "model_type": "gemma3_text", "sliding_window": 512}
    assert plan(gemma, overrides={"sliding_window": 256}) is None  # vLLM reads it itself
    assert rules(gemma, overrides={"attention_chunk_size": 256}) == (chunk(256),) * 8


@pytest.mark.parametrize(
    ("config", "pattern", "words"),
    [
        ({"is_encoder_decoder": True}, {"sliding_window": 8}, "decoder-only"),
        ({"kv_lora_rank": 512}, {"sliding_window": 8}, "MLA"),
        ({}, {"sliding_window": 0}, "sliding_window is 0"),
        ({}, {"sliding_window": -4}, "sliding_window is -4"),
        ({}, {"attention_chunk_size": 8, "attention_sinks": 4}, "go with sliding_window only"),
        ({}, {"sliding_window": 8, "attention_chunk_size": 8}, "add layer_types"),
        ({}, {"sliding_window": 8, "layer_types": ["full_attention"]}, "1 entries.*8 layers"),
        ({}, {"sliding_window": 8, "full_attention_layers": [8]}, "layers are 0 to 7"),
        ({}, {"window": 8}, "window is not known"),
        ({}, {}, "neither sliding_window nor attention_chunk_size"),
        ({"num_hidden_layers": None}, {"sliding_window": 8}, "how many layers"),
    ],
)
def test_refusals_say_what_to_do(
    config: dict[str, Any], pattern: dict[str, Any], words: str
) -> None:
    with pytest.raises(LocalAttentionError, match=words) as refused:
        plan({**LLAMA, **config}, additional={"local_attention": pattern})
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({"overrides": {"sliding_window": -1}}, "sliding_window is -1"),
        ({"overrides": {"sliding_window": 0}}, "sliding_window is 0"),
        ({"overrides": {"sliding_window": 8, "attention_chunk_size": 8}}, "add layer_types"),
        ({"environment": {CHUNK_VARIABLE: "many"}}, "must be a number of tokens"),
        ({"environment": {CHUNK_VARIABLE: "-2"}}, "attention_chunk_size is -2"),
    ],
)
def test_every_source_is_checked(sources: dict[str, Any], words: str) -> None:
    with pytest.raises(LocalAttentionError, match=words):
        plan(**sources)


@pytest.mark.parametrize(
    ("chunk", "asked", "default", "step", "chosen"),
    [
        (None, None, 128, 32, None),
        (256, None, 128, 32, None),
        (96, None, 128, 32, 96),
        (64, None, 128, 32, 64),
        (2048, 16, 16, 16, None),
        (320, None, 128, 32, 64),
    ],
)
def test_a_block_size_that_divides(
    chunk: int | None, asked: int | None, default: int, step: int, chosen: int | None
) -> None:
    assert choose_block_size(chunk, asked, default, step) == chosen


@pytest.mark.parametrize(
    ("chunk", "asked", "words"),
    [(100, None, "multiple of 16"), (64, 48, r"\(48\) does not divide")],
)
def test_blocks_that_cannot_divide(chunk: int, asked: int | None, words: str) -> None:
    with pytest.raises(LocalAttentionError, match=words):
        choose_block_size(chunk, asked, 16, 16)


def engine(**changes: Any) -> Any:
    """vLLM's configuration, as far as the refusals look at it."""
    config = SimpleNamespace(
        speculative_config=None,
        kv_transfer_config=None,
        model_config=SimpleNamespace(is_mm_prefix_lm=False),
        cache_config=SimpleNamespace(cache_dtype="auto", kv_cache_dtype_skip_layers=[]),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
    )
    for path, value in changes.items():
        part, _, name = path.partition("__")
        setattr(getattr(config, part) if name else config, name or part, value)
    return config


EAGLE = SimpleNamespace(use_eagle=lambda: True)


@pytest.mark.parametrize(
    ("change", "words", "by_chunks", "by_sinks"),
    [
        ({"speculative_config": EAGLE}, "EAGLE", True, False),
        ({"kv_transfer_config": object()}, "KV connector", False, True),
        ({"parallel_config__decode_context_parallel_size": 2}, "Context parallel", True, True),
        ({"cache_config__cache_dtype": "int4_per_token_head"}, "int4", True, True),
        ({"cache_config__kv_cache_dtype_skip_layers": ["0"]}, "skip_layers", True, True),
        ({"model_config__is_mm_prefix_lm": True}, "prefix-LM", True, True),
    ],
)
def test_what_does_not_go_together(
    change: dict[str, Any], words: str, by_chunks: bool, by_sinks: bool
) -> None:
    for rule, refused in ((chunk(64), by_chunks), (window(64, 4), by_sinks), (window(64), False)):
        made = Plan((rule, FULL), "additional_config")
        refuse_engine(made, engine())
        if refused:
            with pytest.raises(LocalAttentionError, match=words):
                refuse_engine(made, engine(**change))
        else:
            refuse_engine(made, engine(**change))


def test_advice_is_true_or_silent() -> None:
    mixed = Plan((window(512), FULL), "additional_config")
    every = Plan((chunk(512),) * 4, "additional_config")
    assert advice(None, 8192) == []
    assert advice(mixed, 8192, in_flight_tokens=2048) == []
    assert "crosses a chunk boundary" in advice(every, 8192)[0]
    assert "not smaller than max_model_len" in advice(mixed, 512)[0]
    assert "lower max_num_batched_tokens" in advice(mixed, 8192, in_flight_tokens=8192)[0]
    (gain,) = advice(mixed, 8192, max_num_seqs=4, capacity_tokens=40_000)
    assert "no memory is gained" in gain


@given(
    st.lists(
        st.one_of(
            st.just(FULL),
            st.builds(window, st.integers(1, 9), st.integers(0, 9)),
            st.builds(chunk, st.integers(1, 9)),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_plan_survives_its_journey(made: list[LayerRule]) -> None:
    sent = Plan(tuple(made), "config.json")
    text = SimpleNamespace(local_attention_plan=sent.to_json())
    config = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=text))
    assert plan_in_force(config) == sent
    assert str(sent).endswith("from config.json")


def test_a_plan_reads_as_one_line() -> None:
    made = Plan((window(512, 4),) * 3 + (FULL,), "additional_config")
    assert str(made) == (
        "3 x sliding 512 + 4 sinks, 1 x full (full: layers 3), from additional_config"
    )


def test_another_vllm_stops_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    with pytest.raises(LocalAttentionError, match=r"written for vLLM 0\.32\.0, but vLLM 0\.33\.0"):
        entry.register()


def test_the_entry_module_imports_nothing_that_can_fail() -> None:
    """vLLM would log an import error and serve full attention."""
    body = ast.parse(Path(entry.__file__).read_text(encoding="utf-8")).body
    imported = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imported] == ["from __future__ import annotations"]
