"""Fixtures that are dear to make are made once for the whole run."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis
import pytest

from tests.advising import LLAMA_8B
from tests.serving import Server

# How long one example takes says more of what else the machine does than of the code.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


# The demo application. It starts before the first test, so that its engines load meanwhile.
RUNNING = pytest.StashKey[Server]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what needs the demo application late, and engines of any model family last.

    For some families vLLM takes over transformers' own classes for the rest of the process, which
    the tests of the reference need as they are.
    """
    items.sort(key=lambda item: (item.path.name == "test_local_attention_engine.py", _asks(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly and any(map(_asks, session.items)):
        session.config.stash[RUNNING] = Server()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if running := session.config.stash.get(RUNNING, None):
        running.stop()


def _asks(item: pytest.Item) -> bool:
    return "server" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> Server:
    """The demo application, two real engines behind a gateway."""
    running = pytestconfig.stash[RUNNING]
    running.wait_ready()
    return running


@pytest.fixture
def llama_8b(tmp_path: Path) -> str:
    """A directory with the configuration of Llama 3.1 8B and no weights."""
    directory = tmp_path / "llama-8b"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(directory)
