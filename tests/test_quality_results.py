"""What is kept between runs, and engines that fail."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from serve_app.errors import ConfigError, ServeAppError
from serve_app.quality.grid import Job
from serve_app.quality.results import Kept, alone_in, digest_of, measure
from tests.test_quality_verdict import PLANS, RESULTS

JOB = Job(
    model="/nowhere",
    files="0",
    pattern=None,
    max_model_len=1024,
    lengths=(256, 512),
    depths=(0.1, 0.9),
    questions=1,
    sequences=1,
    seed=0,
    text=None,
    engine_args={},
)


def test_results_and_refusals_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    kept = Kept.open(path, JOB)
    assert [name for name, _ in kept.missing(PLANS)] == list(PLANS)
    kept.results["full"] = RESULTS["full"]
    kept.refused["window 256"] = "Because."
    kept.save()
    again = Kept.open(path, dataclasses.replace(JOB, pattern={"sliding_window": 256}))
    assert again.results == {"full": RESULTS["full"]}
    assert again.refused == {"window 256": "Because."}
    assert [name for name, _ in again.missing(PLANS)] == ["window 256, 1/4 full"]


def test_results_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    Kept.open(tmp_path / "results.json", JOB).save()
    other = dataclasses.replace(JOB, lengths=(256,), seed=1)
    with pytest.raises(ConfigError, match=r"other settings \(lengths, seed\)"):
        Kept.open(tmp_path / "results.json", other)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 1, "results": 2}'])
def test_another_file_is_not_written_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ConfigError, match="no file of this command"):
        Kept.open(tmp_path / "results.json", JOB)


def test_a_model_or_text_written_anew_has_another_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = digest_of(tmp_path)
    assert digest_of(tmp_path) == before
    os.utime(tmp_path / "config.json", (1, 1))
    assert digest_of(tmp_path) != before


def test_an_engine_that_fails_is_one_sentence_with_its_last_words_and_its_log(
    tmp_path: Path,
) -> None:
    begun: list[str] = []
    job = dataclasses.replace(JOB, engine_args={"unheard_of": 1})
    with pytest.raises(
        ServeAppError, match=r"full ended with code 1; \S+full\.log: TypeError: .*of"
    ):
        measure(job, "full", tmp_path, begun.append)
    assert begun == ["loading"]
    assert "Traceback" in (tmp_path / "full.log").read_text()


def test_a_second_run_is_kept_out_until_the_first_has_ended(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path / "out"),
        pytest.raises(ConfigError, match="Another run writes to"),
        alone_in(tmp_path / "out"),
    ):
        pass
    with alone_in(tmp_path / "out"):
        pass
