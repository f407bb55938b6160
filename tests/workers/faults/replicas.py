"""Inference replicas as real processes, forked from one that has loaded everything: up in a moment."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from workers.config import Settings

PATIENCE_S = 120.0


class Disturbance(Protocol):
    def install(self) -> None: ...


class Replicas:
    """Replicas of one group, by name; those that still run are killed at the end of the block."""

    def __init__(self, settings: Settings, logs: Path) -> None:
        self.settings = settings
        self.given_up = 0
        self._logs = logs
        self._processes: dict[str, BaseProcess] = {}
        self._forks = multiprocessing.get_context("forkserver")
        self._forks.set_forkserver_preload(["tests.workers.faults.preload"])

    def start(
        self, name: str, *faults: Disturbance, settings: Settings | None = None, slot: str = ""
    ) -> None:
        """Start one; `slot` is its replica name where that is not its own."""
        chosen = (settings or self.settings).model_copy(update={"replica": slot or name})
        self._logs.mkdir(parents=True, exist_ok=True)
        process = self._forks.Process(
            target=_serve,
            args=(chosen, faults, self.log_file(name), dict(os.environ)),
            name=name,
            daemon=True,
        )
        process.start()
        self._processes[name] = process

    def kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.join()

    def send(self, name: str, number: signal.Signals) -> None:
        pid = self._processes[name].pid
        assert pid is not None
        os.kill(pid, number)

    def ended(self, name: str) -> int:
        """Wait until it has ended by itself; its exit status, minus the signal that killed it."""
        process = self._processes[name]
        process.join(PATIENCE_S)
        status = process.exitcode
        assert status is not None, f"{name} did not end:\n{self._log_tail(name)}"
        del self._processes[name]
        return status

    def frozen(self, name: str) -> bool:
        """Whether it has stopped itself by SIGSTOP."""
        stat = Path(f"/proc/{self._processes[name].pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    def revive(self) -> None:
        """Start again what has given up with an error, as an orchestrator does."""
        for name, process in list(self._processes.items()):
            if process.exitcode is not None:
                assert process.exitcode == 1, f"{name}: {process.exitcode}\n{self._log_tail(name)}"
                self.given_up += 1
                self.start(name)

    def stop(self) -> dict[str, int]:
        """Ask all to stop; their exit statuses."""
        for name in self._processes:
            self.send(name, signal.SIGTERM)
        return {name: self.ended(name) for name in list(self._processes)}

    def log_file(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def log(self, name: str) -> str:
        return self.log_file(name).read_text(errors="replace")

    def _log_tail(self, name: str) -> str:
        return self.log(name)[-3_000:]

    def wait_for(self, name: str, text: str) -> None:
        """Until its log says so."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.log_file(name).exists() or text not in self.log(name):
            assert time.monotonic() < deadline, f"{name} never said {text}"
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in list(self._processes):
            self.kill(name)


def _serve(
    settings: Settings, faults: Sequence[Disturbance], log: Path, environment: Mapping[str, str]
) -> None:
    from workers import inference
    from workers.logs import set_up

    os.environ.update(environment)  # the process it was forked from may be older
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), sys.__stdout__.fileno())  # type: ignore[union-attr]
        os.dup2(file.fileno(), sys.__stderr__.fileno())  # type: ignore[union-attr]
    set_up("inference")
    for fault in faults:
        fault.install()
    inference.run(settings)
