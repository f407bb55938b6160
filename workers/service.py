"""The frame of every worker process: signals, /metrics and /healthz, ordered stop."""

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from types import FrameType, TracebackType
from typing import Any, Self

from prometheus_client.exposition import MetricsHandler

from workers.config import HttpSettings
from workers.logs import event
from workers.metrics import Metrics

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOP_WITHIN_S = 25.0
"""Under Kubernetes' 30 s of grace: whoever hangs on the way out leaves a line in the log first."""
STOPPED_TOO_SLOWLY = 70
"""Exit status of an ordered stop that missed its deadline (`EX_SOFTWARE`)."""


class Service:
    """`with Service(name, settings.http) as service: while service.running: ...; service.progress()`.

    The first SIGTERM or SIGINT turns `running` false: the loop ends by itself and the process
    leaves with status 0. A second one exits at once with 128 + signal, and so does a stop that
    takes longer than `stop_within_s`, with status 70. Both hold even while the main thread hangs
    in a C call, because another thread reads the signals. Signals are taken only when entered in
    the main thread, and an asyncio `add_signal_handler` inside takes them away again.

    /healthz answers 200 while `progress()` was called within `http.stalled_after_s` and no partition
    is named by `stalled()`, else 503; before the first call too.
    """

    def __init__(
        self,
        name: str,
        http: HttpSettings,
        *,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        stop_within_s: float = STOP_WITHIN_S,
    ) -> None:
        self.name = name
        self.metrics = metrics or Metrics()
        self.http = http
        self._clock = clock
        self._stop_within_s = stop_within_s
        self._stop = threading.Event()
        self._started_at = clock()
        self._progress_at: float | None = None
        self._stalled: list[str] = []
        self._details: dict[str, object] = {}
        self._server: ThreadingHTTPServer | None = None
        self._signals: _Signals | None = None
        self.metrics.progress_age.set_function(self._progress_age)

    @property
    def running(self) -> bool:
        return not self._stop.is_set()

    @property
    def port(self) -> int:
        """The port that /metrics and /healthz are really on."""
        assert self._server is not None, "the service is not entered"
        return int(self._server.server_address[1])

    def progress(self) -> None:
        """Say that the loop is alive: once a cycle, idle ones and each step of a restore included."""
        self._progress_at = self._clock()

    def stalled(self, partitions: Sequence[str]) -> None:
        """Name the partitions that do not move though messages wait; none once all move again."""
        self._stalled = list(partitions)

    def publish(self, **details: object) -> None:
        """Show these under `details` in /healthz, until replaced; values must not be changed later."""
        self._details = self._details | details

    def stop(self) -> None:
        """Ask for an ordered stop, from any thread."""
        self._stop.set()

    def wait(self, seconds: float) -> bool:
        """Sleep, or less when a stop is asked for meanwhile; True if the service goes on."""
        return not self._stop.wait(seconds)

    def health(self) -> tuple[HTTPStatus, dict[str, object]]:
        age = self._progress_age()
        moves = age <= self.http.stalled_after_s and not self._stalled
        alive = self._progress_at is not None and moves
        return HTTPStatus.OK if alive else HTTPStatus.SERVICE_UNAVAILABLE, {
            "worker": self.name,
            "status": self._status(alive),
            "seconds_since_progress": round(age, 3),
            "stalled_after_s": self.http.stalled_after_s,
            "stalled_partitions": self._stalled,
            "details": self._details,
        }

    def __enter__(self) -> Self:
        self._server = _serve(self)
        if threading.current_thread() is threading.main_thread():
            self._signals = _Signals(self._stop, self._stop_within_s)
        event(log, "started", pid=os.getpid(), http=f"{self.http.host}:{self.port}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._signals is not None:
            self._signals.close()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        seconds = round(self._clock() - self._started_at, 3)
        event(log, "stopped", seconds=seconds, cause=kind.__name__ if kind else "asked")

    def _progress_age(self) -> float:
        since = self._started_at if self._progress_at is None else self._progress_at
        return self._clock() - since

    def _status(self, alive: bool) -> str:
        if not self.running:
            return "stopping"
        if self._progress_at is None:
            return "starting"
        return "ok" if alive else "stalled"


def _serve(service: Service) -> ThreadingHTTPServer:
    class Handler(MetricsHandler):
        registry = service.metrics.registry

        def do_GET(self) -> None:  # noqa: N802
            match self.path.partition("?")[0]:
                case "/metrics":
                    super().do_GET()
                case "/healthz":
                    status, body = service.health()
                    self._answer(status, json.dumps(body, default=str).encode())
                case _:
                    self._answer(HTTPStatus.NOT_FOUND, b'{"paths": ["/metrics", "/healthz"]}')

        def _answer(self, status: HTTPStatus, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer((service.http.host, service.http.port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), name="http", daemon=True).start()
    return server


class _Signals:
    """Reads signal numbers from the interpreter's wakeup socket in a thread.

    Python runs a signal handler only between two bytecodes of the main thread, so never while
    that hangs in a C call; and a handler that logs or takes a lock may meet itself. The byte on
    the socket has neither trouble.
    """

    def __init__(self, stop: threading.Event, stop_within_s: float) -> None:
        self._stop, self._stop_within_s = stop, stop_within_s
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old_handlers: dict[signal.Signals, Any] = {
            number: signal.signal(number, _leave_it_to_the_thread) for number in STOP_SIGNALS
        }
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _watch(self) -> None:
        first = self._next()
        if first is None:
            return
        event(log, "stop_asked", signal=first.name, within_s=self._stop_within_s)
        self._stop.set()
        self._reader.settimeout(self._stop_within_s)
        try:
            second = self._next()
        except TimeoutError:
            event(log, "stop_forced", cause=f"not stopped after {self._stop_within_s} s")
            os._exit(STOPPED_TOO_SLOWLY)
        if second is not None:
            event(log, "stop_forced", cause=f"second signal: {second.name}")
            os._exit(128 + second)

    def _next(self) -> signal.Signals | None:
        """The next stop signal, or None once closed; other signals pass by."""
        while data := self._reader.recv(1):
            if data[0] in STOP_SIGNALS:
                return signal.Signals(data[0])
        return None


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    pass
