"""Configurations that load, and sentences for those that must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.config import PoolConfig, load_config
from serve_app.errors import ConfigError

BOUNDS = {"max_replicas": 3}


def whole(**changes: Any) -> dict[str, Any]:
    return {
        "model": "./model",
        "served_model_name": "m",
        "device": "cpu",
        "engine_args": {"dtype": "float32", "block_size": 16},
        "pools": {"short": {"max_model_len": 1024}, "long": {"max_model_len": 8192}},
    } | changes


def load(directory: Path, content: Any) -> Any:
    path = directory / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return load_config(path)


def test_a_relative_model_is_relative_to_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, whole()).model == str(tmp_path / "model")
    assert load(tmp_path, whole(model="Qwen/Qwen3-0.6B")).model == "Qwen/Qwen3-0.6B"


def test_the_keys_file_is_relative_to_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, whole(gateway={"api_keys_file": "keys"}))
    assert config.gateway.api_keys_file == str(tmp_path / "keys")


def test_bodies_may_be_as_large_as_the_longest_pool_needs(tmp_path: Path) -> None:
    assert load(tmp_path, whole()).max_body_bytes == 2**20 + 32 * 8192
    assert load(tmp_path, whole(gateway={"max_body_bytes": 4096})).max_body_bytes == 4096


def test_a_pools_arguments_win_over_the_files(tmp_path: Path) -> None:
    pool = {
        "max_model_len": 1024,
        "engine_args": {"block_size": 32},
        "local_attention": {"sliding_window": 256, "attention_sinks": 4},
    }
    args = load(tmp_path, whole(pools={"only": pool})).engine_args_of("only")
    assert (args["dtype"], args["block_size"], args["max_model_len"]) == ("float32", 32, 1024)
    assert args["served_model_name"] == ["m"]
    assert args["additional_config"]["local_attention"]["sliding_window"] == 256


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"modle": 1}, r"The key modle is not known\."),
        ({"model": None}, r"The key model is None, but input should be a valid string\."),
        ({"pools": {}}, r"The key pools is \{\}, but .* at least 1 item"),
        ({"device": "tpu"}, r"The key device is 'tpu', but input should be 'cpu' or 'gpu'\."),
        (
            {"gateway": {"replicas": 0}},
            r"gateway\.replicas is 0, but .* greater than or equal to 1",
        ),
        ({"gateway": {"port": 1}}, r"The key gateway\.port is not known\."),
        (
            {"gateway": {"length_edges": [512, 2048, 2048]}},
            r"gateway\.length_edges: each length must be greater .* but 2048 follows 2048\.",
        ),
        ({"gateway": {"length_edges": []}}, r"gateway\.length_edges is \[\], but .* at least 1"),
        (
            {"gateway": {"length_edges": [0, 2]}},
            r"gateway\.length_edges\.0 is 0, but .* equal to 1",
        ),
        ({"gateway": {"run_tokens": 0}}, r"gateway\.run_tokens is 0, but .* equal to 1"),
        (
            {"pools": {"a": {"max_model_len": 64, "replicas": 2, "autoscaling": BOUNDS}}},
            r"pools\.a: set replicas or autoscaling, not both\.",
        ),
        (
            {"pools": {"a": {"max_model_len": 64, "autoscaling": BOUNDS | {"min_replicas": 4}}}},
            r"max_replicas is 3, which is less than min_replicas \(4\)\.",
        ),
        ({"pools": {"a": {}}}, r"The key pools\.a\.max_model_len is required\."),
        ({"pools": {"a": {"max_model_len": 1}}}, r"pools\.a\.max_model_len is 1, but .* 16"),
        (
            {"pools": {"a": {"max_model_len": 64}, "b": {"max_model_len": 64}}},
            r"pools a and b have the same max_model_len \(64\)",
        ),
        ({"engine_args": {"model": "x"}}, r"engine_args may not set model; set the file's model"),
        (
            {"pools": {"a": {"max_model_len": 64, "engine_args": {"tensor_parallel_size": 2}}}},
            r"may not set tensor_parallel_size",
        ),
        (
            {"pools": {"a": {"max_model_len": 64, "local_attention": {}}}},
            r"neither sliding_window nor attention_chunk_size",
        ),
    ],
)
def test_what_is_wrong_is_named_in_a_sentence(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(tmp_path, whole(**changes))


@pytest.mark.parametrize("content", ["", "[1]", "text", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, content)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml does not exist"):
        load_config(tmp_path / "nothing.yaml")


def test_workers_that_are_split_take_whole_gpus() -> None:
    assert PoolConfig(max_model_len=64, num_gpus=0.5).workers == 1
    split = PoolConfig(max_model_len=64, tensor_parallel_size=2, pipeline_parallel_size=2)
    assert split.workers == 4
    with pytest.raises(ValueError, match=r"num_gpus is 0\.5, but an engine of 2 workers"):
        PoolConfig(max_model_len=64, tensor_parallel_size=2, num_gpus=0.5)


def test_an_autoscaled_pool_needs_room_for_its_least_replicas() -> None:
    def pool(**bounds: int) -> PoolConfig:
        return PoolConfig.model_validate({"max_model_len": 64, "autoscaling": BOUNDS | bounds})

    assert pool().least_replicas == 1
    assert pool(min_replicas=2).least_replicas == 2
    assert pool(min_replicas=0).least_replicas == 1
    assert pool(min_replicas=0).scales_from_zero
    assert not pool().scales_from_zero


def test_length_classes_are_read(tmp_path: Path) -> None:
    config = load(tmp_path, whole(gateway={"length_edges": [1024, 8192], "run_tokens": 4096}))
    assert config.gateway.length_edges == (1024, 8192)
    assert config.gateway.run_tokens == 4096
