"""The ``local-attention`` command.

Heavy imports stand inside the commands that need them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console

from serve_app import advice, client, proposal, simulate
from serve_app.config import CPU_KV_CACHE, QUIET
from serve_app.errors import ServeAppError
from serve_app.quality.command import quality_command

if TYPE_CHECKING:
    import httpx


P = ParamSpec("P")
T = TypeVar("T")

app = typer.Typer(
    help="Serve language models with local attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_notes = Console(stderr=True, highlight=False, soft_wrap=True)

# Standard output is for the answer alone.
_LOGS_ASIDE = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
_POLL_S = 1.0


def _one_line_errors(command: Callable[P, T]) -> Callable[P, T]:
    """Errors raised on purpose become one line and exit code 1; others keep their traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except ServeAppError as error:
            _notes.print(f"error: {error}", style="red", markup=False)
            raise typer.Exit(1) from error

    return run


@app.command("demo-model")
@_one_line_errors
def demo_model(
    directory: Annotated[Path, typer.Argument(help="Where to write the model.")],
    trained: Annotated[
        str, typer.Option(help="The attention it was trained with: full, sliding or chunked-3-1.")
    ] = "full",
) -> None:
    """Write the demo model: Llama-shaped, byte-level, 1.3 MB, trained to find codes."""
    from serve_app.demo.model import build

    build(directory, trained)
    _notes.print(f"The demo model is in {directory}.")


@app.command()
@_one_line_errors
def serve(
    deployment: Annotated[
        Path, typer.Argument(help="Serve's deployment file.", metavar="DEPLOY.YAML")
    ] = Path("deploy.yaml"),
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without API keys.")
    ] = False,
) -> None:
    """Check the configuration, then `serve run` it, and say when it is ready."""
    from serve_app import preflight
    from serve_app.keys import INSECURE_VARIABLE, check_exposure

    plan = preflight.read_deployment(deployment)
    preflight.check(plan)
    if insecure:
        os.environ[INSECURE_VARIABLE] = "1"
    elif not plan.insecure:
        check_exposure(plan.address.host, plan.config)
    if os.environ.get("RAY_ADDRESS", "local") == "local":  # else the cluster may be elsewhere
        preflight.check_machine(plan)
    raise typer.Exit(_serve_run(deployment, plan.url))


def _serve_run(deployment: Path, url: str) -> int:
    """Run Ray's own command in the foreground and report readiness. Returns its exit code."""
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(deployment)]  # `serve run`
    # A shell's background job ignores SIGINT, and the child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    child = subprocess.Popen(command, env=server_environment(os.environ))
    # Ctrl-C reaches the child by itself; SIGTERM must end it as Ctrl-C does, which stops Serve.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGINT))
    started = time.monotonic()
    for state in _states(url, child):
        _notes.print(f"[{time.monotonic() - started:4.0f} s] {state}", markup=False)
    return child.wait()


def server_environment(own: Mapping[str, str]) -> dict[str, str]:
    """What Ray and the engines start with; what is in ``own`` already wins.

    Ray gives its workers niceness 15, so that whatever else runs on the machine comes before
    engines and gateways. Here they are what the machine is for.
    """
    return {**QUIET, "RAY_worker_niceness": "0", **own}


def _states(url: str, child: subprocess.Popen[bytes]) -> Iterator[str]:
    """What is being waited for, each time that it changes, until the server is ready."""
    import httpx

    last = ""
    with httpx.Client(base_url=url, timeout=5, trust_env=False) as client:
        while child.poll() is None:
            ready, state = _state(client)
            if state != last:
                yield state
                last = state
            if ready:
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_POLL_S)


def _state(client: httpx.Client) -> tuple[bool, str]:
    import httpx

    try:
        reply = client.get("/ready")
        answer = reply.json()
        pools: dict[str, int] = answer["pools"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return False, "waiting for Ray and the gateway"
    if answer["ready"]:
        return True, f"ready: {client.base_url.join('/v1')} (Ctrl-C stops it)"
    if unplaced := answer.get("missing"):
        return False, " ".join(unplaced.values())
    missing = [name for name, engines in pools.items() if not engines]
    return False, f"waiting for the engines of {' and '.join(missing)}: loading the model"


@app.command()
@_one_line_errors
def offline(
    model: Annotated[str, typer.Option(help="A directory, or a name that vLLM can load.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    attention_chunk_size: Annotated[
        int | None, typer.Option(help="Every layer sees its own chunk of this many tokens.")
    ] = None,
    sliding_window: Annotated[
        int | None, typer.Option(help="Every layer sees the last this many tokens.")
    ] = None,
    attention_sinks: Annotated[
        int, typer.Option(help="First tokens that stay visible, with --sliding-window.")
    ] = 0,
    full_attention_every: Annotated[
        int | None, typer.Option(help="Every n-th layer sees everything.")
    ] = None,
) -> None:
    """Continue one prompt with one vLLM engine, without Ray."""
    from serve_app import preflight

    local = _local_attention(
        attention_chunk_size, sliding_window, attention_sinks, full_attention_every
    )
    if Path(model).is_dir() or model.startswith((".", "/")):
        model = str(Path(model).resolve())
        preflight.check_model(model)
    for name, value in (*(QUIET | _LOGS_ASIDE).items(), CPU_KV_CACHE):
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    options = {"additional_config": {"local_attention": local}} if local else {}
    with _notes.status(f"Loading {model}"):
        # Compiling or capturing graphs takes longer than one prompt gains from it.
        engine = LLM(model=model, enforce_eager=True, **options)
    (result,) = engine.generate(
        [prompt], SamplingParams(max_tokens=max_tokens, temperature=0), use_tqdm=False
    )
    typer.echo(result.outputs[0].text)


def _local_attention(
    chunk: int | None, window: int | None, sinks: int, full_every: int | None
) -> dict[str, Any] | None:
    """The plugin's dictionary, or None when no pattern was asked for. Raises ``ConfigError``."""
    from pydantic import ValidationError

    from serve_app.config import explain
    from serve_app.errors import ConfigError
    from serve_app.pattern import LocalAttention

    if chunk is None and window is None and not sinks and full_every is None:
        return None
    try:
        pattern = LocalAttention(
            attention_chunk_size=chunk,
            sliding_window=window,
            attention_sinks=sinks,
            full_attention_every=full_every,
        )
    except ValidationError as error:
        raise ConfigError(explain(error).removeprefix("the file: ")) from error
    return pattern.model_dump(exclude_none=True, mode="json")


app.command("check")(_one_line_errors(advice.check_command))
app.command("plan")(_one_line_errors(proposal.plan_command))
app.command("quality")(_one_line_errors(quality_command))
app.command("simulate")(_one_line_errors(simulate.simulate_command))


_LOCUST_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("client", context_settings=_LOCUST_OPTIONS)(_one_line_errors(client.client_command))
app.command("chat", hidden=True, context_settings=_LOCUST_OPTIONS)(
    _one_line_errors(client.client_command)
)
app.command("report")(_one_line_errors(client.report_command))
