"""The Locust user that sends `Ask`s, and how a test ends by itself."""

from __future__ import annotations

from typing import ClassVar

import gevent
from locust import FastHttpUser
from locust.env import Environment

from load_tests.client import accept_every_status, send
from load_tests.run import Run
from load_tests.stream import Ask, Record


class StreamingUser(FastHttpUser):
    """A Locust user whose requests are `Ask`s. ``load_run`` is set when the test starts.

    Locust's own tables, CSV and page show, under the length class: ``POST`` (end to end), ``TTFT``,
    ``ITL``, and each rejection under its status.
    """

    abstract = True
    host = "http://127.0.0.1:8000"
    concurrency = 10_000  # streams a user may have open: an open loop never waits for one
    network_timeout = 600.0
    load_run: ClassVar[Run | None] = None

    def on_start(self) -> None:
        accept_every_status(self.client.client)

    def launch(self, ask: Ask, scheduled: float) -> gevent.Greenlet:
        """Send ``ask`` on a greenlet of its own, keep its record, tell Locust."""
        run = self.load_run
        assert run is not None, "the test has not started"

        def measure() -> Record:
            record = send(
                self.client.client,
                self.client.base_url,
                ask,
                scheduled,
                origin=run.origin,
                headers=run.headers,
                obey_retry_after=run.obey_retry_after,
            )
            run.add(record)
            self._tell_locust(record)
            return record

        return run.launch(measure, ask, scheduled)

    def _tell_locust(self, record: Record) -> None:
        if record.outcome == "rejected":
            self._fire(str(record.status), record, 1e3 * _duration(record))
            return
        fault = None if record.outcome == "ok" else Exception(record.error or record.outcome)
        self._fire("POST", record, record.e2e_ms or 1e3 * _duration(record), fault)
        if record.outcome == "ok" and record.ttft_ms is not None:
            self._fire("TTFT", record, record.ttft_ms)
        if record.outcome == "ok" and record.itl_ms is not None:
            self._fire("ITL", record, record.itl_ms)

    def _fire(self, kind: str, record: Record, ms: float, fault: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=record.length_class,
            response_time=ms,
            response_length=record.output_tokens or 0,
            exception=fault,
            context={},
        )


def _duration(record: Record) -> float:
    return (record.ended or record.scheduled) - record.scheduled


def end(environment: Environment) -> None:
    """End the test: headless Locust leaves, its page stays."""
    runner = environment.runner
    runner.stop() if environment.web_ui else runner.quit()
