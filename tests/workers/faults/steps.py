"""Faults at named steps of a replica's cycle: what it calls there is wrapped, it knows nothing of it."""

import errno
import functools
import logging
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from confluent_kafka import Producer

import workers.inference
from models.runtimes.numba import NumbaRuntime
from models.runtimes.torch import TorchRuntime
from workers.engine import Engine
from workers.kafka import publishing
from workers.kafka.reading import GroupConsumer
from workers.schedule import Schedule

Action = Literal["kill", "freeze", "pause", "disk full"]
PAUSE_S = 4.0


class _Producer(Producer):
    """The client's own cannot be wrapped."""

    def produce(self, *args: Any, **kwargs: Any) -> None:
        super().produce(*args, **kwargs)


STEPS: dict[str, tuple[object, str, Literal["before", "after"]]] = {
    "after the poll": (workers.inference, "poll_batch", "after"),
    "after the model": (publishing._Publisher, "_begin", "before"),
    "half produced": (_Producer, "produce", "after"),
    "after produce": (publishing._Publisher, "commit", "before"),
    "before the commit": (publishing.ExactlyOnce, "_until_done", "before"),
    "delivered, not committed": (GroupConsumer, "commit", "before"),
    "after the commit": (publishing._Publisher, "commit", "after"),
    "opening a bundle": (workers.inference, "open_bundle", "before"),
    "in a snapshot": (os, "fsync", "before"),
    "in a swap": (Schedule, "change", "after"),
    "in a rebuild": (
        TorchRuntime if torch.cuda.is_available() else NumbaRuntime,
        "rebuild",
        "after",
    ),
    "in a restore": (Engine, "load", "after"),
}


@dataclass(frozen=True)
class Fault:
    """At the `nth` time that a replica comes to `step`, `action` happens to it.

    An empty poll does not count. A full disk stays full.
    """

    step: str
    nth: int = 1
    action: Action = "kill"

    def install(self) -> None:
        owner, name, when = STEPS[self.step]
        call = getattr(owner, name)
        times = 0

        def reached() -> None:
            nonlocal times
            times += 1
            if times == self.nth or (times > self.nth and self.action == "disk full"):
                logging.getLogger(__name__).warning("fault: %s %s", self.action, self.step)
                _ACTIONS[self.action]()

        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if when == "before":
                reached()
            result = call(*args, **kwargs)
            if when == "after" and (result or self.step != "after the poll"):
                reached()
            return result

        setattr(owner, name, wrapped)
        vars(publishing)["Producer"] = _Producer


@dataclass(frozen=True)
class JumpingClock:
    """Wall time leaps about by up to a day each way, as often as it is looked at."""

    seed: int = 0

    def install(self) -> None:
        jump = random.Random(self.seed)
        real_s, real_ns = time.time, time.time_ns
        time.time = lambda: real_s() + jump.uniform(-86_400, 86_400)
        time.time_ns = lambda: real_ns() + jump.randint(-86_400, 86_400) * 10**9


def _disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_ACTIONS: dict[Action, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "pause": lambda: time.sleep(PAUSE_S),
    "disk full": _disk_full,
}
