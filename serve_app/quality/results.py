"""Run an engine for each plan, keep what it measured, and go on where an earlier run ended."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from serve_app.config import QUIET
from serve_app.errors import ConfigError, ServeAppError
from serve_app.local_attention.plan import CHUNK_VARIABLE
from serve_app.quality.grid import Job, Pattern, Result

STEP = "step: "  # how the child's lines begin that say what it is about to do
STEPS = ("loading", "perplexity", "retrieval", "agreement", "decode")

# One process for each engine, so that its errors keep their words; nothing is reported to vLLM.
_ENVIRONMENT = QUIET | {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keep a second run out of ``directory``, which would write over the first one's results.

    Raises ``ConfigError`` while another run is there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another run writes to {directory}; wait for it, or name another --out."
            ) from None
        yield


@dataclass(slots=True)
class Kept:
    """What was measured so far for one job, and why plans were refused; a file of its own."""

    path: Path
    settings: dict[str, Any]
    results: dict[str, Result] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, job: Job) -> Kept:
        """What ``path`` holds, or nothing yet. Raises ``ConfigError`` if it is of another job."""
        kept = cls(path, _settings(job))
        if not path.exists():
            return kept
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            settings, kept.results, kept.refused = (
                stored[key] for key in ("settings", "results", "refused")
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no file of this command; name another --out.") from error
        changed = [key for key in kept.settings if settings.get(key) != kept.settings[key]]
        if changed:
            raise ConfigError(
                f"{path} holds the results of other settings ({', '.join(changed)}); name another "
                "--out, or remove that file."
            )
        return kept

    def save(self) -> None:
        """Write all over what the file held, in one step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(
            json.dumps(
                {"settings": self.settings, "results": self.results, "refused": self.refused},
                indent=1,
            )
            + "\n",
            encoding="utf-8",
        )
        partial.replace(self.path)

    def missing(self, plans: Mapping[str, Pattern | None]) -> Iterator[tuple[str, Pattern | None]]:
        for name, pattern in plans.items():
            if name not in self.results and name not in self.refused:
                yield name, pattern


def _settings(job: Job) -> dict[str, Any]:
    """What all plans share, as JSON gives it back."""
    shared = dataclasses.asdict(job)
    del shared["pattern"]
    return dict(json.loads(json.dumps(shared)))


def digest_of(*paths: Path) -> str:
    """A digest that changes when a file at a path, or in a directory there, is written anew."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else (path,):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def measure_all(
    job: Job, plans: Mapping[str, Pattern | None], kept: Kept, notes: Console
) -> list[str]:
    """Measure the plans that are missing; returns a sentence for each that failed.

    ``notes`` shows progress. Raises where the reference fails, and exits with 130 after Ctrl-C.
    """
    missing = list(kept.missing(plans))
    done = len(plans) - len(missing)
    if done:
        notes.print(f"{done} of {len(plans)} plans are in {kept.path} already.", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    failed = []
    try:
        with Progress(*columns, TimeElapsedColumn(), console=notes, transient=True) as bar:
            task = bar.add_task("", total=len(plans) * len(STEPS))
            for number, (name, pattern) in enumerate(missing, done):

                def begin(step: str, name: str = name, number: int = number) -> None:
                    completed = number * len(STEPS) + STEPS.index(step)
                    bar.update(task, description=f"{name}: {step}", completed=completed)

                try:
                    line = _measure(dataclasses.replace(job, pattern=pattern), name, kept, begin)
                except ServeAppError as error:
                    if pattern is None:
                        raise  # nothing can be judged without the reference
                    failed.append(str(error))
                    line = f"{name}: failed"
                notes.print(line, markup=False)
    except KeyboardInterrupt:
        notes.print("Stopped; the same command goes on from here.")
        raise typer.Exit(130) from None
    return failed


def _measure(job: Job, name: str, kept: Kept, begin: Callable[[str], None]) -> str:
    """Measure one plan, keep what came of it, and say so."""
    started = time.monotonic()
    result = measure(job, name, kept.path.parent, begin)
    if isinstance(result, str):
        if job.pattern is None:
            raise ConfigError(result)
        kept.refused[name] = result
        line = f"{name}: refused. {result}"
    else:
        kept.results[name] = result
        line = f"{name}: {time.monotonic() - started:.0f} s"
    kept.save()
    return line


def measure(job: Job, name: str, out: Path, begin: Callable[[str], None]) -> Result | str:
    """Run one engine to its end; ``begin`` is called with each of :data:`STEPS` as it begins.

    Returns a sentence instead where the engine refuses the plan. Raises ``ServeAppError`` with the
    log's name where it fails; the engine is gone whatever happens.
    """
    stem = name.replace(" ", "-").replace(",", "").replace("/", "-")
    out.mkdir(parents=True, exist_ok=True)
    result, log = out / f"{stem}.json", out / f"{stem}.log"
    result.unlink(missing_ok=True)
    environment = {**os.environ, **_ENVIRONMENT}
    environment.pop(CHUNK_VARIABLE, None)  # the reference must be what it is called
    with log.open("w", encoding="utf-8") as lines, _engine(result, lines, environment) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:  # its log says why it is gone
            child.stdin.write(json.dumps(dataclasses.asdict(job)))
        for line in child.stdout:
            if line.startswith(STEP):
                begin(line.removeprefix(STEP).strip())
            else:
                lines.write(line)
        code = child.wait()
    if code or not result.exists():
        raise ServeAppError(
            f"The engine of {name} ended with code {code}; {log}: {_last_line(log)}"
        )
    answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    measured: Result | str = answer["refused"] if "refused" in answer else answer["result"]
    return measured


@contextlib.contextmanager
def _engine(
    result: Path, log: Any, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """The child and, in a session of its own, the workers that it may start; killed at the end."""
    command = [sys.executable, "-m", "serve_app.quality.run", str(result)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            yield child
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)


def _last_line(log: Path) -> str:
    """The last thing that an engine said, which is where a traceback says what was wrong."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
