"""The ``local-attention client`` and ``report`` commands: a server as its users meet it.

One question, a conversation, or a load test: the locust files of ``load_tests``, headless.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from serve_app.errors import ServeAppError

if TYPE_CHECKING:
    import httpx

_notes = Console(stderr=True, highlight=False, soft_wrap=True)


class LoadTest(StrEnum):
    """The locust files that can be run from here."""

    benchmark = "benchmark"
    long_context = "long-context"


# What a mode runs unless options say otherwise; the last of an option wins.
_DEFAULTS = {
    LoadTest.benchmark: ("--run-time", "60s", "--rate", "2"),
    LoadTest.long_context: (),
}


def client_command(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Option(help="Ask this and leave; without it, hold a conversation.")
    ] = None,
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    api_key: Annotated[str, typer.Option(help="Sent as a bearer token.")] = "",
    test_mode: Annotated[
        LoadTest | None,
        typer.Option(help="Run this load test; it takes its locust file's own options too."),
    ] = None,
) -> None:
    """Ask a running server, or load it: --test-mode benchmark, --test-mode long-context.

    Further options of a test mode are its locust file's, such as --rate 4 --run-time 30s,
    --lengths 1k,16k or --out DIRECTORY; --help-load-test lists them.
    """
    if test_mode is not None:
        raise typer.Exit(_run_locust(test_mode, url, api_key, context.args))
    if context.args:
        raise ServeAppError(
            f"{context.args[0]} is not an option of the client without --test-mode."
        )
    _ask(url, api_key, max_tokens, [prompt] if prompt is not None else _typed())


def report_command(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders that load tests wrote.", metavar="RUN_DIR...")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where to write; default: the first folder.")
    ] = None,
) -> None:
    """Draw load tests: one HTML page and PNGs. Several runs are compared with each other."""
    from load_tests.report import write_report

    try:
        page = write_report(runs, out)
    except (OSError, ValueError) as error:
        raise ServeAppError(str(error)) from error
    typer.echo(page)


def _run_locust(mode: LoadTest, url: str, api_key: str, options: list[str]) -> int:
    """Run one of the packaged locust files headless; returns its exit code."""
    found = importlib.util.find_spec("load_tests")
    if found is None or not found.submodule_search_locations:
        raise ServeAppError("The load tests are not installed beside the command.")
    file = Path(found.submodule_search_locations[0]) / f"{mode.replace('-', '_')}.py"
    command = [sys.executable, "-m", "locust", "-f", str(file)]
    if "--help-load-test" in options:
        return subprocess.call([*command, "--help"])
    # Its own tables count a request's parts as requests of their own: ours says all once.
    command += ["--headless", "--skip-log-setup", "--users", "1", "--progress", "5"]
    command += ["--host", url, *(("--api-key", api_key) if api_key else ()), *_DEFAULTS[mode]]
    return subprocess.call([*command, *options])


def _typed() -> Iterator[str]:
    """Lines from the terminal until end of file."""
    _notes.print("Ctrl-D ends the conversation.")
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


@dataclass(slots=True)
class _Clock:
    """When an answer was asked for, began and ended, and its tokens as the server counted them."""

    asked: float
    first: float | None = None
    last: float | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        if self.first is None or self.last is None:
            return "no answer"
        parts = [f"TTFT {1e3 * (self.first - self.asked):,.0f} ms"]
        if self.tokens is not None:
            parts.append(f"{self.tokens} tokens")
            if self.tokens > 1 and self.last > self.first:
                parts.append(f"{(self.tokens - 1) / (self.last - self.first):,.1f} tokens/s")
        return ", ".join(parts)


def _ask(url: str, api_key: str, max_tokens: int, questions: list[str] | Iterator[str]) -> None:
    """Print the answer to each question as it comes, and its figures after it."""
    import httpx

    messages: list[dict[str, str]] = []
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(10, read=None)
    with httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False) as client:
        for question in questions:
            messages.append({"role": "user", "content": question})
            answer, clock = "", _Clock(perf_counter())
            for piece in _answer(client, messages, max_tokens, clock):
                answer += piece
                typer.echo(piece, nl=False)
            typer.echo()
            _notes.print(str(clock), style="dim", markup=False)
            messages.append({"role": "assistant", "content": answer})


def _answer(
    client: httpx.Client, messages: list[dict[str, str]], max_tokens: int, clock: _Clock
) -> Iterator[str]:
    """The pieces of one streamed answer. Raises ``ServeAppError`` with the server's own words."""
    import httpx

    try:
        models = client.get("/v1/models")
        _raise_for_error(models)
        body = {
            "model": models.json()["data"][0]["id"],
            "messages": messages,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        clock.asked = perf_counter()
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.is_error:
                reply.read()
            _raise_for_error(reply)
            for line in reply.iter_lines():
                if piece := _piece(line, clock):
                    clock.last = perf_counter()
                    clock.first = clock.first or clock.last
                    yield piece
    except httpx.ConnectError as error:
        raise ServeAppError(
            f"No server answers at {client.base_url}; start one with local-attention serve."
        ) from error
    except httpx.HTTPError as error:
        raise ServeAppError(f"The server at {client.base_url} broke off: {error}.") from error


def _raise_for_error(reply: httpx.Response) -> None:
    if not reply.is_error:
        return
    try:
        message = reply.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"The server answered with status {reply.status_code}."
    raise ServeAppError(message)


def _piece(line: str, clock: _Clock) -> str:
    """The text that one line of a server-sent event stream adds."""
    data = line.removeprefix("data: ")
    if data == line or data == "[DONE]":
        return ""
    event = json.loads(data)
    if "error" in event:
        raise ServeAppError(event["error"]["message"])
    if usage := event.get("usage"):
        clock.tokens = usage.get("completion_tokens")
    choices = event["choices"]
    return (choices[0]["delta"].get("content") or "") if choices else ""
