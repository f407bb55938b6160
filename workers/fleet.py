"""Worker processes on this machine: started, watched, killed and stopped together."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from workers.errors import StreamError

STOP_WITHIN_S = 30.0


class WorkerDied(StreamError):
    pass


class Fleet:
    """Each process is `gpt-trader-stream ARGUMENTS`, logs to `logs/<name>.log` and dies with the fleet.

    They are in sessions of their own: Ctrl-C reaches the parent only, and it stops them in order.
    """

    def __init__(self, environment: Mapping[str, str], logs: Path) -> None:
        self._environment = {**os.environ, **environment}
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        with self.log_file(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", "workers.cli", *arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """SIGKILL: the worker has no chance to say goodbye."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """SIGSTOP for the block: the process keeps all it has, and does nothing."""
        process = self._running[name]
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def check(self) -> None:
        """Raise WorkerDied, with the end of its log, if a worker has ended by itself."""
        for name, process in self._running.items():
            if (status := process.poll()) is not None:
                raise WorkerDied(f"{name} ended with status {status}:\n{self._log_tail(name)}")

    def ended(self) -> dict[str, int]:
        """Exit status of each that has ended by itself; they may be started again."""
        ended = {name: process.poll() for name, process in self._running.items()}
        statuses = {name: status for name, status in ended.items() if status is not None}
        for name in statuses:
            del self._running[name]
        return statuses

    def stop(self, *names: str, within_s: float = STOP_WITHIN_S) -> dict[str, int]:
        """Ask these, or all, to stop, kill what has not within the time; exit status by name."""
        stopping = {name: self._running[name] for name in names or tuple(self._running)}
        for process in stopping.values():
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + within_s
        statuses = {}
        for name, process in stopping.items():
            try:
                statuses[name] = process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                statuses[name] = process.wait()
            del self._running[name]
        return statuses

    def log_file(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _log_tail(self, name: str) -> str:
        return "\n".join(self.log_file(name).read_text(errors="replace").splitlines()[-20:])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
